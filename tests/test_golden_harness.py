"The golden test must find what it is there to find: it is run on small folders of reference values that are right, wrong or unknown."
import json, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from test_golden import RELATIVE, Family, family, weight

pytestmark = pytest.mark.slow        # real processes and files: half a minute

TESTS = Path(__file__).parent


def run(folder):
    r = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rf", TESTS / "test_golden.py", "--golden", folder], capture_output=True, text=True, cwd=TESTS.parent)
    return r.returncode, r.stdout + r.stderr

def embedding_family(folder, case, factor=1.0, **changes):
    "The reference's timestep embedding under another name, one of its values off by `factor` times what is allowed."
    theirs = Family(TESTS / "golden/mmdit.json")
    entry = next(c for c in theirs.cases.values() if "embedding" in c["outputs"])
    values = theirs.arrays[f"{entry['case']}|embedding"].copy()
    values[2, 7] += (factor - 1) * RELATIVE * entry["outputs"]["embedding"]["absmax"]
    np.savez(folder / "mmdit.npz", **{f"{case}|embedding": values})
    (folder / "mmdit.json").write_text(json.dumps({"family": "mmdit", "npz": ["mmdit.npz"], "cases": [entry | {"case": case} | changes]}))

def test_names_do_not_matter_and_counts_are_printed(tmp_path):
    embedding_family(tmp_path, "a name nobody has seen", factor=1.5)
    code, text = run(tmp_path)
    assert code == 0 and "mmdit: compared 1 arrays, 1 cases" in text, text

def test_a_wrong_value_fails(tmp_path):
    embedding_family(tmp_path, "wrong", factor=3)
    code, text = run(tmp_path)
    assert code == 1 and "embedding: off by" in text, text

def test_what_cannot_be_built_fails(tmp_path):
    embedding_family(tmp_path, "more", outputs={"afterglow": {"shape": [1]}})
    (tmp_path / "teleport.json").write_text(json.dumps({"family": "teleport", "cases": [{"case": "there"}]}))
    (tmp_path / "sampling_tables.json").write_text(json.dumps({"newer": [{"a": 1}]}))
    code, text = run(tmp_path)
    assert code == 1 and text.count("cannot build") >= 3 and "3 failed" in text, text

@pytest.mark.parametrize("made", [True, False], ids=["empty", "absent"])
def test_without_reference_values_one_line_says_so(tmp_path, made):
    folder = tmp_path / "values"
    if made: folder.mkdir()
    code, text = run(folder)
    assert code != 0 and str(folder) in text and len(text.strip().splitlines()) == 1, text

def test_the_fill_is_the_reference_s():
    "First values of three tensors of each listed model."
    checked = 0
    for name in ("mmdit", "dcae"):
        fam = family(str(TESTS / "golden"), name)
        for case in fam.cases.values():
            for tensor, head in case.get("fill_check", {}).items():
                assert weight(tensor, fam.state_dict(case)[0][tensor]).flatten()[:4].tolist() == pytest.approx(head, rel=1e-6)
                checked += 1
    assert checked >= 12
