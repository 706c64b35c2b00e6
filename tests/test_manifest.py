"The manifest: what is written comes back, other people's tables are read as they are, and faults are one line."
import os, subprocess, sys
import polars as pl, pytest
from hypothesis import given, settings, strategies as st
from opensora_nb.cluster.files import UserError
from opensora_nb.data.manifest import (COLUMNS, REASONS, RELEASE_COLUMNS, manifest_frame, printable, read_clips, read_manifest, read_release_table, stream_manifest,
                                       write_manifest, write_release_table)

def clip(k=0, **more):
    return dict(clip_id=f"c-{k:06d}", path=f"clips/c-{k:06d}.mp4", source="film.mp4", duration_s=4.0, fps=24.0, num_frames=96, height=144, width=256, aspect_ratio=0.5625,
                score_vmafmotion=3.2, status="kept", **more)

nasty = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)          # quotes, commas, newlines, NUL, blanks

@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.none() | nasty, min_size=1, max_size=8), names=st.data())
def test_any_text_survives_both_tables(texts, names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    paths = [f"clips/{names.draw(nasty.filter(lambda s: '/' not in s))}" for _ in texts]
    frame = manifest_frame([dict(clip(k), text=t, path=p) for k, (t, p) in enumerate(zip(texts, paths))])
    for name in ("train.csv", "train.parquet"):
        write_release_table(frame, folder / name)
        back = read_release_table(folder / name)
        assert back["text"].to_list() == texts and back["path"].to_list() == paths and back["num_frames"].to_list() == [96] * len(texts)

@given(st.text(st.characters(exclude_categories=[])))
def test_printable_is_unicode_and_changes_nothing_else(name):
    shown = printable(name)
    assert shown.encode() is not None and printable(shown) == shown
    if not any(0xD800 <= ord(c) < 0xE000 for c in name): assert shown == name

def test_a_name_that_is_no_text_can_be_stored(tmp_path):
    for raw in (b"\xff\xfe.mp4", b"caf\xe9.mp4", b"\xed\xa0\x80"):
        name = os.fsdecode(raw)
        with pytest.raises(UnicodeEncodeError): name.encode()
        write_manifest([dict(clip(), source=printable(name))], tmp_path / "manifest.parquet")
        assert read_manifest(tmp_path)["source"][0] == printable(name)

def test_rows_and_frames_are_checked_alike():
    rows = [clip(k) for k in range(3)] + [dict(clip_id="gone", source="x", status="failed", reason="empty")]
    assert manifest_frame(pl.DataFrame(rows)).equals(manifest_frame(rows)) and manifest_frame(pl.DataFrame(rows)).columns == list(COLUMNS)
    assert manifest_frame(manifest_frame(rows)).equals(manifest_frame(rows)) and manifest_frame(pl.DataFrame()).height == 0
    for wrong in (dict(colour="red"), dict(status="lost"), dict(status=None), dict(reason="ugly"), dict(reason="still"), dict(status="failed"), dict(clip_id="c-000001"), dict(clip_id=None), dict(height="tall")):
        for form in (list, pl.DataFrame):
            with pytest.raises(ValueError): manifest_frame(form([{**rows[0], **wrong}, rows[1]]))

def test_every_reason_has_a_sentence():
    assert all(word.isalpha() and word.islower() and sentence for word, sentence in REASONS.items())

def test_a_stream_is_the_same_manifest_whatever_the_batch(tmp_path):
    rows = [clip(k) for k in range(57)]
    for batch in (1, 7, 57, 1000):
        assert stream_manifest(iter(rows), tmp_path / "m.parquet", batch) == 57
        assert pl.read_parquet(tmp_path / "m.parquet").equals(manifest_frame(rows))
    with pytest.raises(ValueError, match="unique: c-000003"): stream_manifest(iter([*rows, rows[3]]), tmp_path / "m.parquet", 10)
    def broken():
        yield from rows
        raise OSError("no more")
    with pytest.raises(OSError): stream_manifest(broken(), tmp_path / "m.parquet", 10)
    assert [f.name for f in tmp_path.iterdir()] == ["m.parquet"] and read_manifest(tmp_path / "m.parquet").height == 57, "the old one stays, no litter"

@pytest.mark.slow
def test_memory_of_a_stream_does_not_grow_with_its_rows(tmp_path):
    code = """
import sys, resource
from opensora_nb.data.manifest import stream_manifest
def rows(n):
    for k in range(n): yield dict(clip_id=f"c-{k:09d}", path=f"clips/c-{k:09d}.mp4", source=f"film-{k // 9}.mp4", text=f"{k} " * 40, status="kept", num_frames=96, height=k % 1080, width=1920)
assert stream_manifest(rows(int(sys.argv[1])), sys.argv[2]) == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    few, many = (float(subprocess.run([sys.executable, "-c", code, str(n), str(tmp_path / "m.parquet")], capture_output=True, text=True, check=True).stdout) for n in (40_000, 400_000))
    assert many - few < 150, f"{few:.0f} MB for 40,000 rows, {many:.0f} MB for 400,000"       # as a frame they are 130 MB, as dicts 500 MB

def table(folder, text, name="t.csv"):
    (folder / name).write_text(text)
    return folder / name

def test_the_releases_own_csv_is_read_unchanged(tmp_path):
    back = read_release_table(table(tmp_path, 'path,text,num_frames,height,width,aspect_ratio,resolution,fps\n/a/b.mp4,"A man, ""hello""",129,720,1280,0.5625,921600,23.976\n'))
    row = back.row(0, named=True)
    assert (row["path"], row["text"], row["num_frames"], row["fps"], row["status"]) == ("/a/b.mp4", 'A man, "hello"', 129, 23.976, "kept") and row["duration_s"] == pytest.approx(129 / 23.976)

@pytest.mark.parametrize("frames,fps", [("1", "120"), ("1", ""), ("1.0", "120.0"), ("1", "nan"), ("1", "0")])
def test_images_have_neither_rate_nor_duration(tmp_path, frames, fps):
    row = read_release_table(table(tmp_path, f"path,text,num_frames,height,width,aspect_ratio,resolution,fps\na.jpg,,{frames},64,32,2,2048,{fps}\n")).row(0, named=True)
    assert (row["num_frames"], row["fps"], row["duration_s"], row["text"], row["status"], row["aspect_ratio"]) == (1, None, None, None, "kept", 2)

def test_columns_may_be_missing_or_unknown(tmp_path):
    back = read_release_table(table(tmp_path, "unknown,path,num_frames,height,width,clip_id,status,level,blurry,score_ocr\nx,a.mp4,9,64,128,mine,odd,7,True,0.25\n"))
    row = back.row(0, named=True)
    assert row["clip_id"] == "row-000000" and row["status"] == "kept" and row["level"] is None and row["aspect_ratio"] == 0.5 and row["fps"] is None and row["blurry"] and row["score_ocr"] == 0.25

@pytest.mark.parametrize("row,status", [("a.mp4,0,0,0,,,0", "failed"), ("a.mp4,,,,,,", "failed"), ("a.mp4,9,inf,64,1,1,24", "failed"), ("a.mp4,-3,64,64,1,1,24", "failed"), ("a.mp4,1e30,64,64,1,1,24", "failed"), ("a.mp4,9,64,64,1,1,", "kept")])
def test_files_that_the_release_could_not_read_are_not_trained_on(tmp_path, row, status):
    back = read_release_table(table(tmp_path, f"path,num_frames,height,width,aspect_ratio,resolution,fps\n{row}\n"))
    assert back["status"].to_list() == [status] and back["reason"].to_list() == [None if status == "kept" else "unreadable"]

@pytest.mark.parametrize("text,word", [("path,num_frames,height\na,1,2\n", "no column width"), ("path,num_frames,height,width\n,1,2,3\n", "row 1 has no path"), ("path,num_frames,height,width\na,1,2,3\nb,1,x,3\n", "row 2, column height: 'x'"),
                                      ("", "not a table"), ("path,num_frames,height,width\na,1,2,3,4,5\n", "not a table"), ("path,num_frames,height,width,blurry\na,1,2,3,maybe\n", "truth value")])
def test_a_wrong_table_is_one_line(tmp_path, text, word):
    with pytest.raises(UserError, match=word) as error: read_release_table(table(tmp_path, text))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError): read_release_table(tmp_path / "nowhere.csv")

