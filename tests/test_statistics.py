"Statistics: the same numbers as numpy's, from any table, in the memory of a piece of it."
import math, random
import numpy as np, polars as pl, pytest

from opensora_nb.cluster.files import UserError
from opensora_nb.data import statistics
from opensora_nb.data.manifest import write_manifest
from opensora_nb.data.statistics import (PANELS, Panel, bench_statistics, clip_pieces, clip_statistics, compare_claims, count_words, made_manifest, sample_captions, scan_clips, statistics_figure, word_cloud_figure, word_counts)


def table(rows=5000, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(dict(path=[f"c{k}.mp4" for k in range(rows)], num_frames=rng.integers(1, 400, rows), height=rng.integers(100, 2000, rows), width=rng.integers(100, 2000, rows), fps=rng.choice([24.0, 30.0], rows),
                             score_aesthetic=rng.normal(5, 1.5, rows), text=[" ".join(["word"] * n) for n in rng.integers(0, 260, rows)]))

def words_on(figure): return [t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title)]
def drawn(figure): figure.canvas.draw(); return figure


# ---- the numbers ----
@pytest.mark.parametrize("kind", ["frame", "lazy", "parquet", "csv"])
def test_histograms_are_numpys_whatever_the_table_is(tmp_path, kind):
    frame = table()
    if kind == "csv": frame.write_csv(tmp_path / "t.csv")
    if kind == "parquet": frame.write_parquet(tmp_path / "t.parquet", row_group_size=700)
    found = clip_statistics({"frame": frame, "lazy": frame.lazy(), "csv": tmp_path / "t.csv", "parquet": str(tmp_path / "t.parquet")}[kind])
    known = dict(aesthetic=frame["score_aesthetic"], duration=frame["num_frames"] / frame["fps"], aspect=frame["height"] / frame["width"], words=frame["text"].str.count_matches("word").replace(0, None).drop_nulls())
    for p in PANELS:
        values, h = known[p.name].to_numpy(), found[p.name]
        assert h.counts.tolist() == np.histogram(values, [-np.inf, *np.nextafter(p.edges, -np.inf), np.inf])[0].tolist() and h.known == len(values) == h.counts.sum() and h.rows == 5000
        assert (h.low, h.high) == (values.min(), values.max()) and math.isclose(h.mean, values.mean(), rel_tol=1e-9) and h.share() == 1
    assert math.isclose(found["aesthetic"].share(4.5, 5.5), ((known["aesthetic"] >= 4.5) & (known["aesthetic"] < 5.5)).mean())
    with pytest.raises(ValueError, match="edges"): found["aesthetic"].share(4.6, 5)

def test_pieces_of_a_large_table_add_up(tmp_path):
    rng, rows = np.random.default_rng(2), 1_200_001
    frame = pl.DataFrame(dict(row=pl.int_range(rows, eager=True).cast(pl.String), score_aesthetic=rng.normal(5, 1.5, rows), status=rng.choice(["kept", "rejected"], rows))).with_columns(text=pl.when(pl.int_range(pl.len()) % 3 != 0).then("row"))
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=70_000)
    kept, h = frame.filter(pl.col("status") == "kept"), clip_statistics(tmp_path / "t.parquet")["aesthetic"]
    assert len(clip_pieces(tmp_path / "t.parquet")) == 3 and h.rows == kept.height and math.isclose(h.mean, kept["score_aesthetic"].mean()) and (h.low, h.high) == (kept["score_aesthetic"].min(), kept["score_aesthetic"].max())
    assert h.counts.tolist() == np.histogram(kept["score_aesthetic"], [-np.inf, *np.nextafter(h.panel.edges, -np.inf), np.inf])[0].tolist()
    texts = kept["text"].drop_nulls()
    assert sample_captions(tmp_path / "t.parquet", 1000, seed=1).equals(sample_captions(pl.DataFrame(dict(text=texts)), 1000, seed=1), check_names=False) and sample_captions(tmp_path / "t.parquet", 10**7).equals(texts, check_names=False)

