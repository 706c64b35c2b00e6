"The pyramid: verdicts are the thresholds', levels only get stricter, and a table of levels is either right or one line."
from dataclasses import fields, replace
import polars as pl, pytest
from hypothesis import given, settings, strategies as st
from opensora_nb.cluster.files import UserError
from opensora_nb.data.manifest import COLUMNS, REASONS, manifest_frame, read_manifest, read_release_table
from opensora_nb.data.pyramid import (LEVELS, RULES, Level, assign_levels, check_levels, export_level, faults, pyramid_counts, pyramid_figure, read_levels, score_figure, unmeasured, write_levels)

GOOD = dict(status="kept", source="a.mp4", path="clips/a.mp4", duration_s=4.0, fps=24.0, num_frames=96, height=720, width=1280, aspect_ratio=0.5625, score_vmafmotion=4.0, score_blur=200.0,
            blurry=False, score_ocr=0.0, score_jitter=10.0, score_shake=0.5, score_aesthetic=5.5)
BAD = dict(still=dict(score_vmafmotion=0.1), frantic=dict(score_vmafmotion=40.0), blur=dict(blurry=True), text=dict(score_ocr=0.4), jitter=dict(score_shake=30.0), aesthetic=dict(score_aesthetic=2.0))

def rows(*changes): return manifest_frame([dict(GOOD, clip_id=f"c{k:04d}", **c) if not set(c) & set(GOOD) else {**GOOD, "clip_id": f"c{k:04d}", **c} for k, c in enumerate(changes)])

def test_broken_footage_has_its_word_as_reason():
    graded = assign_levels(rows({}, *BAD.values(), dict(score_jitter=200.0)))
    assert graded["reason"].to_list() == [None, *BAD, "jitter"] and graded["level"].to_list() == [2] + [None] * 7 and set(graded["status"]) == {"kept", "rejected"}
    assert manifest_frame(graded).equals(graded), "still a valid manifest"

def test_limits_belong_to_the_good_side():
    level = Level("x", min_duration_s=2, min_side=64, min_pixels=64 * 64, min_motion=1, max_motion=2, min_sharpness=9, max_text=0.1, max_jitter=5, max_shake=3, min_aesthetic=4)
    edge = dict(duration_s=2.0, height=64, width=64, score_blur=9.0, score_ocr=0.1, score_jitter=5.0, score_shake=3.0, score_aesthetic=4.0)
    assert rows({**edge, "score_vmafmotion": 1.0}, {**edge, "score_vmafmotion": 2.0}).select(faults(level))["faults"].to_list() == [[], []]
    over = dict(duration_s=1.99, height=63, score_blur=8.9, score_ocr=0.11, score_jitter=5.1, score_shake=3.1, score_aesthetic=3.9, score_vmafmotion=2.1)
    words = dict(duration_s="duration", height="size", score_blur="blur", score_ocr="text", score_jitter="jitter", score_shake="jitter", score_aesthetic="aesthetic", score_vmafmotion="frantic")
    for column, value in over.items(): assert rows({**edge, "score_vmafmotion": 1.5, column: value}).select(faults(level))["faults"].to_list() == [[words[column]]], column

def test_what_was_not_measured_is_no_fault():
    nothing = {c: None for c in GOOD if c.startswith("score") or c in ("blurry", "duration_s", "fps")}
    graded = assign_levels(rows({**nothing, "num_frames": 1}, dict(score_aesthetic=float("nan"), score_vmafmotion=float("nan"))))
    assert graded["level"].to_list() == [2, 2]

def test_rows_that_were_decided_before_stay_as_they_are():
    before = manifest_frame([dict(clip_id="a", status="failed", reason="broken"), dict(GOOD, **{"clip_id": "b", "status": "rejected", "reason": "duplicate", "duplicate_of": "d", "score_aesthetic": 1.0}),
                             dict(clip_id="c", status="rejected", reason="shot"), dict(GOOD, clip_id="d")])
    after = assign_levels(before)
    assert after[:3].equals(before[:3]) and after["level"].to_list() == [None, None, None, 2] and assign_levels(after).equals(after)

