"`osnb evaluate ae`: its figures are scikit-image's on the clips named, what cannot be read or measured is named and not averaged, and what can be mended is one line."
import csv, json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import cv2, numpy as np, pytest, torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.autoencoder.hunyuan import HunyuanVAE, pocket as hunyuan_pocket
from opensora_nb.autoencoder.losses import PerceptualLoss
from opensora_nb.autoencoder.metrics import lpips_distance, to_uint8
from opensora_nb.cluster.weights import shipped
from opensora_nb.commands.cli import main
from opensora_nb.data.cache import ClipCache
from opensora_nb.data.manifest import write_manifest
from opensora_nb.data.video import write_video
from opensora_nb.data.world import render, world_truth
from opensora_nb.evaluation.reconstruction import EvaluateConfig, error_map, file_clips, labels, open_clips, read_window, world_clips

TINY = replace(dc_ae.pocket(), latent_channels=4, enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "A folder with what a user may have: weights of several kinds, a clip cache, films good and bad."
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    VideoDCAE(TINY).save_pretrained(folder / "tiny/model")
    ruined = VideoDCAE(TINY); torch.nn.init.constant_(ruined.decoder.project_out.op_list[2].conv.bias, float("nan")); ruined.save_pretrained(folder / "ruined")
    clips = np.stack([render(world_truth(5, i), 64, 8)[:, :40] for i in range(3)])
    ClipCache(clips, [[""]] * 3, np.zeros(3, np.float32)).save(folder / "clips.safetensors")
    (folder / "films/more").mkdir(parents=True)
    for i, name in enumerate(("a.mp4", "more/b.mkv")): write_video(folder / "films" / name, render(world_truth(5, i), 96, 24), crf=5)
    write_video(folder / "films/short.mp4", render(world_truth(5, 0), 96, 4))
    (folder / "films/cut.mp4").write_bytes((folder / "films/a.mp4").read_bytes()[:3000]); (folder / "films/text.mp4").write_text("no film"); (folder / "films/notes.txt").write_text("no film")
    (folder / "broken").mkdir(); (folder / "broken/empty.mp4").write_bytes(b""); (folder / "nothing").mkdir(); (folder / "a-file").write_text("in the way"); (folder / "text.safetensors").write_text("no clips")
    (folder / "odd").mkdir(); (folder / "odd/config.json").write_bytes((folder / "ruined/config.json").read_bytes()); (folder / "odd/model.safetensors").write_bytes((shipped("autoencoder") / "model.safetensors").read_bytes())
    (folder / "mmdit").mkdir(); (folder / "mmdit/model.safetensors").write_bytes((shipped("mmdit") / "model.safetensors").read_bytes())
    return folder

def evaluated(*words, out): return main(["evaluate", "ae", *map(str, words), "--out", str(out), "--no-progress"])
def figures(out): return json.loads((out / "metrics.json").read_text())


# ---- the figures ----
@pytest.mark.slow
def test_the_table_is_what_scikit_image_says_of_these_clips(given, tmp_path):
    r = subprocess.run([sys.executable, "-m", "opensora_nb.commands.cli", "evaluate", "ae", "--models", "shipped", str(given / "tiny/model"), "--clips", str(given / "clips.safetensors"), "--out", "out", "--worst", "2"],
                       capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert r.returncode == 0 and "Traceback" not in r.stderr and "shipped" in r.stderr, r.stderr                 # a bar for each model
    out, clips, net = tmp_path / "out", ClipCache.load(given / "clips.safetensors").clips, PerceptualLoss()
    assert sorted(p.name for p in out.iterdir()) == ["metrics.csv", "metrics.json", "report.html", "worst-shipped.png", "worst-tiny.png"] and os.listdir(tmp_path) == ["out"]
    table = {row["name"]: row for row in csv.DictReader(open(out / "metrics.csv"))}
    assert [row["source"] for row in table.values()] == ["measured"] * 2 + ["report"] * 5
    for name, model in {"shipped": VideoDCAE.from_pretrained(shipped("autoencoder")), "tiny": VideoDCAE.from_pretrained(given / "tiny/model")}.items():
        video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.no_grad(): again = to_uint8(model(video))
        after, row = again.permute(0, 2, 3, 4, 1).numpy(), table[name]
        by_hand = dict(psnr=[peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(clips, after)],
                       ssim=[np.mean([structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1) for x, y in zip(a, b)]) for a, b in zip(clips, after)],
                       stand_in=lpips_distance(to_uint8(video), again, net).numpy())
        for column, values in by_hand.items(): assert abs(float(row[column]) - np.mean(values)) < (2e-3 if column == "psnr" else 1e-4), (name, column)
        assert row["lpips"] == "" and int(row["clips"]) == 3 and int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        scores = figures(out)["scores"][name]
        assert [s["clip"] for s in scores] == [f"clips-00{i}" for i in range(3)] and np.allclose([s["psnr"] for s in scores], by_hand["psnr"], atol=2e-3)
        worst = np.argsort(by_hand["psnr"])[:2]
        picture = cv2.imread(str(out / f"worst-{name}.png"))[..., ::-1]
        zoom = lambda frames: np.concatenate([f.repeat(4, 0).repeat(4, 1) for f in frames[[0, 1, 3, 4, 6, 7]]], 1)                     # 40 rows are shown as 160
        at = 44                                                                                                                  # below two lines of text
        assert (picture[at : at + 160] == zoom(clips[worst[0]])).all() and np.abs(picture[at + 160 : at + 320].astype(int) - zoom(after[worst[0]])).max() <= 1
        assert (picture[at + 320 : at + 480] == zoom(error_map(clips[worst[0]], after[worst[0]])))[:, :, :].mean() > 0.98 and (picture[at + 508 : at + 668] == zoom(clips[worst[1]])).all()
    assert (table["shipped"]["information"], table["tiny"]["information"], table["shipped"]["tokens"]) == ("48.0", "192.0", "1024")
    for text in (r.stdout, (out / "report.html").read_text()):
        assert all(word in text for word in ("shipped", "tiny", "EfficientNet distance", "report: HunyuanVideo VAE", f"{float(table['shipped']['psnr']):.2f}", "30.24", "0.046"))

def test_stand_in_and_lpips_never_share_a_column(given, tmp_path, capsys):
    from opensora_nb.autoencoder.losses import LPIPS
    from safetensors.torch import save_file
    torch.manual_seed(0)
    save_file({k: v.abs() if k.startswith("lin") else v for k, v in LPIPS().state_dict().items()}, tmp_path / "lpips.safetensors")
    assert evaluated("--clips", given / "clips.safetensors", "--frames", 1, "--limit", 1, "--models", given / "tiny/model", "--lpips-weights", tmp_path / "lpips.safetensors", out=tmp_path / "out") == 0
    row = figures(tmp_path / "out")["table"][0]
    assert row["lpips"] > 0 and row["stand_in"] is None and "EfficientNet" not in capsys.readouterr().out + (tmp_path / "out/report.html").read_text()

def test_tiles_are_used_and_change_little(given, tmp_path):
    words = ("--clips", given / "clips.safetensors", "--perceptual", "none", "--size", 64)
    assert evaluated(*words, out=tmp_path / "whole") == evaluated(*words, "--tile", 32, "--tile-frames", 4, out=tmp_path / "tiled") == 0
    a, b = (figures(tmp_path / name)["table"][0]["psnr"] for name in ("whole", "tiled"))
    assert a != b and abs(a - b) < 1.5 and figures(tmp_path / "tiled")["settings"]["tile"] == 32
    assert evaluated(*words, "--tile", 64, out=tmp_path / "one") == 0 and abs(figures(tmp_path / "one")["table"][0]["psnr"] - a) < 1e-4      # a single tile

def test_both_kinds_of_autoencoder_stand_in_one_table(given, tmp_path):
    torch.manual_seed(0)
    HunyuanVAE(hunyuan_pocket()).save_pretrained(tmp_path / "causal")
    assert evaluated("--clips", given / "films", "--models", tmp_path / "causal", given / "tiny/model", "--size", 32, "--frames", 9, "--limit", 1, "--perceptual", "none", "--tile", 32, "--tile-frames", 8, out=tmp_path / "out") == 0
    assert [(r["name"], r["kind"], r["information"], r["tokens"], r["clips"]) for r in figures(tmp_path / "out")["table"][:2]] == [("causal", "HunyuanVAE", 48, 1024, 1), ("tiny", "VideoDCAE", 192, 1024, 1)]

def test_size_frames_limit_and_patch_are_what_was_asked_for(given, tmp_path):
    assert evaluated("--clips", given / "clips.safetensors", "--models", given / "tiny/model", "shipped", "--perceptual", "none", "--size", 32, 48, "--frames", 4, "--limit", 2, "--patch", 1, 2, out=tmp_path) == 0
    found = figures(tmp_path)
    assert found["clips"]["shape"] == [4, 32, 48] and [s["clip"] for s in found["scores"]["tiny"]] == ["clips-000", "clips-002"]
    assert [(r["name"], r["tokens"], r["clips"]) for r in found["table"][:2]] == [("tiny", 256, 2), ("shipped", 1024, 2)]


# ---- clips ----
def test_films_that_cannot_be_read_are_named_counted_and_left_out(given, tmp_path, capsys):
    assert evaluated("--clips", given / "films", "--models", "shipped", given / "tiny/model", "--size", 32, "--frames", 8, "--perceptual", "none", out=tmp_path) == 0
    found, said = figures(tmp_path), capsys.readouterr().err
    assert {r["clips"] for r in found["table"][:2]} == {2} and [s["clip"] for s in found["scores"]["tiny"]] == ["a.mp4", "more/b.mkv"]
    assert set(found["clips"]["skipped"]) == {"short.mp4", "cut.mp4", "text.mp4"} and "4 frames, 8 are wanted" in found["clips"]["skipped"]["short.mp4"]
    assert "passed over 3 clips" in said and all(name in said and name in (tmp_path / "report.html").read_text() for name in found["clips"]["skipped"])

def test_a_window_comes_from_where_it_was_asked(tmp_path):
    film = np.stack([np.full((32, 48, 3), 8 * t, np.uint8) for t in range(30)])                  # a frame's level is its number
    path = write_video(tmp_path / "film.mp4", film, fps=25, crf=1)
    starts = [round(read_window(path, at, (16, 16), 8)[:, 8, 8].mean(-1)[0] / 8) for at in (0, 0.5, 1)]
    assert starts == [0, 11, 22] and read_window(path, 1, (16, 16), 8).shape == (8, 16, 16, 3)
    assert [c.name for c in file_clips(tmp_path, (16, 16), 8, None, windows=2)] == ["film.mp4 at 25%", "film.mp4 at 75%"]
    assert len(list(file_clips(path, (16, 16), 30, None))) == 1 and not list(file_clips(path, (16, 16), 31, None))

def test_a_curated_folder_gives_its_kept_clips(given, tmp_path):
    row = dict(source="x", num_frames=24, height=96, width=96)
    write_manifest([dict(row, clip_id="one", path="a.mp4", status="kept"), dict(row, clip_id="two", path="more/b.mkv", status="rejected", reason="blur"), dict(row, clip_id="still", path="a.mp4", status="kept") | dict(num_frames=1)], given / "films/manifest.parquet")
    try: assert [c.name for c in file_clips(given / "films", (32, 32), 8, None)] == [c.name for c in file_clips(given / "films/manifest.parquet", (32, 32), 8, None)] == ["one"]
    finally: (given / "films/manifest.parquet").unlink()

def test_without_clips_it_is_the_world_that_training_holds_out():
    from opensora_nb.commands.train_ae import TrainConfig
    clips = open_clips(EvaluateConfig(limit=2, frames=4))
    assert clips.shape == (4, 64, 64) and (next(iter(clips)).frames == render(world_truth(1, 0), 64, 4)).all() and len(open_clips(EvaluateConfig())) == 16
    assert next(iter(world_clips(1, (32, 64), 2))).frames.shape == (2, 32, 64, 3)

def test_names_of_models_are_short_and_differ():
    assert labels(("shipped", "runs/a/model", "runs/b/model/model.safetensors")) == ["shipped", "a", "b"]
    assert labels(("x/a", "y/a", "y/a")) == ["x/a", "y/a (1)", "y/a (2)"] and labels(("model",)) == ["model"]


# ---- faults ----
def test_a_model_that_answers_with_nan_is_named_and_the_code_is_1(given, tmp_path, capsys):
    assert evaluated("--clips", given / "clips.safetensors", "--models", given / "ruined", given / "tiny/model", "--perceptual", "none", out=tmp_path) == 1
    ruined, tiny = figures(tmp_path)["table"][:2]
    assert (ruined["psnr"], ruined["clips"], ruined["failed"]) == (None, 0, 3) and tiny["psnr"] > 0 and "ruined failed on 3 clips" in capsys.readouterr().err
    assert not (tmp_path / "worst-ruined.png").exists() and "3 failed" in (tmp_path / "report.html").read_text()

REFUSED = [
    ("--models {given}/nowhere", "no weights at"), ("--models {given}/nothing", "no .safetensors file in folder"), ("--models {given}/mmdit", "neither of the two autoencoders"), ("--models {given}/clips.safetensors", "neither of the two autoencoders"), ("--models {given}/odd", "does not fit this autoencoder"),
    ("--clips {given}/nowhere", "no such clips"), ("--clips {given}/nothing", "no videos"), ("--clips {given}/a-file", "neither a video"), ("--clips {given}/text.safetensors", "is not a clip cache"), ("--clips {given}/broken", "none of 1 clips can be read"),
    ("--clips {given}/clips.safetensors --frames 9", "have 8 frames, not 9"), ("--size 60", "multiples of 8"), ("--size 8", "at least 16"), ("--frames 0", "at least 1"), ("--tile 60", "multiple of 8"), ("--tile 64 --tile-overlap 1", "overlap"),
    ("--patch 1 2", "one for each of 1"), ("--perceptual lpips-vgg", "needs its weights"), ("--lpips-weights {given}/tiny/model", "is not LPIPS"), ("--out {given}/a-file", "a-file is a file"), ("--device nonsense", "no device nonsense"), ("--device cuda:99", "no device cuda:99"),
]

@pytest.mark.parametrize("words, said", REFUSED, ids=[w.replace("{given}/", "") for w, _ in REFUSED])
def test_what_cannot_be_done_is_one_line_and_writes_nothing(given, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "ae", "--no-progress", *words.format(given=given).split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("osnb evaluate: ") and said in err and len(err) < 500, err
    assert not list(tmp_path.rglob("*"))

def test_a_subject_must_be_named(capsys):
    assert main(["evaluate"]) == 2 and main(["evaluate", "cars"]) == 2 and "{ae}" in capsys.readouterr().err

def test_ctrl_c_leaves_the_last_report_as_it_was(given, tmp_path, monkeypatch):
    words = ("--clips", given / "clips.safetensors", "--models", given / "tiny/model", "--perceptual", "none")
    assert evaluated(*words, out=tmp_path) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def pressed(*clips): raise KeyboardInterrupt
    monkeypatch.setattr("opensora_nb.evaluation.reconstruction.psnr", pressed)      # in the middle of the first clip
    assert evaluated(*words, "--frames", 4, out=tmp_path) == 130 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
