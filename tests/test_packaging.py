"What is installed is what settings.ini says, the pins fit it, and the wheel has what `osnb` needs."
import re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from opensora_nb.commands.cli import PACKAGES
ROOT = Path(__file__).parents[1]
INI = ConfigParser(delimiters=("=",), interpolation=None); INI.read(ROOT / "settings.ini")
CFG = INI["DEFAULT"]
WANTED = {"": CFG["requirements"], **{key.removeprefix("extra_"): text for key, text in CFG.items() if key.startswith("extra_")}}
PINS = {canonicalize_name(m[1]): m[2] for m in re.finditer(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)}

@pytest.mark.parametrize("extra", WANTED)
def test_each_requirement_is_pinned_to_a_version_that_it_allows(extra):
    for requirement in map(Requirement, WANTED[extra].split()):
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), str(requirement)

def test_doctor_looks_at_what_is_required_and_nothing_that_has_no_place():
    listed = {extra: {canonicalize_name(Requirement(r).name) for r in text.split()} for extra, text in WANTED.items()}
    known = {canonicalize_name(p.dist): p.extra for p in PACKAGES.values()}
    assert listed[""] == {name for name, extra in known.items() if not extra}
    apart = {"colossalai", "vbench"}                                            # make targets of their own
    assert [name for name, extra in known.items() if extra and extra not in apart and name not in listed[extra]] == []

def test_what_must_stay_out_is_not_pinned():
    assert not {"torchvision", "decord", "opencv-python", "scenedetect"} & PINS.keys()
    assert "/" not in re.sub(r"(?m)^#.*", "", (ROOT / "constraints.txt").read_text()), "a path of somebody's machine"

@pytest.mark.slow
def test_the_wheel_has_library_weights_and_console_script(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "opensora_nb", tree / "opensora_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        info = next(n for n in names if n.endswith("METADATA")).rpartition("/")[0]
        assert "osnb = opensora_nb.commands.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
        metadata = wheel.read(f"{info}/METADATA").decode()
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "opensora_nb").rglob("*") if p.suffix in (".py", ".safetensors", ".json")}
    assert ours == {n for n in names if n.startswith("opensora_nb/")}
    assert any(n.endswith("LICENSE") for n in names) and "Provides-Extra: notebooks" in metadata and "Requires-Dist: torch>=2.8" in metadata