def test_bytes_that_are_no_table_are_one_line(tmp_path):
    for name in ("x.csv", "x.parquet"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 9)
        for read in (read_release_table, read_clips):
            with pytest.raises(UserError) as error: read(tmp_path / name)
            assert "\n" not in str(error.value)

def test_a_parquet_with_odd_types_is_one_line(tmp_path):
    pl.DataFrame(dict(path=["a"], num_frames=[[1, 2]], height=[1], width=[1])).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="num_frames"): read_release_table(tmp_path / "x.parquet")

def test_rejected_rows_and_images_in_a_release_table(tmp_path):
    frame = manifest_frame([clip(0), dict(clip(1), status="rejected", reason="still"), dict(clip(2), num_frames=1, fps=None, duration_s=None, score_vmafmotion=None)])
    out = write_release_table(frame, tmp_path / "t.csv", root="data/")
    assert out.columns == [*RELEASE_COLUMNS, "score_vmafmotion"] and out["path"].to_list() == ["data/clips/c-000000.mp4", "data/clips/c-000002.mp4"]
    assert read_release_table(tmp_path / "t.csv")["score_vmafmotion"].to_list() == [3.2, None]
    assert "score_vmafmotion" not in write_release_table(frame.with_columns(score_vmafmotion=None), tmp_path / "t.parquet").columns
    with pytest.raises(UserError): write_release_table(frame, tmp_path / "t.xlsx")

