"""Notebooks are the source: export the library, clean the notebooks, write README.md. `--check` changes nothing and exits 1 where they differ.

The library is made anew from nothing, so that a module whose notebook was renamed or deleted goes as well.
"""
import os, shutil, subprocess, sys, tempfile
from pathlib import Path
ROOT = Path(__file__).resolve().parents[1]
MADE = ("nbs/**/*.ipynb", "opensora_nb/**/*.py", "README.md", "assets/readme/*")       # what this script may change

def export(tree: Path):
    "Make the library and the README of `tree` from its notebooks, in place; the page that becomes the README is run, for it lists the others."
    for module in (tree / "opensora_nb").rglob("*.py"): module.unlink()
    python, script = sys.executable, lambda name: Path(sys.executable).with_name(name)
    for command in ([script("nbdev_export")], [python, "dev/run_notebooks.py", "nbs/index.ipynb"], [script("nbdev_clean")], [python, "dev/readme.py"]):
        subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(tree)})

def files(tree: Path) -> dict[str, bytes]:
    found = (p for pattern in MADE for p in tree.glob(pattern) if p.is_file() and ".ipynb_checkpoints" not in p.parts)
    return {str(p.relative_to(tree)): p.read_bytes() for p in found}

def made(tree: Path = ROOT) -> tuple[dict[str, bytes], dict[str, bytes]]:
    "The files of `tree` as they are, and as a copy of it has them after `export`."
    before = files(tree)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        for name in ("nbs", "opensora_nb", "dev", "assets"):
            if (tree / name).exists(): shutil.copytree(tree / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "*.safetensors"))
        shutil.copy(tree / "settings.ini", copy)
        export(copy)
        return before, files(copy)

if __name__ == "__main__":
    before, after = made()
    stale = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if "--check" not in sys.argv:
        for name in stale:
            path = ROOT / name
            if name not in after: path.unlink(); print("removed", name)
            else: path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(after[name]); print("wrote  ", name)
        print("notebooks, library and README are in step")
    elif stale: sys.exit(f"run `make sync`, these are out of step: {' '.join(stale)}")