def test_cells_that_are_no_numbers_are_missing_and_counted(tmp_path):
    (tmp_path / "t.csv").write_text("path,num_frames,height,width,fps,score_aesthetic,text\na,48,10,20,24,5.1,one two\nb,x,10,0,24,n/a,\nc,48,-3,20,0,nan,  \nd,,10,,inf,inf,雪だ\ne,1,10,10,, 6.0 ,a\n")
    found = clip_statistics(tmp_path / "t.csv")
    assert {name: h.known for name, h in found.items()} == dict(aesthetic=2, duration=1, aspect=2, words=3) and all(h.rows == 5 for h in found.values())
    assert found["aesthetic"].high == 6.0 and found["words"].mean == pytest.approx((2 + 2 + 1) / 3)

def test_of_a_manifest_only_kept_rows_count(tmp_path):
    write_manifest([dict(clip_id="a", path="a.mp4", status="kept", duration_s=3.0, text="two words"), dict(clip_id="b", status="rejected", reason="blur", duration_s=9.0), dict(clip_id="c", status="failed", reason="broken")], tmp_path / "manifest.parquet")
    for source in (tmp_path, tmp_path / "manifest.parquet"):
        found = clip_statistics(source)
        assert found["duration"].rows == 1 and found["duration"].high == 3 and found["aesthetic"].column and not found["aesthetic"].known

def test_words_are_what_stands_between_spaces_or_a_character_where_there_are_none():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(["a", "é", "ж", " ", "\n", "\t", "\u3000", ",", "🧑‍🚀", "雪", "の", "カ", "ไ"], k=rng.randrange(30)))
        plain = "".join(f" {c} " if c in "雪のカไ" else c for c in text)
        assert pl.select(count_words(pl.lit(text))).item() == (len(plain.split()) or None), ascii(text)

def test_a_panel_of_ones_own_is_counted_like_the_others():
    motion = Panel("motion", "motion", "grey levels", (0.0, 1.0, 2.0), lambda c: pl.col("score_vmafmotion"), "not measured")
    h = clip_statistics(pl.DataFrame(dict(score_vmafmotion=[-1.0, 0.0, 0.5, 1.0, 7.0, None])), (motion,))["motion"]
    assert h.counts.tolist() == [1, 2, 1, 1] and h.known == 5 and h.share(0.0, 1.0) == 0.4

def test_the_reports_claims_are_null_where_nothing_is_known():
    assert compare_claims(clip_statistics(table().drop("score_aesthetic")))["here"].is_null().to_list() == [True, False, False, False, False]


# ---- the figures ----
def test_a_panel_says_what_is_missing():
    said = words_on(drawn(statistics_figure(table().drop("text").with_columns(score_aesthetic=pl.lit(None, pl.Float64)))))
    assert "5,000 of 5,000 clips not scored" in said and "the table has no column for it" in said
    said = words_on(drawn(statistics_figure(table().with_columns(score_aesthetic=pl.when(pl.int_range(pl.len()) % 4 == 0).then(4.0)))))
    assert any("75% not scored" in t for t in said)
    assert "the table is empty" in words_on(drawn(statistics_figure(table().head(0))))

@pytest.mark.parametrize("rows", [0, 1, 2, 50])
def test_figures_can_be_drawn_of_anything(rows):
    for frame in (table(rows), table(rows).with_columns(score_aesthetic=pl.lit(1e300), num_frames=pl.lit(10**12), text=pl.lit("$x^$ \\frac{ 雪 <b>&amp;")), pl.DataFrame(dict(path=["a"] * rows), schema=dict(path=pl.String))):
        drawn(statistics_figure(frame, r"hostile $\frac{ title")); drawn(word_cloud_figure(frame, max_words=5))

def test_figures_are_none_of_pyplots():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    statistics_figure(table(10)); word_cloud_figure(table(10))
    assert plt.get_fignums() == before


