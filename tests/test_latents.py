"""Latents on disk: interrupted, mixed, damaged; and read back as the batches that they were."""
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from opensora_nb.cluster.files import UserError
from opensora_nb.data.buckets import BucketTable
from opensora_nb.data.latents import CachedClips, Shards, cache_latents, finished, write_shards
from opensora_nb.data.loader import ClipTable, Loader, to_unit
from opensora_nb.data.sampler import BucketSampler
from opensora_nb.data.video import write_video

BUCKETS = BucketTable({"48px": {1: (1.0, 3), 9: (1.0, 2), 17: (0.5, 2)}, "32px": {9: (1.0, 4)}})


def made(count, start=0):
    for k in range(start, count): yield f"k{k}", dict(x=torch.full((500,), float(k))), dict(k=k)

@pytest.fixture(scope="module")
def table(tmp_path_factory):
    from PIL import Image
    home, rng, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for k in range(14):
        frames, (h, w) = (12, 30)[k % 2], ((64, 64), (48, 96))[k // 2 % 2]
        write_video(home / f"{k}.mp4", np.kron(rng.integers(0, 256, (frames, h // 8, w // 8, 3), np.uint8), np.ones((1, 8, 8, 1), np.uint8)))
        rows.append(dict(path=f"{k}.mp4", text=f"clip {k}", num_frames=frames, height=h, width=w, fps=24.0, score_vmafmotion=float(k)))
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(home / "p.png"); rows.append(dict(path="p.png", text="a picture", num_frames=1, height=64, width=64, fps=None, score_vmafmotion=None))
    pl.DataFrame(rows).write_csv(home / "table.csv")
    return ClipTable.read(home / "table.csv")

def means(video): return dict(z=torch.nn.functional.avg_pool3d(video, (1, 8, 8)))
def cache(table, folder, encode=means, **options): return cache_latents(table, BUCKETS, encode, folder, **(dict(workers=0, quiet=True, about=dict(ae="means"), shard_mb=0.02) | options))


def test_what_is_written_is_read_in_any_order_and_any_type(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    items = [(f"{k}", dict(a=torch.arange(k + 1).to(kind), b=torch.tensor(k)), dict(kind=str(kind))) for k, kind in enumerate(kinds)]
    shards = write_shards(tmp_path, items, dict(v=1), shard_mb=2e-5)
    assert len(shards.paths) > 1 and len(shards) == 6
    for row, found in zip((5, 0, 3, 3), shards.read([5, 0, 3, 3])): assert torch.equal(found["a"], items[row][1]["a"]) and found["b"] == row and shards.items[row]["info"] == items[row][2]
    shards.verify()
    assert len(write_shards(tmp_path / "none", [], dict(v=1))) == 0

def test_a_process_that_is_killed_leaves_whole_shards_and_the_next_one_adds_the_rest(tmp_path):
    script = f"""import time, torch
from opensora_nb.data.latents import write_shards
def items():
    for k in range(1000): time.sleep(0.004); yield f"k{{k}}", dict(x=torch.full((500,), float(k))), dict(k=k)
write_shards({str(tmp_path / 'out')!r}, items(), dict(v=1), shard_mb=0.01)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    until = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("shard-*"))) < 3 and time.monotonic() < until: time.sleep(0.01)
    child.send_signal(signal.SIGKILL); child.wait()
    there = finished(tmp_path / "out", dict(v=1))
    assert 10 <= len(there) < 1000 and len(there) % 5 == 0, "five items a shard"
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*")}
    shards = write_shards(tmp_path / "out", made(len(there) + 12), dict(v=1), shard_mb=0.01)
    assert shards.keys == [f"k{k}" for k in range(len(there) + 12)] and [x["x"][0].item() for x in shards.read(range(len(shards)))] == list(range(len(shards)))
    assert all(p.stat().st_mtime_ns == before[p.name] for p in shards.paths if p.name in before) and not list((tmp_path / "out").glob(".*"))

def test_another_content_is_refused_and_named(tmp_path):
    about = dict(models=dict(ae="a1", text="t1"), clips="c1")
    write_shards(tmp_path, made(3), about)
    for other, what in ((dict(about, clips="c2"), "clips is c1 there and c2 here"), (dict(about, models=dict(ae="a1")), "models.text is t1 there and None here"), (dict(about, size=9), "size is None there and 9 here")):
        with pytest.raises(UserError, match=what): write_shards(tmp_path, made(5), other)
    assert len(Shards(tmp_path)) == 3
    (tmp_path / "about.json").unlink()
    with pytest.raises(UserError, match="no about.json"): finished(tmp_path, about)
    with pytest.raises(UserError, match="no such folder of shards"): Shards(tmp_path / "nowhere")

@pytest.mark.parametrize("harm", ("cut", "flip", "empty", "foreign"))
def test_a_broken_shard_is_named_and_made_again_without_the_others(tmp_path, harm):
    write_shards(tmp_path, made(12), dict(v=1), shard_mb=0.008)
    victim = Shards(tmp_path).paths[1]
    data = bytearray(victim.read_bytes())
    if harm == "flip": data[-3] ^= 1
    victim.write_bytes({"cut": data[:-7], "flip": data, "empty": b"", "foreign": b"not a shard at all, by any means"}[harm])
    with pytest.raises(UserError, match=f"{victim.name} in .* (has changed|is broken)"): Shards(tmp_path).verify()
    if harm == "flip": victim.unlink()
    assert len(finished(tmp_path, dict(v=1))) == 8
    shards = write_shards(tmp_path, made(12), dict(v=1))
    shards.verify()
    assert sorted(shards.keys) == sorted(f"k{k}" for k in range(12))

def test_every_clip_that_has_a_place_is_encoded_once_at_its_bucket_size(table, tmp_path):
    calls = []
    def counted(video): calls.append(tuple(video.shape)); assert video.min() >= -1 and video.max() <= 1; return means(video)
    cached = cache(table, tmp_path, counted, batch=1)
    epoch = BucketSampler(table.sizes, BUCKETS, 0)
    place = {int(r): b.bucket for b in (epoch.take() for _ in range(len(epoch))) for r in b.rows}
    assert sorted(cached.rows.tolist()) == sorted(place) and len(calls) == len(place) and not cached.lost and cached.empty is None
    for k, row in enumerate(cached.rows.tolist()): assert (cached.sizes.frames[k], cached.sizes.height[k], cached.sizes.width[k]) == (place[row].frames, place[row].height, place[row].width) and cached.text[k] == (f"clip {row}" if row < 14 else "a picture")
    assert cache(table, tmp_path, counted, batch=1).shards.keys == cached.shards.keys and len(calls) == len(place), "asked again: nothing to do"

def test_cached_batches_are_those_of_videos_though_chance_had_a_part(table, tmp_path):
    cached = cache(table, tmp_path, dtype=None, seed=5)
    sampler = BucketSampler(cached.sizes, BUCKETS, seed=9)
    assert sampler.left_out == 0
    batches = [b for _, b in zip(range(3 * len(sampler)), Loader(cached, sampler, workers=0))]
    assert {b.bucket.resolution for b in batches} == {"48px", "32px"} and all(b.video is None and b.latents["z"].shape == (len(b), 3, b.bucket.frames, b.bucket.height // 8, b.bucket.width // 8) for b in batches)
    b = next(b for b in batches if b.bucket.frames > 1)
    job = table.job(type("B", (), dict(rows=cached.rows[b.rows], bucket=b.bucket, epoch=0))(), BUCKETS.max_fps, 5)
    assert torch.equal(b.latents["z"], means(to_unit(job()[0]["video"]))["z"]) and b.motion.tolist() == cached.rows[b.rows].tolist() and (b.fps == 24).all()

@pytest.mark.slow
def test_workers_read_what_this_process_reads_also_after_the_folder_has_grown(table, tmp_path):
    cached = cache(table, tmp_path, workers=1)
    plain = lambda **o: [(b.number, b.rows.tolist(), b.share, b.latents["z"].float().sum().item()) for _, b in zip(range(8), Loader(cached, BucketSampler(cached.sizes, BUCKETS), **o))]
    assert plain(workers=0) == plain(workers=2, pin=True)
    count = len(cached)
    (tmp_path / "shard-000000.safetensors").unlink()
    cached = cache(table, tmp_path)
    assert len(cached) == count and len(plain(workers=0)) == 8

def test_texts_are_decorated_embedded_and_the_empty_one_is_kept(table, tmp_path):
    said = []
    def embed(texts): said.extend(texts); return dict(t=torch.tensor([[float(len(t))] for t in texts]))
    cached = cache(table, tmp_path, embed=embed, decorate=lambda text, fps, motion: f"{text}|{fps}|{motion}")
    assert said[0] == "" and "clip 3|24.0|3.0" in said and "a picture|None|None" in said and cached.empty["t"].item() == 0 and len(said) == len(cached) + 1
    batch = next(iter(Loader(cached, BucketSampler(cached.sizes, BUCKETS), workers=0)))
    assert batch.latents["t"].shape == (len(batch), 1)

def test_clips_that_are_gone_are_counted_and_other_clips_are_refused(table, tmp_path):
    import shutil
    home = Path(shutil.copytree(table.folder, tmp_path / "clips"))
    (home / "3.mp4").unlink()
    less = ClipTable.read(home / "table.csv")
    cached = cache(less, tmp_path / "out")
    assert [row for row, _ in cached.lost] == [3] and 3 not in cached.rows
    shutil.copy(table.folder / "3.mp4", home)
    assert 3 in cache(less, tmp_path / "out").rows, "it came back"
    text = (home / "table.csv").read_text()
    (home / "table.csv").write_text(text.replace("clip 4", "another caption"))
    with pytest.raises(UserError, match="clips is .* there and"): cache(ClipTable.read(home / "table.csv"), tmp_path / "out")
    for f in home.glob("*.mp4"): f.unlink()
    (home / "table.csv").write_text(text)
    with pytest.raises(UserError, match="none of 15 clips could be loaded|none of 14 clips could be loaded"): (home / "p.png").write_bytes(b"x"); cache(ClipTable.read(home / "table.csv", root=home), tmp_path / "nothing")

def test_a_shard_that_breaks_while_training_costs_its_clips_and_no_more(table, tmp_path):
    cached = cache(table, tmp_path, shard_mb=0.001)
    said, victim = [], cached.shards.paths[0]
    loader = Loader(cached, BucketSampler(cached.sizes, BUCKETS), workers=0, say=said.append)
    (bad := bytearray(victim.read_bytes()))[:8] = b"\xff" * 8
    victim.unlink(); victim.write_bytes(bad)
    lost = {k for k, item in enumerate(cached.shards.items) if cached.shards.whose[k] == 0}
    rows = {int(r) for _, b in zip(range(2 * len(loader.plan)), loader) for r in b.rows}
    assert any(victim.name in line for line in said) and rows == set(range(len(cached))) - lost and set(loader.losses) == lost and lost
