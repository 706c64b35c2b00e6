"""The curation's verdicts on footage of other content than the pocket world (verdict_material.py). `python tests/test_verdicts.py jitters 0` prints a set's scores."""
import sys
from pathlib import Path
import numpy as np, pytest
from scipy.stats import spearmanr
import verdict_material as material
from opensora_nb.data.filters import technical_faults
from opensora_nb.data.manifest import manifest_frame
from opensora_nb.data.ocr import clip_text_share
from opensora_nb.data.pyramid import LEVELS, faults
from opensora_nb.data.shots import ShotConfig
from opensora_nb.data.survey import survey
from opensora_nb.data.video import VideoError, probe

pytestmark = pytest.mark.slow            # some hundred small films are made and looked at: minutes
SEED = 11                                # thresholds were chosen on other seeds, most of them with other pictures
SHORT = ShotConfig(min_clip_s=1.0)       # the films are no longer than they need be

@pytest.fixture(params=[pytest.param(True, id="half"), pytest.param(False, id="all", marks=pytest.mark.soak)])
def made(request, tmp_path): return lambda name: getattr(material, name)(tmp_path, SEED, held_out=True, half=request.param)

def takes(item): return list(survey(probe(item.path), SHORT))
def longest(item): return max(takes(item), key=lambda t: t.span.last - t.span.first)

def f1(true: int, invented: int, missed: int) -> float: return 2 * true / max(1, 2 * true + invented + missed)

def judge(rows: list[tuple[material.Item, bool, str]]) -> float:
    "F1 of (item, said, scores); prints who is wrong and the scores of all."
    for item, said, scores in sorted(rows, key=lambda r: (r[0].label, r[0].path.name)): print(f"{'  ' if said == item.label else 'X '}{'yes' if item.label else 'no ':4} said {'yes' if said else 'no ':4} {scores}  {item}")
    score = f1(*(sum(a == item.label and b == said for item, said, _ in rows) for a, b in ((True, True), (False, True), (True, False))))
    print(f"F1 {score:.3f} of {len(rows)} files")
    return score

def cut_errors(item) -> tuple[list[int], list[int], list[int]]:
    "Cuts that were found, invented and missed, within a frame; in a `free` range (a fade) either answer is right."
    found, true = [t.span.first for t in takes(item)][1:], list(item.truth["cuts"])
    hit, invented = [], []
    for k in found:
        near = [c for c in true if abs(c - k) <= 1 and c not in hit]
        if near: hit.append(near[0])
        elif not any(a <= k <= b for a, b in item.truth["free"]): invented.append(k)
    return hit, invented, [c for c in true if c not in hit]

def test_cuts_are_found_to_a_frame_and_none_is_invented(made):
    totals = np.zeros(3, int)
    for item in made("cuts"):
        hit, invented, missed = cut_errors(item); totals += [len(hit), len(invented), len(missed)]
        print(f"{'X ' if invented or missed else '  '}{len(hit)} found, invented {invented}, missed {missed}  {item}")
    print(f"F1 {f1(*totals):.3f}, {totals} found, invented, missed")
    assert f1(*totals) >= 0.95

def test_blurred_clips_are_told_from_sharp_ones(made):
    assert judge([(item, (t := longest(item)).blurry, f"variance {t.sharpness:7.1f}") for item in made("blurs")]) >= 0.9

def faults_of(item, **scores) -> list[str]:
    "What the loosest level of the pyramid holds against a clip with these scores."
    row = manifest_frame([dict(clip_id="x", source=item.path.name, status="kept", duration_s=2.0, height=512, width=512, **scores)])
    return row.select(faults(LEVELS[0])).item().to_list()

def test_text_overlays_are_found(made):
    rows = []
    for item in made("texts"):
        share = clip_text_share(list(longest(item).frames))
        rows.append((item, "text" in faults_of(item, score_ocr=share), f"share {share:.3f}"))
    assert judge(rows) >= 0.9

def test_trembling_cameras_are_told_from_steady_ones(made):
    rows = []
    for item in made("jitters"):
        t = longest(item)
        rows.append((item, "jitter" in faults_of(item, score_shake=t.shake, score_jitter=t.content), f"shake {t.shake:6.2f}, content {t.content:5.1f}"))
    assert judge(rows) >= 0.9

def box_error(item) -> int:
    "Largest distance in pixels of an edge of the found picture from the true one; 9999 where it was taken for black."
    (y, x, h, w), found = item.truth["box"], longest(item).box
    if found is None: return 9999
    return max(abs(found.y - y), abs(found.x - x), abs(found.y + found.height - y - h), abs(found.x + found.width - x - w))

def test_black_borders_are_found_to_two_pixels(made):
    wrong = {str(item): error for item in made("borders") if (error := box_error(item)) > 2}
    for name, error in wrong.items(): print(f"X {error} px  {name}")
    assert not wrong

def test_motion_orders_known_speeds(made):
    for group in made("motions"):
        rho = spearmanr([i.truth["speed"] for i in group], scores := [longest(i).motion for i in group]).statistic
        print(f"{group[0].kind}: Spearman {rho:.3f}, scores {np.round(scores, 2)}")
        assert rho >= 0.95

def technical_verdict(item) -> str | None:
    try: return next(iter(technical_faults(probe(item.path))), None)
    except VideoError as error: return error.reason

def test_every_technical_defect_is_found_and_none_invented(made):
    wrong = {str(item): (said, item.truth["reason"]) for item in made("technicals") if (said := technical_verdict(item)) != item.truth["reason"]}
    for name, (said, true) in wrong.items(): print(f"X said {said}, is {true}  {name}")
    assert not wrong

if __name__ == "__main__":
    import tempfile
    name, seed, held_out = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
    with tempfile.TemporaryDirectory() as folder:
        items = getattr(material, name)(Path(folder), seed, held_out)
        if name == "cuts":
            for item in items: print(*cut_errors(item), item)
        elif name == "borders":
            for item in items: print(f"{box_error(item):5} px", longest(item).box, item.truth["box"], item)
        elif name == "technicals":
            for item in items: print(f"{technical_verdict(item)!s:10} {item.truth['reason']!s:10} {item}")
        else:
            for item in (i for group in (items if name == "motions" else [items]) for i in group):
                t = longest(item)
                print(f"{'yes' if item.label else 'no ':4} motion {t.motion:6.2f}  variance {t.sharpness:7.1f}  blurry {t.blurry!s:5}  content {t.content:6.2f}  shake {t.shake:6.2f}  {item}")
