"""The loader: which frames, which clips, which process; what breaks is named and nothing waits for ever."""
import functools, gc, os, subprocess, sys, threading, weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from opensora_nb.cluster.files import UserError
from opensora_nb.data.buckets import Bucket, BucketTable
from opensora_nb.data.footage import _turn
from opensora_nb.data.loader import Buffers, ClipTable, CollectBetweenSteps, Loader, Want, ahead, first_frame, frame_indices, load_batch, read_clip, resize_image, resize_video, run_jobs, to_device
from opensora_nb.data.manifest import write_manifest
from opensora_nb.data.sampler import Batch, BucketSampler, ClipSizes
from opensora_nb.data.video import VideoError, decode, write_video

TABLE = BucketTable({"48px": {1: (1.0, 3), 9: (1.0, 2), 17: (1.0, 2)}})


def film(seed: int, frames: int = 24, height: int = 64, width: int = 64) -> np.ndarray:
    "A pattern that drifts, so that each frame is another one."
    rng = np.random.default_rng(seed)
    field = np.kron(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(field, 2 * k, 1) for k in range(frames)])

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A folder with ten clips, two pictures and the table of both."
    from PIL import Image
    home, rows = tmp_path_factory.mktemp("clips"), []
    for k in range(10):
        frames, fps = (12, 20, 40)[k % 3], 48 if k == 5 else 24
        write_video(home / f"{k}.mp4", film(k, frames), fps); rows.append(dict(path=f"{k}.mp4", text=f"clip {k}", num_frames=frames, height=64, width=64, fps=float(fps), score_vmafmotion=k / 2))
    for k in (10, 11):
        Image.fromarray(film(k, 1)[0]).save(home / f"{k}.png"); rows.append(dict(path=f"{k}.png", text=None, num_frames=1, height=64, width=64, fps=None, score_vmafmotion=None))
    pl.DataFrame(rows).write_csv(home / "table.csv")
    return home

@pytest.fixture
def copied(clips, tmp_path):
    import shutil
    return Path(shutil.copytree(clips, tmp_path / "clips"))

def table(home): return ClipTable.read(home / "table.csv")
def sampler(home, **options): return BucketSampler(table(home).sizes, TABLE, seed=3, **options)
def some(loader, count): return [b for _, b in zip(range(count), loader)]
def plain(batches): return [(b.number, b.rows.tolist(), round(b.share, 9), b.text, int(b.video.long().sum())) for b in batches]


# ---- one clip ----
@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_sizes_the_result_fills_the_bucket_and_rounding_is_all_that_bytes_cost(seed):
    rng = np.random.default_rng(seed)
    h, w, height, width = (int(n) for n in rng.integers(16, 150, 4))
    frames = torch.from_numpy(rng.integers(0, 256, (2, 3, h, w), np.uint8))
    exact, bytes_ = resize_video(frames.float(), height, width), resize_video(frames, height, width)
    assert exact.shape == bytes_.shape == (2, 3, height, width) and bytes_.dtype == torch.uint8
    assert (bytes_.float() - exact).abs().max() <= 1
    assert resize_image(frames[0].permute(1, 2, 0).numpy(), height, width).shape == (height, width, 3)

def test_frames_are_those_that_a_decoder_of_everything_gives(tmp_path):
    path = write_video(tmp_path / "long.mp4", film(0, 130, 64, 96), 24)
    everything = torch.from_numpy(decode(path)).permute(0, 3, 1, 2)
    for count, step, seed in ((33, 1, (0,)), (17, 3, (1,)), (129, 1, (2,)), (40, 2, (3,))):
        begin = first_frame(130, count, step, seed)
        expected = resize_video(everything[frame_indices(130, count, step, begin)], 48, 48).transpose(0, 1)
        assert torch.equal(read_clip(Want(str(path), 130, 64, 96, count, step, seed), 48, 48), expected)

def test_a_window_depends_on_seed_epoch_and_clip_and_on_nothing_else(clips):
    t, bucket = table(clips), Bucket("48px", 9, "1:1", 48, 48, 2)
    def video(rows, epoch, seed=0): return load_batch(t, Batch(bucket, np.array(rows), epoch, 0), seed=seed).video
    assert torch.equal(video([2, 8], 0)[0], video([8, 2], 0)[1])
    assert any(not torch.equal(video([2], 0), video([2], epoch)) for epoch in (1, 2, 3)) and any(not torch.equal(video([2], 0), video([2], 0, seed)) for seed in (1, 2, 3))

