"The tour, headless, with everything it promises: once, with fewer live steps than `make tour` takes; as it is under `make soak`."
import json, re, subprocess, sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]


def osnb(*args, **kw):
    return subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kw)


@pytest.fixture(scope="module", params=["short", pytest.param("as-it-is", marks=pytest.mark.soak)])
def tour(request, tmp_path_factory):
    "What was printed, and the folder. Short: 4 live steps of each model where the page has 20; they show that training goes on, and no number below depends on them."
    page, out = ROOT / "nbs/00_tour.ipynb", tmp_path_factory.mktemp("tour") / "out"
    if request.param == "short":
        text, found = re.subn(r"\bsteps=20, lr=", "steps=4, lr=", page.read_text())
        assert found == 2, "the page trains both models for 20 steps, or say here how"
        page = out.parent / page.name; page.write_text(text)
    r = osnb("tour", "--out", out, "--notebook", page)
    assert r.returncode == 0, r.stdout[-1500:] + r.stderr[-3000:]
    return r.stdout, out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_says_where_things_are_and_what_it_measured(tour):
    said, out = tour
    summary = json.loads((out / "summary.json").read_text())
    for line in ("report.html", "peak memory", "time of the tour", "PSNR of the autoencoder", "9. What it cost"): assert line in said
    assert all(value in said for value in summary.values())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quality_is_what_the_readme_promises(tour):
    summary = json.loads((tour[1] / "summary.json").read_text())
    number = lambda key: float(re.match(r"[\d.]+", summary[key])[0])
    assert number("PSNR of the autoencoder, pocket, held out") >= 24
    assert number("frames 1 to 4 against the image, motion 1") >= 18
    low, middle, high = map(float, summary["motion measured when 1, 4, 7 was asked"].split(","))
    assert low < middle < high


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_leaves_manifest_clips_curves_samples_and_a_report(tour):
    out = tour[1]
    manifest = pl.read_parquet(out / "curated/pocket/manifest.parquet")
    kept = manifest.filter(pl.col("status") == "kept")
    assert len(kept) >= 10 and all((out / "curated/pocket" / p).is_file() for p in kept["path"])
    for name in ("samples/motion-1.mp4", "samples/motion-4.mp4", "samples/motion-7.mp4", "samples/side-by-side.mp4", "losses.png", "reconstructions.png", "motion.png"):
        assert (out / name).stat().st_size > 1000, name
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64") + report.count("data:image/jpeg;base64") >= 8 and "data:video/mp4;base64" in report, "pictures and clips are inside"
    assert str(ROOT) not in report and "Traceback" not in report and 'src="http' not in report


def test_footage_that_is_none_is_one_line(tmp_path):
    for folder, says in ((tmp_path, "no videos or images in"), (tmp_path / "gone", "no such footage")):
        r = osnb("tour", "--footage", folder, "--out", tmp_path / "out")
        assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and says in r.stderr and not (tmp_path / "out").exists()