def test_images_with_small_sides_stay_on_the_ground():
    assert assign_levels(rows(dict(height=300, width=900), dict(height=512, width=512), dict(height=511)))["level"].to_list() == [1, 2, 1]

score = st.one_of(st.none(), st.floats(0, 100))
@settings(max_examples=40, deadline=None)
@given(st.lists(st.fixed_dictionaries({c: score for c in GOOD if c.startswith("score")} | dict(blurry=st.one_of(st.none(), st.booleans()), height=st.integers(16, 2000))), min_size=1, max_size=30),
       st.lists(st.floats(0, 60), min_size=3, max_size=3).map(sorted), st.booleans())
def test_the_level_is_the_highest_that_is_passed(changes, limits, blurry):
    levels = [Level(f"l{k}", min_aesthetic=low, max_jitter=99 - low, max_text=60 - low, allow_blurry=blurry) for k, low in enumerate(limits)]
    frame = rows(*changes)
    graded = assign_levels(frame.lazy(), levels).collect()
    passes = [[not words for words in frame.select(faults(level))["faults"].to_list()] for level in levels]
    for k, row in enumerate(graded.iter_rows(named=True)):
        own = [p[k] for p in passes]
        assert own == sorted(own, reverse=True), "levels are nested"
        assert (row["level"] or 0) == sum(own) and (row["status"] == "kept") == own[0] and (row["reason"] is None) == own[0]
        if not own[0]: assert row["reason"] == frame.select(faults(levels[0]))["faults"][k][0] and row["reason"] in REASONS
    counts = [c for _, c, _ in pyramid_counts(graded, levels)]
    assert counts == sorted(counts, reverse=True) and counts[0] == len(changes)

def test_faults_are_those_of_plain_python():
    import random
    rng, level = random.Random(0), LEVELS[1]
    changes = [dict(score_vmafmotion=rng.uniform(0, 25), score_ocr=rng.uniform(0, 0.1), blurry=rng.random() < 0.3, score_shake=rng.uniform(0, 10), score_jitter=rng.uniform(0, 90), score_aesthetic=rng.uniform(3, 7), height=rng.choice([480, 720])) for _ in range(300)]
    def words(c):
        checks = dict(size=c["height"] < level.min_side, still=c["score_vmafmotion"] < level.min_motion, frantic=c["score_vmafmotion"] > level.max_motion, blur=c["blurry"], text=c["score_ocr"] > level.max_text,
                      jitter=c["score_jitter"] > level.max_jitter or c["score_shake"] > level.max_shake, aesthetic=c["score_aesthetic"] < level.min_aesthetic)
        return [word for word, bad in checks.items() if bad]
    assert rows(*changes).select(faults(level))["faults"].to_list() == [words(c) for c in changes]

@pytest.mark.parametrize("field", RULES)
def test_a_looser_level_after_a_stricter_one_names_the_field(field):
    strict, loose = (False, True) if field == "allow_blurry" else (5, 4) if field.startswith("min") else (4, 5)
    check_levels([Level("a", **{field: loose}), Level("b", **{field: strict})])
    check_levels([Level("a"), Level("b", **{field: strict})])
    wrong = [loose] if field == "allow_blurry" else [loose, None]
    for value in wrong:
        with pytest.raises(ValueError, match=f"b is looser than a in {field}"): assign_levels(rows({}), [Level("a", **{field: strict}), Level("b", **{field: value})])

def test_the_report_s_two_levels_are_a_pyramid():
    check_levels(LEVELS)
    assert [level.name for level in LEVELS] == ["256px", "768px"] and {column for column, _ in RULES.values()} - {"side", "pixels"} <= set(COLUMNS)

def test_levels_survive_the_table(tmp_path):
    full = (Level("a, \"quoted\"", allow_blurry=True), Level("b", 2.5, 256, 90000, 0.5, 20.0, False, 30.0, 0.05, 60.0, 8.0, 4.0))
    for levels in (LEVELS, full, (Level("only"),)):
        write_levels(levels, tmp_path / "l.csv")
        assert read_levels(tmp_path / "l.csv") == levels

def test_a_table_from_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "l.csv").write_bytes("\ufeffname, max_text ,allow_blurry\r\n small , 0.05 ,TRUE\r\nlarge,1e-2,False\r\n".encode())
    assert read_levels(tmp_path / "l.csv") == (Level("small", max_text=0.05), Level("large", max_text=0.01, allow_blurry=False))