def kept_paths(*args, **more): return read_clips(*args, **more).filter(pl.col("status") == "kept")["path"].to_list()

def test_clips_open_from_anywhere_whatever_lists_them(tmp_path, monkeypatch):
    curated = tmp_path / "curated"
    frame = write_manifest([clip(0), dict(clip(1), status="rejected", reason="still", path=None)], curated / "manifest.parquet")
    (curated / "clips").mkdir(); (curated / "clips" / "c-000000.mp4").touch()
    write_release_table(frame, curated / "t.csv"); write_release_table(frame, curated / "t.parquet"); write_release_table(frame, tmp_path / "else" / "abs.csv", root=curated); write_release_table(frame, tmp_path / "else" / "cwd.csv")
    wanted = [str(curated / "clips" / "c-000000.mp4")]
    for what in ("", "manifest.parquet", "t.csv", "t.parquet", "../else/abs.csv"): assert kept_paths(curated / what) == wanted
    with pytest.raises(UserError, match="no clip exists"): read_clips(tmp_path / "else" / "cwd.csv")
    assert kept_paths(tmp_path / "else" / "cwd.csv", root=curated) == wanted
    monkeypatch.chdir(curated)
    for what in (".", "t.csv", "../else/cwd.csv"): assert kept_paths(what) == wanted

def test_a_few_lost_files_do_not_stop_training(tmp_path):
    write_manifest([clip(k) for k in range(500)], tmp_path / "manifest.parquet")
    (tmp_path / "clips").mkdir()
    for k in range(400): (tmp_path / "clips" / f"c-{k:06d}.mp4").touch()
    assert len(kept_paths(tmp_path)) == 500

def test_nothing_to_train_on_is_one_line(tmp_path):
    write_manifest([dict(clip(), status="rejected", reason="still")], tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="nothing in it is kept"): read_clips(tmp_path)
    write_manifest([dict(clip(), path=None)], tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="1 of 1 kept rows have no path"): read_clips(tmp_path)
    for wrong in (tmp_path / "nowhere", table(tmp_path, "x", "x.txt")):
        with pytest.raises(UserError): read_clips(wrong)

def test_an_older_manifest_is_read(tmp_path):
    write_manifest([clip()], tmp_path / "manifest.parquet").drop("score_shake", "duplicate_of").write_parquet(tmp_path / "manifest.parquet")
    assert read_manifest(tmp_path).equals(manifest_frame([clip()]))
    manifest_frame([clip()]).drop("reason").write_parquet(tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="no column reason"): read_manifest(tmp_path)
