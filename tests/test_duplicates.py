"Near-duplicates: copies are found, others are not, and what stays does not depend on the order or the number of clips."
import sys
from itertools import combinations
import cv2, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from opensora_nb.cluster.files import UserError
from opensora_nb.data.duplicates import DuplicateConfig, bucket_pairs, find_duplicates, frame_hashes, hash_distance, representatives
from opensora_nb.data.footage import sample_clips
from opensora_nb.data.video import decode, write_video
from opensora_nb.data.world import render, world_truth

def three(clip): return [clip[0], clip[len(clip) // 2], clip[-1]]
def logo(c):
    out, h, w = c.copy(), *c.shape[1:3]
    for f in out: cv2.putText(f, "TV 1", (int(0.05 * w), int(0.12 * h)), cv2.FONT_HERSHEY_SIMPLEX, h / 350, (255, 255, 255), max(1, h // 150), cv2.LINE_AA)
    return out
def resized(c, share): return np.stack([cv2.resize(f, None, fx=share, fy=share, interpolation=cv2.INTER_AREA if share < 1 else cv2.INTER_CUBIC) for f in c])
COPIES = {"half": lambda c: resized(c, 0.5), "double": lambda c: resized(c, 2), "bright": lambda c: np.clip(c * 1.1, 0, 255).astype(np.uint8), "dark": lambda c: (c * 0.9).astype(np.uint8),
          "logo": logo, "unboxed": lambda c: c[:, 2:-2]}

@pytest.fixture(scope="module")
def clips():
    out = {f"world {i}": render(world_truth(11, i), 192, 24) for i in range(24)}
    out |= {name: decode(sample_clips()[name], 0.2, 1.0) for name in ("bigbuckbunny", "carphone_pristine")}
    return out | {f"bikes {at}": decode(sample_clips()["bikes"], at, at + 0.8) for at in (0.1, 1.5, 3.5, 6.0, 8.0)}

@pytest.fixture(scope="module")
def prints(clips): return {name: frame_hashes(three(c)) for name, c in clips.items()}

@pytest.mark.parametrize("change", COPIES)
def test_copies_are_found_and_nothing_else(clips, prints, change):
    names, hashes = [*prints, *(f"{n} copy" for n in clips)], [*prints.values(), *(frame_hashes(three(COPIES[change](c))) for c in clips.values())]
    assert find_duplicates(names, hashes, [not n.endswith("copy") for n in names]) == {f"{n} copy": n for n in clips}

def test_copies_compressed_at_crf_35_are_found(clips, prints, tmp_path):
    for name in [n for n in clips if "world" not in n] + ["world 0", "world 7"]:
        again = frame_hashes(three(decode(write_video(tmp_path / "c.mp4", clips[name], crf=35))))
        assert find_duplicates([*prints, "copy"], [*prints.values(), again], [1] * len(prints) + [0]) == {"copy": name}

def test_different_clips_photographs_and_mirrors_stay(clips, prints):
    frames = {f"photo {n}": frame_hashes([c[0]]) for n, c in clips.items()}
    everything = prints | frames | {f"mirrored {n}": frame_hashes([f[:, ::-1] for f in three(c)]) for n, c in clips.items() if "world" not in n}
    assert find_duplicates(list(everything), list(everything.values()), [0] * len(everything)) == {}

def test_a_real_copy_in_bad_quality_goes(prints):
    bad = frame_hashes(three(decode(sample_clips()["carphone_distorted"], 0.2, 1.0)))
    assert find_duplicates([*prints, "bad"], [*prints.values(), bad], [2] * len(prints) + [1]) == {"bad": "carphone_pristine"}

def test_flat_frames_have_no_hash():
    rng = np.random.default_rng(0)
    for level in (0, 16, 128, 235, 255):
        flat = np.full((90, 160, 3), level, np.uint8)
        assert frame_hashes([flat, np.clip(flat + rng.normal(0, 6, flat.shape), 0, 255).astype(np.uint8)]) == [0, 0]
    assert frame_hashes([np.full((20, 20, 3), (200, 30, 40), np.uint8)]) == [0] and frame_hashes([]) == []

@pytest.mark.parametrize("shape", [(16, 16), (1, 400), (33, 17), (1080, 1920)])
def test_a_frame_of_any_shape_has_one_hash_of_64_bits(shape):
    frame = np.random.default_rng(1).integers(0, 255, (*shape, 3), dtype=np.uint8)
    one = frame_hashes([frame])
    assert len(one) == 1 and 0 <= one[0] < 2**64 and type(one[0]) is int and frame_hashes([frame[:, ::-1][:, ::-1]]) == one

def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(UserError, match="pip install 'opensora_nb\\[curation\\]'"): frame_hashes([np.zeros((8, 8, 3), np.uint8)])

def near_family(draw):
    "Hashes in a few families, within them a few bits apart, some of them flat."
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, families, flips = draw(st.integers(0, 60)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    h = rng.integers(1, 2**64, (families, 3), dtype=np.uint64)[rng.integers(0, families, n)]
    for _ in range(flips): h = h ^ np.where(rng.random((n, 3)) < 0.6, np.uint64(1) << rng.integers(0, 64, (n, 3), dtype=np.uint64), np.uint64(0))
    h[rng.random((n, 3)) < draw(st.sampled_from([0, 0.2]))] = 0
    return h, rng, [f"film {k}" for k in rng.integers(0, draw(st.sampled_from([1, 3, 50])), n)]

def by_force(h, sources, cfg):
    "All pairs, from the best to the worst."
    keeper = []
    for i in range(len(h)):
        near = [j for j in range(i) if keeper[j] < 0 and hash_distance(h[i], h[j]) <= cfg.max_distance]
        keeper.append(near[0] if near and (len(near) >= cfg.alike_per_source or any(sources[j] != sources[i] for j in near)) else -1)
    return keeper

@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_stays_is_what_comparing_all_with_all_leaves(data):
    h, _, sources = near_family(data.draw)
    cfg = DuplicateConfig(max_distance=6, leaders=100)                     # up to 6 bits no pair is missed
    keeper, _ = representatives(h, sources, cfg)
    assert [k < 0 for k in keeper] == [k < 0 for k in by_force(h, sources, cfg)]

@settings(max_examples=25, deadline=None)
@given(st.data())
def test_order_is_without_influence_and_who_goes_has_a_better_one_that_stays(data):
    h, rng, sources = near_family(data.draw)
    ids, quality = [f"{k:03d}" for k in range(len(h))], [(int(q), None if q % 2 else 0.5) for q in rng.integers(0, 4, len(h))]
    cfg = data.draw(st.sampled_from([DuplicateConfig(), DuplicateConfig(alike_per_source=1), DuplicateConfig(max_distance=4, alike_per_source=2, leaders=2)]))
    copies = find_duplicates(ids, h.tolist(), quality, cfg, sources)
    p = rng.permutation(len(h)).tolist()
    assert find_duplicates([ids[k] for k in p], h[p].tolist(), [quality[k] for k in p], cfg, [sources[k] for k in p]) == copies
    worth = [(a, -1 if b is None else b) for a, b in quality]
    for c, b in ((int(c), int(b)) for c, b in copies.items()):
        assert ids[b] not in copies and hash_distance(h[c], h[b]) <= cfg.max_distance and (worth[b], -b) > (worth[c], -c)
    if cfg.alike_per_source == 1: assert not [1 for i, j in combinations([k for k in range(len(h)) if ids[k] not in copies], 2) if hash_distance(h[i], h[j]) <= 4], "nothing near is left"

def test_work_is_bounded_however_crowded():
    rng = np.random.default_rng(0)
    for n, h in ((3000, rng.integers(1, 2**64, (3000, 3), dtype=np.uint64)), (3000, np.full((3000, 3), 12345, np.uint64)), (3000, rng.integers(1, 2**64, (3000, 3), dtype=np.uint64) & np.uint64(0xFFFF))):
        for sources in (range(n), [0] * n):
            keeper, compared = representatives(h, sources)
            assert compared <= 4 * 28 * 3 * 8 * n
    keeper, compared = representatives(np.full((3000, 3), 12345, np.uint64), range(3000))
    assert (keeper < 0).sum() == 1 and compared < 10 * 3000, "copies leave after the first pass"

def test_a_static_shot_keeps_some_parts_and_its_second_upload_none():
    rng = np.random.default_rng(0)
    base = rng.integers(1, 2**64, 3, dtype=np.uint64) ^ (np.uint64(1) << rng.integers(0, 64, (60, 3), dtype=np.uint64))
    ids, films = [f"{f}{k:02d}" for f in "ab" for k in range(30)], [f for f in "ab" for _ in range(30)]
    for keep in (1, 4, 8):
        copies = find_duplicates(ids, base.tolist(), [f == "a" for f in films], DuplicateConfig(alike_per_source=keep), films)
        assert [i for i in ids if i not in copies] == [f"a{k:02d}" for k in range(keep)]

def test_two_parts_of_one_long_still_shot_both_stay():
    clip = render(world_truth(11, 0), 96, 8)
    assert find_duplicates(["p0", "p1"], [frame_hashes(three(clip))] * 2, [0, 0], sources=["a.mp4", "a.mp4"]) == {}
    assert find_duplicates(["p0", "p1"], [frame_hashes(three(clip))] * 2, [0, 0], sources=["a.mp4", "b.mp4"]) == {"p1": "p0"}

def test_images_are_not_compared_with_clips_nor_anything_without_a_picture():
    real = frame_hashes([render(world_truth(11, 0), 96, 2)[0]])
    assert find_duplicates("abcd", [real, real * 3, [], [0, 0, 0]], [0] * 4) == {}
    assert find_duplicates("ab", [real, real], [float("nan"), 0]) == {"a": "b"}
    assert find_duplicates("ab", [real, real], [0, 0], DuplicateConfig(enabled=False)) == {}

def test_wrong_calls_and_settings_fail_at_once():
    for wrong in (("ab", [[1]], [0, 0]), ("aa", [[1], [1]], [0, 0])):
        with pytest.raises(ValueError): find_duplicates(*wrong)
    for wrong in (dict(max_distance=-1), dict(max_distance=65), dict(alike_per_source=0), dict(alike_per_source=9)):
        with pytest.raises(ValueError): DuplicateConfig(**wrong)
    assert bucket_pairs(np.empty((0, 3), np.uint64), 0, (0, 1))[0].shape == (0, 2)