def test_a_phone_clip_stands_upright_and_its_table_says_so(tmp_path):
    write_video(tmp_path / "phone.mp4", film(1, 9, 64, 96)); _turn(tmp_path / "phone.mp4")
    assert torch.equal(read_clip(Want(str(tmp_path / "phone.mp4"), 9, 96, 64, 9, 1, (0,)), 96, 64), torch.from_numpy(decode(tmp_path / "phone.mp4")).permute(3, 0, 1, 2))
    with pytest.raises(UserError, match="is 64 x 96 .* and 96 x 64"): read_clip(Want(str(tmp_path / "phone.mp4"), 9, 64, 96, 9, 1, (0,)), 64, 96)

def test_what_is_no_video_is_refused_in_one_line_and_nothing_waits(clips, tmp_path):
    good = (clips / "1.mp4").read_bytes()
    contents = {"half.mp4": (good[: len(good) // 2], "truncated"), "noise.mp4": (np.random.default_rng(0).bytes(3000), "broken"), "empty.mp4": (b"", "empty"), "page.mp4": (b"<html></html>", "foreign"),
                "list.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://films.invalid/0.ts\n", "playlist"), "lines\nof a name.mp4": (b"", "empty")}
    for name, (content, _) in contents.items(): (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.mp4"); (tmp_path / "folder.mp4").mkdir()
    for name, reason in [(n, r) for n, (_, r) in contents.items()] + [("pipe.mp4", "unreadable"), ("folder.mp4", "unreadable"), ("gone.mp4", "unreadable")]:
        with pytest.raises(VideoError) as e: read_clip(Want(str(tmp_path / name), 20, 64, 64, 9, 1, (0,)), 48, 48)
        assert e.value.reason == reason and "\n" not in str(e.value), name

def test_names_in_any_script_are_found(clips, tmp_path):
    for name in ("кино 映画.mp4", os.fsdecode(b"odd\xff.mp4")):
        try: (tmp_path / name).write_bytes((clips / "1.mp4").read_bytes())
        except OSError: continue                                    # a file system that wants UTF-8
        assert read_clip(Want(str(tmp_path / name), 20, 64, 64, 9, 1, (0,)), 48, 48).shape == (3, 9, 48, 48)


# ---- the table ----
def test_the_table_has_the_rows_of_the_sampler_in_its_order(clips, tmp_path):
    rows = [dict(clip_id=str(k), path=f"{k}.mp4", source="x", num_frames=20 + k, height=64, width=64, fps=24.0, text=f"t{k}", level=k % 3, **(dict(status="kept") if k % 4 else dict(status="rejected", reason="blur"))) for k in range(12)]
    write_manifest(rows, tmp_path / "manifest.parquet")
    for level in (None, 0, 2):
        found, sizes = ClipTable.read(tmp_path / "manifest.parquet", level, root=clips), ClipSizes.read(tmp_path / "manifest.parquet", level)
        assert found.sizes.frames.tolist() == sizes.frames.tolist() == [r["num_frames"] for r in rows if r["status"] == "kept" and r["level"] >= (level or 0)]
        assert found.about(np.arange(len(found)), 24)[0] == [f"t{n - 20}" for n in sizes.frames]

def test_a_caption_of_digits_stays_a_text_and_odd_cells_are_no_clips(clips, tmp_path):
    (tmp_path / "t.csv").write_text("path,text,num_frames,height,width,fps\n1.mp4,2001,20,64,64,24\n2.mp4,,x,64,64,\n")
    found = ClipTable.read(tmp_path / "t.csv", root=clips)
    assert found.about(np.array([0, 1]), 24)[0] == ["2001", ""] and found.sizes.frames.tolist() == [20, 0]

def test_a_table_whose_clips_have_all_moved_says_so_at_once(clips, tmp_path):
    (tmp_path / "table.csv").write_text((clips / "table.csv").read_text())
    with pytest.raises(UserError, match="no clip exists, for instance .*0.mp4"): ClipTable.read(tmp_path / "table.csv")
    pl.DataFrame(dict(num_frames=[9], height=[64], width=[64])).write_csv(tmp_path / "nameless.csv")
    with pytest.raises(UserError, match="no column path"): ClipTable.read(tmp_path / "nameless.csv")

def test_a_table_with_no_bucket_for_any_clip_is_one_line(clips):
    with pytest.raises(UserError, match="none of 12 clips fits a bucket.*frames 1 to 40, height 64 to 64"): BucketSampler(table(clips).sizes, BucketTable({"768px": {33: (1.0, 1)}}))


# ---- batches ----
def test_a_batch_is_what_its_bucket_says_and_carries_rates_scores_and_texts(clips):
    batches = some(Loader(table(clips), sampler(clips), workers=0), len(sampler(clips)))
    assert sorted(r for b in batches for r in b.rows) == list(range(12))
    for b in batches:
        assert b.video.shape == (len(b), 3, b.bucket.frames, b.bucket.height, b.bucket.width) and b.video.dtype == torch.uint8 and b.latents is None
        for k, row in enumerate(b.rows):
            assert b.text[k] == (f"clip {row}" if row < 10 else "") and (np.isnan(b.fps[k]) and np.isnan(b.motion[k]) if row > 9 else (b.fps[k], b.motion[k]) == (24, row / 2))
    assert next(b for b in batches if 5 in b.rows).bucket.frames == 17, "48 fps: every second frame of 40"

def on(clips, world, per_step, steps, state=None):
    "What `world` processes see in some steps, in order, and the state after."
    out = []
    for rank in range(world):
        loader, done = Loader(table(clips), sampler(clips), rank, world, per_step, workers=0), 0
        if state: loader.load_state_dict(state)
        for b in loader:
            out.append(b); done += b.last
            if done == steps: break
    return plain(sorted(out, key=lambda b: b.number)), b.state

def test_any_number_of_processes_learns_from_the_same_steps(clips):
    alone, end = on(clips, 1, 4, 6)
    assert [sum(b[2] for b in alone[k : k + 4]) for k in range(0, 24, 4)] == pytest.approx([1] * 6)
    assert on(clips, 2, 4, 6) == on(clips, 4, 4, 6) == (alone, end) and end["taken"] == 24
    state, first = None, []
    for world, steps in ((4, 1), (1, 3), (2, 2)):
        found, state = on(clips, world, 4, steps, state)
        first += found
    assert first == alone

def test_a_place_counts_through_epochs_even_from_a_sampler_that_has_not_counted(clips):
    moved = sampler(clips)
    for _ in range(2 * len(moved) + 3): moved.take()
    loader = Loader(table(clips), moved, workers=0)
    before = moved.state_dict()
    assert some(loader, 1)[0].number == loader.state["taken"] - 1 == sum(1 for _ in range(2 * len(sampler(clips)) + 3)) and moved.state_dict() == before, "and the sampler itself stays"

def test_steps_that_cannot_be_shared_and_states_of_other_clips_are_refused(clips):
    with pytest.raises(UserError, match="6 batches a step cannot be shared by 4 processes"): Loader(table(clips), sampler(clips), 0, 4, 6)
    other = BucketSampler(table(clips).sizes, TABLE, seed=4).state_dict()
    with pytest.raises(UserError, match="order of batches is another one"): Loader(table(clips), sampler(clips)).load_state_dict(other)

@pytest.mark.slow
def test_workers_and_buffers_change_nothing_and_prefetching_moves_no_checkpoint(clips):
    expected = some(Loader(table(clips), sampler(clips), workers=0, per_step=2), 12)
    for options in (dict(workers=2, prefetch=3), dict(workers=1, pin=True)):
        loader = Loader(table(clips), sampler(clips), per_step=2, **options)
        for a, b in zip(expected, loader):
            assert plain([a]) == plain([b]) and a.state == b.state
            if b.last: assert loader.state_dict() == a.state
            if b.number == 11: break

def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="a process that loads clips died"): list(run_jobs([functools.partial(os._exit, 3)], workers=1))

@pytest.mark.slow
def test_a_script_without_a_main_guard_ends_quietly(clips, tmp_path):
    (tmp_path / "script.py").write_text(f"""from opensora_nb.data.loader import ClipTable, Loader
from opensora_nb.data.buckets import BucketTable
from opensora_nb.data.sampler import BucketSampler
table = ClipTable.read({str(clips / 'table.csv')!r})
loader = Loader(table, BucketSampler(table.sizes, BucketTable({{"48px": {{9: (1.0, 2)}}}})), workers=2)
for _, batch in zip(range(3), loader): print(batch.number, len(batch))
""")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 2\n1 2\n2 2\n", "")


# ---- what breaks ----
def test_clips_that_break_between_two_epochs_are_named_and_the_rest_goes_on(copied):
    said = []
    loader = Loader(table(copied), sampler(copied), workers=0, say=said.append)
    stream, epoch = iter(loader), len(sampler(copied))
    first = [next(stream) for _ in range(epoch)]
    (copied / "0.mp4").unlink()
    (copied / "1.mp4").write_bytes((copied / "1.mp4").read_bytes()[:700])
    write_video(copied / "2.mp4", film(2, 12), 24)                                 # shortened
    write_video(copied / "3.mp4", film(3, 12, 96, 64), 24)                         # exchanged
    rows = []
    while len(rows) < 8: rows += next(stream).rows.tolist()
    assert sorted(r for b in first for r in b.rows) == list(range(12)) and sorted(rows) == list(range(4, 12))
    assert sorted(loader.losses) == [0, 1, 2, 3] and loader.seen >= 24
    for name, why in (("0.mp4", "cannot be opened"), ("1.mp4", "the end of the file is missing"), ("2.mp4", "was shortened"), ("3.mp4", "was exchanged")): assert any(name in line and why in line for line in said), (name, said)

def test_a_damaged_middle_is_a_reason_and_no_crash(copied):
    data = bytearray((copied / "2.mp4").read_bytes())
    data[len(data) // 3 : -200] = np.random.default_rng(1).bytes(len(data) - 200 - len(data) // 3)
    (copied / "2.mp4").write_bytes(data)
    found = load_batch(table(copied), Batch(Bucket("48px", 9, "1:1", 48, 48, 2), np.array([2, 1]), 0, 0))
    assert 1 in found.rows and len(found.rows) + len(found.lost) == 2              # a decoder may also conceal it

def test_two_processes_stay_in_step_when_all_of_a_batch_is_lost(copied):
    plan = some(Loader(table(copied), sampler(copied), workers=0), len(sampler(copied)))
    gone = next(b for b in plan if b.number % 2)
    for r in gone.rows: next(copied.glob(f"{r}.*")).unlink()
    ranks = [some(Loader(table(copied), sampler(copied), rank, 2, workers=0, say=lambda line: None), 4) for rank in (0, 1)]
    assert [[b.number for b in r] for r in ranks] == [[0, 2, 4, 6], [1, 3, 5, 7]] and all(b.last for r in ranks for b in r)
    stand_in = ranks[1][gone.number // 2]
    assert stand_in.share == 0 and len(stand_in) and [r for r, _ in stand_in.lost] == gone.rows.tolist() and stand_in.state == ranks[0][gone.number // 2].state
    assert all(b.share > 0 for r in ranks for b in r if b is not stand_in)

@pytest.mark.parametrize("per_step", (1, 2))
def test_alone_a_lost_batch_is_skipped_and_every_step_still_ends(copied, per_step):
    plan = some(Loader(table(copied), sampler(copied), workers=0), 6)
    for b in (plan[1], plan[2]):
        for r in b.rows: next(copied.glob(f"{r}.*")).unlink()
    found, said = some(Loader(table(copied), sampler(copied), per_step=per_step, workers=0, say=(said := []).append), 4), said
    assert [(b.number, b.share > 0, b.last) for b in found] == ([(0, True, True), (3, True, True), (4, True, True), (5, True, True)] if per_step == 1 else [(0, True, False), (1, False, True), (3, True, True), (4, True, False)])
    assert sum("none of its" in line for line in said) == 2

def test_too_many_lost_clips_end_the_run_with_a_reason(copied):
    loader = iter(Loader(table(copied), sampler(copied), workers=0, say=lambda line: None))
    next(loader)
    for f in copied.glob("*.mp4"): f.unlink()
    with pytest.raises(UserError, match=r"of the last \d+ clips could not be loaded, for instance .*cannot be opened"):
        for _ in range(40): next(loader)

def test_thousands_of_losses_are_told_in_a_few_lines(clips):
    said, loader = [], None
    loader = Loader(table(clips), sampler(clips), workers=0, say=said.append)
    loader.MOST = 2.0
    from opensora_nb.data.loader import _count, _Place
    lost = replace(load_batch(table(clips), Batch(Bucket("48px", 9, "1:1", 48, 48, 2), np.array([1]), 0, 0)), lost=[(k, f"clips/{k}.mp4: the end of the file is missing (3 bytes are missing)") for k in range(5000)])
    _count(loader, _Place(Batch(lost.bucket, np.arange(5001), 0, 0), 0, 1.0, True, None), lost)
    assert len(said) == 10 and len(loader.losses) == 1000 and sum(loader.reasons.values()) == 5000 and len(loader.reasons) == 1


# ---- memory, copies, garbage ----
def test_a_buffer_is_never_written_while_any_part_of_it_is_in_use():
    rng, ring, held = np.random.default_rng(0), Buffers(3, pinned=False), []
    for k in range(400):
        x = torch.full((int(rng.integers(1, 50)), 3), k % 250, dtype=(torch.uint8, torch.bfloat16, torch.float32)[k % 3])
        y = ring.hold(x)
        assert torch.equal(x, y)
        held.append((y[-1:], x[-1:].clone()))
        while len(held) > rng.integers(0, 6): held.pop(int(rng.integers(len(held))))
        assert all(torch.equal(part, copy) for part, copy in held)
    assert len(ring.slots) == 3 and ring.used > 200 and ring.missed > 10
    held.clear(); del y
    assert all(s.free for s in ring.slots)

def test_buffers_grow_to_the_largest_batch_and_stay():
    ring = Buffers(1, least=100, pinned=False)
    for size in (10, 500, 20): x = ring.hold(torch.zeros(size, dtype=torch.uint8)); place = x.data_ptr(); del x
    assert len(ring.slots) == 1 and ring.slots[0].memory.numel() == 500 and ring.slots[0].memory.data_ptr() == place

def test_a_thread_ahead_ends_with_its_consumer_and_hands_errors_on():
    before, closed = threading.active_count(), []
    def source():
        try:
            for k in range(1000): yield k
        finally: closed.append(True)
    stream = ahead(source(), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    stream.close()
    assert threading.active_count() == before and closed == [True]
    def broken(): yield 1; raise KeyError("x")
    with pytest.raises(KeyError): list(ahead(broken()))

def test_on_a_processor_batches_pass_through(clips):
    batches = some(Loader(table(clips), sampler(clips), workers=0), 2)
    assert all(a is b for a, b in zip(to_device(batches, "cpu"), batches))

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("overlap", (True, False))
def test_on_a_gpu_the_same_pixels_arrive(clips, overlap):
    expected = plain(some(Loader(table(clips), sampler(clips), workers=0, pin=False), 12))
    loader, found = Loader(table(clips), sampler(clips), workers=0), []
    for b in to_device(loader, "cuda", overlap):
        assert b.video.is_cuda
        torch.cuda._sleep(10_000_000)
        found += plain([b])
        if len(found) == 12: break
    assert found == expected and loader.buffers.used >= 12 and loader.buffers.slots[0].memory.is_pinned()

def test_garbage_is_collected_between_steps_only_and_as_before_afterwards():
    class Circle: pass
    def gone():
        c = Circle(); c.me = c
        return weakref.ref(c)
    with CollectBetweenSteps(3) as collect:
        ref = gone()
        for k in range(3): assert ref() is not None; [[] for _ in range(20_000)]; collect.step()
        assert ref() is None
    assert gc.isenabled()
    gc.disable()
    try:
        with CollectBetweenSteps(): pass
        assert not gc.isenabled(), "whoever had switched it off finds it so"
    finally: gc.enable()
    with pytest.raises(ValueError): CollectBetweenSteps(0)
