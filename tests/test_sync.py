"Notebooks, library and README are in step, and the house keeps its order."
import pytest
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
ROOT = Path(__file__).parents[1]
FLOORS = ("cluster", "data", "autoencoder", "mmdit", "flow", "training", "inference", "evaluation", "lab", "commands")   # each imports from those before it
LIGHT = ("cluster", "autoencoder", "mmdit", "flow", "training", "inference")        # floors that a bare cluster image can import
MODULES = sorted(p for p in (ROOT / "opensora_nb").rglob("*.py") if not p.name.startswith("_"))

def sync(tree, *args): return subprocess.run([sys.executable, "dev/sync.py", *args], cwd=tree, capture_output=True, text=True)

def test_notebooks_library_and_readme_are_in_step():
    r = sync(ROOT, "--check")
    assert r.returncode == 0, r.stderr

@pytest.mark.slow
def test_a_change_by_hand_is_noticed_and_mended(tmp_path):
    for name in ("dev", "opensora_nb"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("settings.ini", "nbs/index.ipynb", "nbs/cluster/00_files.ipynb", "nbs/commands/00_cli.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT / name, tmp_path / name)
    module, orphan = tmp_path / "opensora_nb/cluster/files.py", tmp_path / "opensora_nb/cluster/forgotten.py"
    true = module.read_text()
    module.write_text(true.replace("Something the user can mend", "Something else")); orphan.write_text("x = 1\n")
    r = sync(tmp_path, "--check")
    assert r.returncode == 1 and "opensora_nb/cluster/files.py" in r.stderr and "opensora_nb/cluster/forgotten.py" in r.stderr
    assert orphan.exists(), "--check changes nothing"
    assert sync(tmp_path).returncode == 0
    assert module.read_text() == true and not orphan.exists()

def test_no_two_notebooks_export_the_same_module():
    sources = {nb: "\n".join("".join(c["source"]) for c in json.loads(nb.read_text())["cells"]) for nb in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in nb.parts}
    exports = [name for text in sources.values() for name in re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", text, re.M)]
    assert len(exports) == len(set(exports)), sorted({name for name in exports if exports.count(name) > 1})

def imports(module):
    "Dotted names of our own modules that `module` imports, wherever in the file."
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            whole = [*base, *(node.module.split(".") if node.module else [])]
            yield from ([*whole, alias.name] for alias in node.names)
        elif isinstance(node, ast.Import): yield from (alias.name.split(".") for alias in node.names)

def test_a_floor_imports_only_from_floors_above_it():
    wrong = [f"{module.relative_to(ROOT)} imports {'.'.join(name)}" for module in MODULES for name in imports(module)
             if name[0] == "opensora_nb" and len(name) > 1 and name[1] in FLOORS and module.parent.name in FLOORS
             and FLOORS.index(name[1]) > FLOORS.index(module.parent.name)]
    assert not wrong, wrong

def test_the_light_floors_import_torch_einops_numpy_safetensors_and_tqdm_only():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.parent.name in LIGHT and p.stem != "tuning_room"]      # a page, which nothing of these imports
    assert "opensora_nb.cluster.files" in names
    probe = """
import importlib, sys
import torch, einops, numpy, safetensors.torch, tqdm
top = lambda: {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)
allowed = top() | {'opensora_nb', 'cython_runtime'}         # the latter is what compiled extensions leave behind, no package
for name in sys.argv[1:]:
    importlib.import_module(name)
    new = {m for m in top() - allowed if not m.startswith('_')}
    if new: print(name, 'imports', *sorted(new)); allowed |= new
"""
    r = subprocess.run([sys.executable, "-c", probe, *names], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert not r.stdout, r.stdout
