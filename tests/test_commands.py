"`osnb train-ae`, `osnb train` and `osnb generate` as typed: what they leave behind, what they refuse in one line, and how they go on after Ctrl-C."
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora_nb.autoencoder import dc_ae
from opensora_nb.autoencoder.dc_ae import VideoDCAE
from opensora_nb.cluster.checkpoint import checkpoints
from opensora_nb.commands.cli import main
from opensora_nb.data.cache import world_cache
from opensora_nb.data.video import decode, probe
from opensora_nb.data.world import render, world_truth
from opensora_nb.mmdit import model as mmdit
from opensora_nb.mmdit.model import MMDiT
from opensora_nb.training.loop import read_log

pytestmark = pytest.mark.slow        # real processes and files: half a minute

OSNB = [sys.executable, "-m", "opensora_nb.commands.cli"]
TINY_AE = replace(dc_ae.pocket(), enc_width=(8, 16, 32, 32), dec_width=(8, 16, 32, 32), enc_depth=(0, 1, 1, 1), dec_depth=(0, 1, 1, 1), scaling_factor=0.5)
TINY_MMDIT = replace(mmdit.pocket(), hidden_size=64, num_heads=2, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=1)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "A folder with what a user may have: weights, clips, a picture, and files that are none of these."
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    VideoDCAE(TINY_AE).save_pretrained(folder / "ae")
    VideoDCAE(replace(TINY_AE, latent_channels=8)).save_pretrained(folder / "ae8")
    MMDiT(TINY_MMDIT).save_pretrained(folder / "mmdit")
    MMDiT(replace(TINY_MMDIT, cond_embed=False)).save_pretrained(folder / "t2v")
    MMDiT(replace(TINY_MMDIT, context_in_dim=128)).save_pretrained(folder / "wide")
    clips = world_cache(folder / "clips.safetensors", 5, 3, size=32, num_frames=12)
    replace(clips, clips=clips.clips[:, :, :30]).save(folder / "odd.safetensors")
    replace(clips, clips=clips.clips[:, :8]).save(folder / "short.safetensors")
    from PIL import Image
    Image.fromarray(render(world_truth(5, 0), 48, 1)[0]).save(folder / "first.png")
    (folder / "text.png").write_text("no picture"); (folder / "empty.png").write_bytes(b""); (folder / "nothing").mkdir(); (folder / "text.safetensors").write_text("no weights")
    (folder / "half.png").write_bytes((folder / "first.png").read_bytes()[:300]); (folder / "a-file").write_text("in the way")
    data = (folder / "mmdit/model.safetensors").read_bytes()
    (folder / "cut").mkdir(); (folder / "cut/model.safetensors").write_bytes(data[: len(data) // 2]); shutil.copy(folder / "mmdit/config.json", folder / "cut")
    (folder / "odd-config").mkdir(); shutil.copy(folder / "mmdit/model.safetensors", folder / "odd-config")
    (folder / "odd-config/config.json").write_text(json.dumps(json.loads((folder / "mmdit/config.json").read_text()) | dict(num_heads=3)))
    return folder

@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    "The clips that `osnb train-ae` measures on, rendered once for all runs."
    folder = tmp_path_factory.mktemp("held-out") / "data"
    world_cache(folder / "pocket-world-1-16x32-64px.safetensors", 1, 16, 64, 32)
    return folder

def words(text, given, **more): return [w.format(given=given, **more) for w in text.split()]
def typed(*args, cwd, **kwargs): return subprocess.run([*OSNB, *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd, **kwargs)
def contents(folder): return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}
def outputs(text, name): return Path(next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(name)))
GENERATE = "generate --prompt circle --autoencoder {given}/ae --mmdit {given}/mmdit --size 32 32 --num-frames 8 --steps 2"


# ---- what they leave behind ----
def test_generate_writes_a_clip_and_its_story_for_each_seed(given, tmp_path):
    r = typed(*words(GENERATE, given), "--prompt", "a red circle bouncing", "--motion-score", 3, "--num-sample", 2, "--seed", 7, "--image", given / "first.png", "--out", "clips", cwd=tmp_path)
    assert r.returncode == 0 and "Traceback" not in r.stderr, r.stderr
    assert sorted(p.name for p in (tmp_path / "clips").iterdir()) == ["00007.json", "00007.mp4", "00008.json", "00008.mp4"] and os.listdir(tmp_path) == ["clips"]
    assert [line.split()[0] for line in r.stdout.splitlines()] == ["clips/00007.mp4", "clips/00008.mp4"]
    clips = [decode(tmp_path / f"clips/{seed:05d}.mp4") for seed in (7, 8)]
    info = probe(tmp_path / "clips/00007.mp4")
    assert clips[0].shape == (8, 32, 32, 3) and (info.codec, info.fps) == ("h264", 24) and (clips[0] != clips[1]).any()
    story = json.loads((tmp_path / "clips/00008.json").read_text())
    assert (story["prompt"], story["seed"], story["motion_score"], story["steps"], story["size"]) == ("a red circle bouncing", 8, 3, 2, [32, 32])

def test_the_same_command_writes_the_same_pixels_and_samples_do_not_depend_on_their_number(given, tmp_path, capsys):
    for out, more in (("a", ["--num-sample", "2"]), ("b", ["--num-sample", "2"]), ("c", ["--seed", "43"])): assert main([*words(GENERATE, given), "--out", str(tmp_path / out), *more]) == 0
    assert [(tmp_path / f"a/{s}.mp4").read_bytes() == (tmp_path / f"b/{s}.mp4").read_bytes() for s in ("00042", "00043")] == [True, True]
    assert (decode(tmp_path / "c/00043.mp4") == decode(tmp_path / "a/00043.mp4")).all()
    assert "seed 43" in capsys.readouterr().err                                                   # a bar, unless asked not to
    assert main([*words(GENERATE, given), "--out", str(tmp_path / "d"), "--no-progress"]) == 0 and not capsys.readouterr().err

def test_a_single_picture_can_be_generated(given, tmp_path):
    assert main([*words(GENERATE, given), "--num-frames", "1", "--out", str(tmp_path)]) == 0
    assert decode(tmp_path / "00042.mp4").shape == (1, 32, 32, 3)

def test_train_makes_a_run_and_generate_reads_it(given, tmp_path):
    r = typed(*words("train --name a --data {given}/clips.safetensors --autoencoder {given}/ae --init {given}/mmdit --steps 3 --batch-size 2 --seed 1", given), cwd=tmp_path)
    assert r.returncode == 0 and "Traceback" not in r.stderr, r.stderr
    run = tmp_path / "runs/a"
    assert (outputs(r.stdout, "weights"), outputs(r.stdout, "log")) == (Path("runs/a/model"), Path("runs/a/log.jsonl"))
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "costs.json", "log.jsonl", "model", "samples", "tensorboard"] and read_log(run)["step"] == [1, 2, 3]
    assert json.loads((run / "config.json").read_text())["loop"]["seed"] == 1 and MMDiT.from_pretrained(run / "model").cfg == TINY_MMDIT
    latents = list((tmp_path / "runs/data").iterdir())
    assert len(latents) == 1
    made = latents[0].stat().st_mtime_ns
    assert main(words("train --name b --out {out} --data {given}/clips.safetensors --autoencoder {given}/ae --init {out}/a/model --steps 1 --batch-size 2", given, out=tmp_path / "runs")) == 0
    assert [(p, p.stat().st_mtime_ns) for p in (tmp_path / "runs/data").iterdir()] == [(latents[0], made)], "the second run shares the latents of the first"
    before = contents(run)
    assert main(words("train --name a --out {out} --data {given}/clips.safetensors --autoencoder {given}/ae --init {given}/mmdit --steps 3 --batch-size 2 --seed 1 --lr 0.5", given, out=tmp_path / "runs")) == 2
    assert contents(run) == before
    assert main([*words(GENERATE, given), "--mmdit", str(run / "model"), "--out", str(tmp_path / "clips")]) == 0

