"The search for batch sizes: the report's rules on any machine of paper, and trials that are really watched and really ended."
import json, math

import pytest
from hypothesis import given, settings, strategies as st

from opensora_nb.cluster.files import UserError
from opensora_nb.commands.search_batch import Config, run
from opensora_nb.data.buckets import BucketTable, release_tables
from opensora_nb.training.search import Trial, Watched, kinds_of, largest, search

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 4096))
def test_the_largest_number_that_is_good_is_found_in_a_few_trials(k, guess, most):
    asked = []
    assert largest(lambda n: (asked.append(n), n <= k)[1], guess, most) == min(k, most)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(most + 1) + 3 and all(1 <= n <= most for n in asked)

@settings(max_examples=40, deadline=None)
@given(st.floats(200, 1e5), st.floats(1e-6, 1e-4), st.floats(0, 1e-8), st.floats(0.1, 3))
def test_the_three_rules_hold_and_no_batch_could_be_larger(limit, linear, square, backwards):
    def run(frames, height, width, batch):
        tokens = frames / 4 * height * width / 256
        seconds, memory = batch * (linear * tokens + square * tokens**2), 100 + batch * tokens * 0.5
        return Trial(frames, height, width, batch, 0.2 * seconds, seconds, backwards * seconds * (2 if frames == 1 else 1), memory, "memory" if memory > limit else None)
    table = release_tables()["stage1"]
    try: found = search(table, run, slack=1.0, most=512)
    except UserError: assert all(run(k.frames, k.height, k.width, 1).problem for k in kinds_of(table)); return
    ref, fits = found.reference, lambda t: t.problem is None and t.first_half <= found.reference.first_half and t.backward_s <= found.reference.backward_s
    assert (ref.frames, ref.height, ref.width) == max(((k.frames, k.height, k.width) for k in found.batches), key=math.prod) and (ref.batch == 512 or run(ref.frames, ref.height, ref.width, ref.batch + 1).problem == "memory")
    for kind, trial in found.batches.items(): assert fits(trial) and (trial.batch == 512 or not fits(run(kind.frames, kind.height, kind.width, trial.batch + 1)))
    lengths = {(name, t) for name, entries in found.table.lengths.items() for t in entries} | {(k.resolution, t) for k in found.left_out for t in k.lengths}
    assert lengths == {(name, t) for name, entries in table.lengths.items() for t in entries} and all(found.table.lengths[n][t][0] == table.lengths[n][t][0] for n in found.table.lengths for t in found.table.lengths[n])

def test_an_error_of_another_kind_is_said_and_not_taken_for_memory():
    with pytest.raises(UserError, match="129 frames of 256 x 256: ValueError: what"): search(release_tables()["stage1"], lambda f, h, w, b: Trial(f, h, w, b, problem="ValueError: what"))

@pytest.mark.slow
def test_a_trial_that_takes_too_much_is_ended_and_the_next_one_runs():
    watched = Watched("pocket", memory_mb=450, cached=True, say=lambda line: None)
    try:
        assert watched(32, 64, 64, 64).problem == "memory" and watched.child is None
        good = watched(8, 32, 32, 1)
        assert good.problem is None and 0 < good.memory_mb < 450 and good.forward_s > 0 and good.backward_s > 0 and len(watched.tried) == 2
        assert watched(8, 32, 32, 1) is good
        assert "ValueError" in watched(8, 36, 32, 1).problem, "a size that nobody can encode"
    finally: watched.close()

@pytest.mark.slow
def test_a_trial_can_be_that_of_one_of_several_who_share_weights_and_clips():
    found = []
    for more in ({}, dict(gpus=3, changes=dict(engine="zero2", context_parallel=3))):
        watched = Watched("pocket", memory_mb=2000, cached=True, say=lambda line: None, **more)
        try: found.append(watched(32, 64, 64, 4))
        finally: watched.close()
    assert found[0].problem is found[1].problem is None and found[1].memory_mb < 0.8 * found[0].memory_mb, found
    with pytest.raises(UserError, match="1 GPUs do not divide into groups of 4 that share a clip: --gpus 4, or --context-parallel 1"): Watched("stage3_768px_ti2v", memory_mb=2000)

@pytest.mark.slow
@pytest.mark.soak
def test_the_command_writes_a_table_that_training_takes(tmp_path, capsys):
    BucketTable({"64px": {32: (1.0, 8)}}, multiple=8).save(tmp_path / "in.json")
    assert run(Config("pocket", tmp_path / "out.json", memory=0.45, buckets=tmp_path / "in.json", cached=True)) == 0
    found, told = BucketTable.read(tmp_path / "out.json"), json.loads((tmp_path / "out.trials.json").read_text())
    assert found.lengths["64px"][32][1] == told["reference"]["batch"] >= 1 and "up to  32 frames" in capsys.readouterr().out
    assert any(t["problem"] == "memory" for t in told["trials"])