@pytest.mark.parametrize("text,word", [("", "cannot be read"), ("name\n", "at least one level"), ("name,min_beauty\na,3\n", "unknown column 'min_beauty'"), ("name,min_side\na,tall\n", "row 1, min_side: 'tall'"), ("min_side\n3\n", "column name"),
    ("name,min_side\na,-3\n", "min_side must be"), ("name,min_side\na,nan\n", "min_side must be"), ("name,min_side\na,inf\n", "min_side must be"), ("name,min_side\na,512\nb,256\n", "looser than a in min_side"), ("name,min_side\na,512\na,513\n", "same name"),
    ("name,min_side\n,3\n", "name ''"), ("name\n../x\n", "cannot be the name"), ("name,allow_blurry\na,perhaps\n", "not true or false"), ("name,min_motion,max_motion\na,3,2\n", "no motion is between"), ("name,min_side\na,1,2,3\n", "cannot be read")])
def test_a_wrong_table_is_one_line(tmp_path, text, word):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UserError, match=word) as error: read_levels(tmp_path / "l.csv")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match="no such table of levels"): read_levels(tmp_path / "nowhere.csv")

def test_bytes_are_no_table_of_levels(tmp_path):
    (tmp_path / "l.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError): read_levels(tmp_path / "l.csv")

def test_an_exported_level_is_a_manifest_and_a_release_table(tmp_path):
    graded = assign_levels(rows({}, dict(score_aesthetic=4.2, text='say "a,\nb"'), dict(score_ocr=0.9), dict(num_frames=1, duration_s=None, fps=None, score_vmafmotion=None)))
    assert graded["level"].to_list() == [2, 1, None, 2]
    for number, ids in ((1, ["c0000", "c0001", "c0003"]), (2, ["c0000", "c0003"])):
        full, flat = export_level(graded, number, tmp_path / "out", root="../curated/")
        assert full.name == f"{LEVELS[number - 1].name}.parquet" and flat.name == f"{LEVELS[number - 1].name}.csv"
        assert read_manifest(full)["clip_id"].to_list() == ids and set(read_manifest(full)["path"]) == {"../curated/clips/a.mp4"}
        back = read_release_table(flat)
        assert back["text"].to_list() == read_manifest(full)["text"].to_list() and back["path"].to_list() == read_manifest(full)["path"].to_list()
    assert read_manifest(export_level(graded.filter(level=99), 2, tmp_path)[0]).height == 0
    for wrong in (0, 3):
        with pytest.raises(ValueError): export_level(graded, wrong, tmp_path)

def test_thresholds_without_scores_are_said():
    assert unmeasured(rows({}, {})) == [] and unmeasured(rows()) == []
    assert unmeasured(rows(*[dict(score_ocr=None, score_shake=None)] * 3)) == ["max_text", "max_shake"]
    assert unmeasured(rows(dict(score_ocr=None), {})) == [], "one is enough"
    assert unmeasured(assign_levels(rows(*[dict(score_ocr=None, score_aesthetic=1.0)] * 3))) == ["max_text"], "also when all were rejected"

def test_layers_hold_clips_and_not_files():
    graded = pl.concat([assign_levels(rows({}, dict(score_aesthetic=1.0))), manifest_frame([dict(clip_id="x", status="rejected", reason="duration"), dict(clip_id="y", status="rejected", reason="size"), dict(clip_id="z", status="failed", reason="broken"),
                                                                                             dict(clip_id="s", status="rejected", reason="shot"), dict(clip_id="d", status="rejected", reason="duplicate")])])
    assert [c for _, c, _ in pyramid_counts(graded)] == [3, 2, 1, 1] and pyramid_counts(graded)[2][2] == pytest.approx(4 / 3600)

def test_pictures_of_anything():
    import matplotlib; matplotlib.use("Agg")
    for frame in (rows(), rows({}), rows(*[dict(score_ocr=None)] * 3)):
        for figure in (pyramid_figure, score_figure): assert figure(assign_levels(frame)).axes
    matplotlib.pyplot.close("all")
