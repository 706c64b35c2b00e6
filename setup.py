"Metadata and requirements are in settings.ini, the one source of them; this hands them to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=("=",), interpolation=None)
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = ini["DEFAULT"]
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    author_email=cfg["author_email"], keywords=cfg["keywords"], url=cfg["git_url"], license="Apache-2.0", license_files=["LICENSE"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']}", packages=find_packages(include=["opensora_nb", "opensora_nb.*"]),
    package_data={"opensora_nb": ["pocket/**/*.safetensors", "pocket/**/*.json"]}, include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={key.removeprefix("extra_"): value.split() for key, value in cfg.items() if key.startswith("extra_")},
    entry_points={"console_scripts": cfg["console_scripts"].split()})