@pytest.mark.slow
def test_train_ae_stops_at_ctrl_c_and_the_same_command_goes_on(given, held_out, tmp_path):
    shutil.copytree(held_out, tmp_path / "runs/data")
    command = words("train-ae pocket_dcae_gan --name x --data {given}/clips.safetensors --init {given}/ae --steps 12 --batch-size 2", given)
    log = tmp_path / "runs/x/log.jsonl"
    p = subprocess.Popen([*OSNB, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not log.exists() or log.read_text().count("\n") < 2:
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    stopped = read_log(tmp_path / "runs/x")["step"][-1]
    assert p.returncode == 130 and not out and "Traceback" not in err
    assert err.splitlines()[-1] == f"osnb train-ae: stopped at step {stopped} of 12; the same command goes on from there (runs/x)" and 2 <= stopped < 12
    assert [c.name for c in checkpoints(tmp_path / "runs/x/checkpoints")] == [f"step-{stopped:07d}"] and not (tmp_path / "runs/x/model").exists()

    r = typed(*command, cwd=tmp_path)
    assert r.returncode == 0 and "Traceback" not in r.stderr, r.stderr
    log = read_log(tmp_path / "runs/x")
    assert log["step"] == list(range(1, 13)) and all(v > 0 for k in ("discriminator_loss", "adaptive_weight") for v in log[k]) and r.stdout.startswith("held-out PSNR ") and "over 16 clips" in r.stdout
    run = tmp_path / "runs/x"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "log.jsonl", "model", "samples", "tensorboard"] and [p.name for p in (run / "samples").iterdir()] == ["0000012.png"]
    assert VideoDCAE.from_pretrained(tmp_path / outputs(r.stdout, "weights")).scaling_factor not in (None, 0.5)


# ---- what they refuse ----
REFUSED = [
    ("generate --prompt x --autoencoder {given}/nowhere --mmdit {given}/mmdit", "no weights at"), ("generate --prompt x --autoencoder {given}/ae --mmdit {given}/nowhere", "no weights at"),
    ("generate --prompt x --autoencoder {given}/nothing --mmdit {given}/mmdit", "no .safetensors file in folder"), ("generate --prompt x --autoencoder {given}/ae --mmdit {given}/cut", "cannot read the weights"),
    ("generate --prompt x --autoencoder {given}/ae --mmdit {given}/odd-config", "does not describe this transformer"),
    ("generate --prompt x --autoencoder {given}/text.safetensors --mmdit {given}/mmdit", "cannot read the weights"), ("generate --prompt x --autoencoder {given}/ae --mmdit {given}/text.png", "must be a .safetensors file"),
    ("generate --prompt x --autoencoder {given}/mmdit --mmdit {given}/mmdit", "neither of the two autoencoders"), ("generate --prompt x --autoencoder {given}/ae --mmdit {given}/ae", "transformer"),
    ("generate --prompt x --autoencoder {given}/ae8 --mmdit {given}/mmdit", "do not belong together"), ("generate --prompt x --autoencoder {given}/ae --mmdit {given}/wide", "do not belong together"),
    (GENERATE + " --image {given}/nowhere.png", "no such image"), (GENERATE + " --image {given}/text.png", "is not a picture"), (GENERATE + " --image {given}/empty.png", "is not a picture"),
    (GENERATE + " --image {given}/half.png", "is not a picture"), (GENERATE + " --image {given}/nothing", "is not a picture"), (GENERATE + " --image {given}/first.png --mmdit {given}/t2v", "takes no image"),
    (GENERATE + " --image {given}/first.png --num-frames 4", "ask for more than 4 frames"),
    (GENERATE + " --steps 0", "steps must be at least 1"), (GENERATE + " --size 60 64", "multiples of 8"), (GENERATE + " --size 0 64", "at least 1"), (GENERATE + " --num-sample 0", "num_sample must be at least 1"),
    (GENERATE + " --num-frames 0", "num_frames must be at least 1"), (GENERATE + " --motion-score -1", "motion_score"), (GENERATE + " --motion-score nan", "motion_score"),
    (GENERATE + " --out {given}/a-file", "a-file is a file"),
    ("train-ae --data {given}/nowhere", "no such training data"), ("train-ae --data {given}/nothing", "no such manifest"), ("train-ae --data {given}/text.safetensors", "is not a clip cache"), ("train-ae --data {given}/ae/model.safetensors", "is not a clip cache"),
    ("train-ae --data {given}/clips.safetensors --steps 0", "steps must be at least 1"), ("train-ae --data {given}/clips.safetensors --batch-size 0", "batch_size must be at least 1"), ("train-ae --data {given}/clips.safetensors --lr 0", "lr must be"),
    ("train-ae --data {given}/clips.safetensors --init {given}/nowhere", "no weights at"), ("train-ae --clips 0", "clips must be at least 1"), ("train-ae --clips 2000 --init {given}/nowhere", "no weights at"),
    ("train-ae dcae_128_gan --data {given}/clips.safetensors", "name the weights of the first (--init RUN/model"), ("train-ae dcae_256 --data {given}/clips.safetensors", "lpips-vgg needs its weights"),
    ("train-ae dcae_128 --lpips-weights {given}/ae --data {given}/clips.safetensors", "is not LPIPS on VGG16"), ("train-ae pocket_dcae --data {given}/clips.safetensors --adversarial-weight 0.1", "has no discriminator"),
    ("train-ae --image-share 1.5 --data {given}/clips.safetensors", "image_share must be between 0 and 1"), ("train-ae --alignment-stage 3 --data {given}/clips.safetensors", "add --alignment-weight"),
    ("train-ae --clips 2000 --init {given}/cut/model.safetensors", "cannot read the weights"), ("train-ae --clips 2000 --init {given}/mmdit", "does not fit this autoencoder"), ("train-ae --clips 2000 --size 60", "multiples of 8"),
    ("train-ae --clips 2000 --alignment-weight 1 --alignment-stage 9", "stages 1 to 4, not 9"),
    ("train --data {given}/nowhere --autoencoder {given}/ae", "no such training data"), ("train --data {given}/clips.safetensors --autoencoder {given}/nowhere", "no weights at"),
    ("train --data {given}/clips.safetensors --autoencoder {given}/ae --steps 0", "steps must be at least 1"), ("train --clips 2000 --autoencoder {given}/ae --init {given}/nowhere", "no weights at"),
    ("train --data {given}/odd.safetensors --autoencoder {given}/ae", "multiples of 8"),
]

@pytest.mark.parametrize("command, said", REFUSED, ids=[c.replace(GENERATE, "generate").replace("{given}/", "") for c, _ in REFUSED])
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(given, tmp_path, monkeypatch, capsys, command, said):
    monkeypatch.chdir(tmp_path)
    before = contents(given)
    assert main(words(command, given)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith(f"osnb {command.split()[0]}: ") and said in err and len(err) < 500, err
    assert not list(tmp_path.rglob("*")) and contents(given) == before

@pytest.mark.parametrize("command", ["train-ae --data {given}/nowhere", "train --data {given}/clips.safetensors --autoencoder {given}/cut/model.safetensors"])
def test_the_same_in_a_process_of_its_own(given, tmp_path, command):
    r = typed(*words(command, given), cwd=tmp_path)
    assert r.returncode == 2 and not r.stdout and r.stderr.count("\n") == 1 and r.stderr.startswith("osnb ") and not list(tmp_path.rglob("*")), r.stderr

@pytest.mark.slow
@pytest.mark.parametrize("data", ["short", "odd"])
def test_clips_that_do_not_suit_the_autoencoder_are_one_line(given, held_out, tmp_path, monkeypatch, capsys, data):
    shutil.copytree(held_out, tmp_path / "runs/data"); monkeypatch.chdir(tmp_path)
    assert main(words(f"train-ae --data {{given}}/{data}.safetensors", given)) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and ("8 frames are too short" if data == "short" else "multiples of 8") in err and os.listdir("runs") == ["data"]

@pytest.mark.parametrize("option, value, said", [("--steps", "many", "--steps"), ("--guidance.text", "-1", "not negative"), ("--size", "64", "--size")])
def test_an_option_that_cannot_be_read_is_a_usage_error(tmp_path, monkeypatch, capsys, option, value, said):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "x", option, value]) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in out + err and not list(tmp_path.rglob("*"))

@pytest.mark.slow
def test_ctrl_c_while_generating_keeps_what_is_whole_and_leaves_nothing_else(given, tmp_path):
    p = subprocess.Popen([*OSNB, *words(GENERATE, given), "--num-sample", "500", "--out", "clips"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "clips/00043.mp4").exists():
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 130 and "Traceback" not in err and err.splitlines()[-1] == "osnb generate: interrupted"
    files = sorted((tmp_path / "clips").iterdir())
    assert not [f for f in files if f.name.startswith(".")] and all(decode(f).shape == (8, 32, 32, 3) for f in files if f.suffix == ".mp4") and len(files) < 200
