"The tour, as `make tour` runs it: once, headless, with everything it promises."
import json, re, subprocess, sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs/tour"


def osnb(*args, **kw):
    return subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kw)


@pytest.fixture(scope="module")
def tour():
    r = osnb("tour", "--out", OUT)
    assert r.returncode == 0, r.stdout[-1500:] + r.stderr[-3000:]
    return r.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_says_where_things_are_and_what_it_measured(tour):
    summary = json.loads((OUT / "summary.json").read_text())
    for line in ("report.html", "peak memory", "time of the tour", "PSNR of the autoencoder", "9. What it cost"): assert line in tour
    assert all(value in tour for value in summary.values())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quality_is_what_the_readme_promises(tour):
    summary = json.loads((OUT / "summary.json").read_text())
    number = lambda key: float(re.match(r"[\d.]+", summary[key])[0])
    assert number("PSNR of the autoencoder, pocket, held out") >= 24
    assert number("frames 1 to 4 against the image, motion 1") >= 18
    low, middle, high = map(float, summary["motion measured when 1, 4, 7 was asked"].split(","))
    assert low < middle < high


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_leaves_manifest_clips_curves_samples_and_a_report(tour):
    manifest = pl.read_parquet(OUT / "curated/pocket/manifest.parquet")
    kept = manifest.filter(pl.col("status") == "kept")
    assert len(kept) >= 10 and all((OUT / "curated/pocket" / p).is_file() for p in kept["path"])
    for name in ("samples/motion-1.mp4", "samples/motion-4.mp4", "samples/motion-7.mp4", "samples/side-by-side.mp4", "losses.png", "reconstructions.png", "motion.png"):
        assert (OUT / name).stat().st_size > 1000, name
    report = (OUT / "report.html").read_text()
    assert report.count("data:image/png;base64") + report.count("data:image/jpeg;base64") >= 8 and "data:video/mp4;base64" in report, "pictures and clips are inside"
    assert str(ROOT) not in report and "Traceback" not in report and 'src="http' not in report


def test_footage_that_is_none_is_one_line(tmp_path):
    for folder, says in ((tmp_path, "no videos or images in"), (tmp_path / "gone", "no such footage")):
        r = osnb("tour", "--footage", folder, "--out", tmp_path / "out")
        assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and says in r.stderr and not (tmp_path / "out").exists()