# ---- words ----
def test_the_sample_is_spread_over_the_whole_table():
    frame = pl.DataFrame(dict(text=[f"word{k}" for k in range(10_007)])).with_columns(text=pl.when(pl.int_range(pl.len()) % 3 != 0).then("text"))
    numbers = sample_captions(frame, 500, seed=1).str.slice(4).cast(pl.Int64)
    assert 450 < len(numbers) <= 500 and numbers.is_sorted() and np.ptp(np.bincount(numbers // 1001, minlength=10)[:10]) <= 3
    assert sample_captions(frame, 500, seed=1).equals(sample_captions(frame, 500, seed=1)) and len(sample_captions(frame, 10**6)) == 6671
    assert len(sample_captions(pl.DataFrame(dict(path=["a"])))) == 0

def test_words_are_counted_without_small_ones_and_suffix(monkeypatch):
    texts = pl.Series(["The dog's Dog and a DOG. 24 FPS, 4 motion score.", "A dog. 30 FPS. 12 motion score.", "naïve собака, état-major", None, "", "雪 12 34 x"])
    assert word_counts(texts) == {"dog": 3, "dog's": 1, "naïve": 1, "état-major": 1, "собака": 1}
    many = pl.concat([texts] * 9000)
    assert word_counts(many) == {w: 9000 * n for w, n in word_counts(texts).items()}                # pieces add up

def test_words_that_a_font_does_not_have_are_left_out_and_counted(tmp_path):
    assert any("cannot be drawn" in t and "3 words" in t for t in words_on(drawn(word_cloud_figure(pl.DataFrame(dict(text=["dog ball 小狗走"]))))))
    assert "no word can be drawn in this font" in words_on(drawn(word_cloud_figure(pl.DataFrame(dict(text=["小狗走"])))))
    (tmp_path / "font.ttf").write_text("no font")
    for font, said in ((tmp_path / "font.ttf", "no font"), (tmp_path / "gone.ttf", "no such font")):
        with pytest.raises(UserError, match=said): word_cloud_figure(table(3), font=font)


# ---- what cannot be read ----
def test_what_is_no_table_is_said_in_one_line(tmp_path):
    (tmp_path / "t.parquet").write_text("no table"); (tmp_path / "t.txt").write_text("x"); (tmp_path / "empty.csv").touch(); (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 9)
    write_manifest([dict(clip_id="a", status="kept")], tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    for name in ("t.parquet", "t.txt", "empty.csv", "binary.csv", "cut.parquet", "gone.csv", "."):
        for work in (clip_statistics, sample_captions):
            try: work(tmp_path / name)
            except UserError as error: assert "\n" not in str(error) and (name == "." or name in str(error))
            else: assert name == "binary.csv"                                   # a table without a column that we know
    with pytest.raises(pl.exceptions.ColumnNotFoundError): clip_statistics(pl.LazyFrame(dict(a=[1])).select("b"))     # the caller's own mistake

def test_missing_packages_are_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "wordcloud", None)
    with pytest.raises(UserError, match="pip install"): word_cloud_figure(table(3))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(UserError, match="pip install"): statistics_figure(table(3))


# ---- size ----
def test_a_made_manifest_is_a_manifest_and_the_same_again(tmp_path):
    made = pl.read_parquet(made_manifest(tmp_path / "m.parquet", 2500, seed=1, piece=1000))
    assert made.height == 2500 and made["clip_id"].n_unique() == 2500 and made.equals(pl.read_parquet(made_manifest(tmp_path / "n.parquet", 2500, seed=1, piece=1000)))
    assert write_manifest(made, tmp_path / "checked.parquet").height == 2500 and [p.name for p in tmp_path.glob(".*")] == []
    found = clip_statistics(tmp_path / "m.parquet")
    assert 0.55 < found["aesthetic"].share(4.5, 5.5) < 0.8 and found["words"].share(76) > 0.6 and scan_clips(tmp_path / "m.parquet").select(pl.len()).collect().item() == 2500

@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):
    "The larger table holds 216 MB of captions more; what it takes more is less than they are (allocators keep what they had)."
    small, large = (bench_statistics(rows, tmp_path, sample=5000, piece=10_000) for rows in (100_000, 500_000))
    assert large["peak_mb"] - small["peak_mb"] < 190 and large["peak_mb"] < 2000 and not list(tmp_path.iterdir())
