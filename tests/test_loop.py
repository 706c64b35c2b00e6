"The training loop and its checkpoints: exact resumption after Ctrl-C and kill -9, alone or with a rival, order of samples, learning rate, averaged weights, faults."
import json, math, os, shutil, signal, subprocess, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from opensora_nb.cluster.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from opensora_nb.cluster.files import UserError
from opensora_nb.cluster.engine import Engine
from opensora_nb.training.loop import LoopConfig, Rival, Shuffled, StopRequest, learning_rate, read_log, sample_indices, train, update_average

# ---- a real run, also as a program of its own ----
PROGRAM = """
import sys, time, torch
from torch import nn
from opensora_nb.training.loop import LoopConfig, Rival, Shuffled, train

def fit(run, delay=0.0, bad_at=0, sample=None, about=dict(data="points"), **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 1))
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)); y = x.prod(1, keepdim=True)
    calls = 0
    def loss(batch, generator):
        nonlocal calls; calls += 1
        time.sleep(delay)
        noise = 0.05 * torch.randn(len(batch.rows), 1, generator=generator)
        error = (model(x[batch.rows]) - y[batch.rows] - noise).square().mean()
        return dict(loss=error * float("nan") if calls == bad_at else error)
    cfg = LoopConfig(**(dict(steps=40, batch_size=7, lr=0.01, warmup=5, final_lr=0.1, ema=0.9, precision="fp32", save_every=8) | changes))
    return train(model, loss, Shuffled(50, cfg), cfg, run, about, dict(width=16), sample=sample, quiet=True)

def duel(run, delay=0.0, bad_at=0, plays=lambda step: True, watch=None, helper=True, **changes):
    "A model with a helper against a rival with dropout, each with settings of its own."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
    side = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)) if helper else None
    judge = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1))
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.2])
    calls, left = 0, None
    def loss(batch, generator):
        nonlocal calls, left; calls += 1
        time.sleep(delay)
        made = model(torch.randn(len(batch.rows), 2, generator=generator))
        left = x[batch.rows], made.detach()
        parts = dict(loss=made.square().mean() + (side(made).sub(1).square().mean() if side else 0))
        if rival.playing: parts |= dict(loss=parts["loss"] - judge(made).mean(), against=judge(made).mean().detach())
        assert all(not p.requires_grad and p.grad is None for p in judge.parameters())
        return parts
    def theirs():
        real, fake = judge(left[0]), judge(left[1])
        charge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
        return dict(loss=charge * float("nan") if calls == bad_at else charge, real=real.mean().detach())
    cfg = LoopConfig(**(dict(steps=40, batch_size=7, lr=0.01, warmup=5, final_lr=0.1, ema=0.9, precision="fp32", save_every=8) | changes))
    rival = Rival(judge, theirs, lr=0.03, betas=(0.5, 0.9), eps=1e-8, plays=plays, watch=watch)
    return train(model, loss, Shuffled(50, cfg), cfg, run, dict(data="ring"), dict(width=8), quiet=True, helper=side, rival=rival), judge, side

if __name__ == "__main__":
    try: (duel if "duel" in sys.argv else fit)(sys.argv[1], delay=float(sys.argv[2]))
    except KeyboardInterrupt as e: sys.exit(f"interrupted: {e}")
"""
space = {"__name__": "program"}
exec(PROGRAM, space)
fit, duel = space["fit"], space["duel"]

PARTS = ("data", "forward", "backward", "optimizer", "logging")
COSTS = {"seconds", *(f"seconds_{p}" for p in (*PARTS, "rival", "saving", "sampling")), "samples_per_s", "memory_gb"}      # of a step, never twice the same

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def error(work, *words):
    "The one line of the UserError that `work` raises."
    with pytest.raises(UserError) as e: work()
    line = str(e.value)
    assert "\n" not in line and len(line) < 500 and all(w in line for w in words), line
    return line

def steps(run): return [json.loads(line)["step"] for line in (Path(run) / "log.jsonl").read_text().splitlines() if line]

def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, fit(run)


# ---- resumption ----
@pytest.mark.slow
def test_a_run_that_is_interrupted_and_then_killed_ends_like_one_that_was_not(straight, tmp_path):
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    def start_and_stop_at(step, number):
        p = subprocess.Popen([sys.executable, program, run, "0.05"], stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 300
        while not (run / "log.jsonl").exists() or not (done := steps_so_far()) or done[-1] < step:
            assert p.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        p.send_signal(number)
        err = p.communicate(timeout=300)[1]
        return p.returncode, err
    def steps_so_far(): return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]

    code, err = start_and_stop_at(5, signal.SIGINT)
    stopped = steps(run)[-1]
    assert code == 1 and f"stopped at step {stopped} of 40; the same command goes on from there" in err and "Traceback" not in err
    assert [p.name for p in checkpoints(run / "checkpoints")] == [f"step-{stopped:07d}"]            # saved where it stopped, not where the next was due
    code, err = start_and_stop_at(stopped + 12, signal.SIGKILL)
    assert code == -signal.SIGKILL and not err
    last = int(checkpoints(run / "checkpoints")[-1].name[5:])
    assert stopped < last <= steps(run)[-1]
    with open(run / "log.jsonl", "a") as log: log.write('{"step": 99, "lo')                        # and the line that the kill cut in two

    resumed = fit(run)
    assert equal(resumed, straight[1]) and steps(run) == list(range(1, 41))
    a, b = read_log(run), read_log(straight[0])
    assert a.keys() == b.keys() and all(a[k] == b[k] for k in a.keys() - COSTS)
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-0000032", "step-0000040"]

def test_the_curves_of_tensorboard_have_each_step_once(straight, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))      # file 9 of a second, and 10, which comes before it by name
    run = tmp_path / "run"
    with pytest.raises(UserError): fit(run, bad_at=13)                                             # curves up to 12, checkpoint at 8
    fit(run)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 41))
    assert [round(e.value, 5) for e in board.Scalars("loss")] == pytest.approx(read_log(straight[0])["loss"], abs=2e-5)

def test_a_finished_run_is_returned_as_it_is(straight):
    before = contents(straight[0] / "checkpoints") | {"log": (straight[0] / "log.jsonl").read_bytes()}
    assert equal(fit(straight[0], bad_at=1), straight[1])                                          # not one step more
    assert before == contents(straight[0] / "checkpoints") | {"log": (straight[0] / "log.jsonl").read_bytes()}

def test_without_averaging_the_weights_are_the_last_ones(tmp_path):
    a = fit(tmp_path / "a", ema=0.0)
    with pytest.raises(UserError): fit(tmp_path / "b", ema=0.0, bad_at=20)
    assert equal(fit(tmp_path / "b", ema=0.0), a)
    weights, state = load_checkpoint(checkpoints(tmp_path / "a/checkpoints")[-1])
    assert all(torch.equal(weights[k], v) and torch.equal(state["weights"][k], v) for k, v in a.state_dict().items())

def test_half_written_checkpoints_are_ignored_and_do_not_pile_up(straight, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    for name in (".step-abc123", "step-12", "step-0000099.tmp"): (folder / name).mkdir(parents=True); (folder / name / "state.pt").write_bytes(b"half")
    (folder / "step-note.txt").write_text("mine")
    assert checkpoints(folder) == [] and equal(fit(run), straight[1])
    assert [p.name for p in checkpoints(folder)] == ["step-0000032", "step-0000040"]
    assert not (folder / ".step-abc123").exists() and (folder / "step-note.txt").exists()           # litter of a kill goes, what somebody put there stays

def test_an_unreadable_checkpoint_is_one_line_and_the_one_before_it_serves(straight, tmp_path):
    run = shutil.copytree(straight[0], tmp_path / "run")
    last = checkpoints(run / "checkpoints")[-1]
    for name, spoil in (("state.pt", lambda d: d[: len(d) // 2]), ("state.pt", lambda d: b""), ("model.safetensors", lambda d: d[:-5]), ("state.pt", None), ("model.safetensors", None)):
        data = (last / name).read_bytes()
        (last / name).unlink() if spoil is None else (last / name).write_bytes(spoil(data))
        before = contents(run)
        error(lambda: fit(run), "step-0000040", "remove the folder")
        assert contents(run) == before
        (last / name).write_bytes(data)
    shutil.rmtree(last)
    assert equal(fit(run), straight[1]) and steps(run) == list(range(1, 41))

def test_a_pickle_that_would_run_code_is_refused(straight, tmp_path):
    run = shutil.copytree(straight[0], tmp_path / "run")
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/ran",)
    torch.save(dict(step=40, it=Bomb()), checkpoints(run / "checkpoints")[-1] / "state.pt")
    error(lambda: fit(run), "cannot read checkpoint")
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("other, words", [(dict(lr=0.02), ("loop.lr is 0.01 there, 0.02 here",)), (dict(batch_size=8), ("loop.batch_size",)), (dict(about=dict(data="other")), ("data is points there",)),
                                          (dict(about=dict(data="points", extra=1)), ("extra is None there, 1 here",))], ids=str)
def test_other_settings_in_the_folder_of_a_run_are_refused_and_change_nothing(straight, other, words):
    before = contents(straight[0])
    error(lambda: fit(straight[0], **other), *words)
    assert contents(straight[0]) == before

def test_a_config_file_that_is_none_is_one_line(straight, tmp_path):
    run = shutil.copytree(straight[0], tmp_path / "run")
    (run / "config.json").write_text("{")
    error(lambda: fit(run), "config.json")

def test_a_loss_that_is_not_finite_is_one_line_and_keeps_the_last_checkpoint(tmp_path):
    for part, bad in (("loss", 20), ("first step", 1)):
        run = tmp_path / part
        error(lambda: fit(run, bad_at=bad), f"not finite at step {bad}", "lower the learning rate (0.01)", "samples number ", "the last good checkpoint is step-0000016" if bad == 20 else "no checkpoint yet")
        assert steps(run) == list(range(1, bad))
    assert [p.name for p in checkpoints(tmp_path / "loss/checkpoints")] == ["step-0000008", "step-0000016"] and not checkpoints(tmp_path / "first step/checkpoints")
    weights, _ = load_checkpoint(checkpoints(tmp_path / "loss/checkpoints")[-1])
    assert all(torch.isfinite(v).all() for v in weights.values())

def test_a_gradient_that_is_not_finite_stops_as_well(tmp_path):
    model = nn.Linear(1, 1)
    cfg = LoopConfig(steps=3, precision="fp32")
    error(lambda: train(model, lambda b, g: dict(loss=model(torch.zeros(1, 1)).sub(model.bias).abs().sqrt().sum()), Shuffled(4, cfg), cfg, tmp_path, {}, {}, quiet=True), "not finite at step 1", "no checkpoint yet")

@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_is_used_where_it_saves_time(able, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora_nb.training.loop.computes_bf16", lambda device: able)
    layer, seen = nn.Linear(4, 4), []
    def loss(batch, generator):
        seen.append((y := layer(torch.ones(1, 4))).dtype)
        return dict(loss=y.float().square().mean())
    cfg = LoopConfig(steps=2, muon=1.0)
    train(layer, loss, Shuffled(4, cfg), cfg, tmp_path, {}, {}, quiet=True, units=[layer])
    assert seen == [torch.bfloat16 if able else torch.float32] * 2 and all(torch.isfinite(p).all() for p in layer.parameters())


# ---- two players ----
@pytest.fixture(scope="module")
def duelled(tmp_path_factory):
    run = tmp_path_factory.mktemp("duel") / "run"
    return run, duel(run)

@pytest.mark.slow
def test_a_duel_that_is_killed_ends_like_one_that_was_not(duelled, tmp_path):
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    p = subprocess.Popen([sys.executable, program, run, "0.05", "duel"], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (done := checkpoints(run / "checkpoints")) or len((run / "log.jsonl").read_text().splitlines()) < int(done[0].name[5:]) + 3:
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    assert p.wait(300) == -signal.SIGKILL and 8 < steps(run)[-1] < 40
    again = duel(run)
    assert all(equal(a, b) for a, b in zip(again, duelled[1])) and steps(run) == list(range(1, 41))
    a, b = read_log(run), read_log(duelled[0])
    assert a.keys() == b.keys() >= {"against", "discriminator_loss", "discriminator_real", "discriminator_grad_norm"} and all(a[k] == b[k] for k in a.keys() - COSTS)

def test_both_players_and_the_helper_learn_and_only_the_model_is_in_the_weights(duelled):
    torch.manual_seed(0)
    fresh = [nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1))]
    model, judge, side = duelled[1]
    moved = [{k for (k, a), b in zip(old.state_dict().items(), new.state_dict().values()) if not torch.equal(a, b)} for old, new in zip(fresh, (model, side, judge))]
    assert moved[0] == set(model.state_dict()) and moved[1] == {"0.weight", "0.bias"} and moved[2] == set(judge.state_dict())
    weights, state = load_checkpoint(checkpoints(duelled[0] / "checkpoints")[-1])
    assert weights.keys() == model.state_dict().keys() and state["helper"].keys() == {"0.weight", "0.bias"}, "what is frozen is not saved"
    assert all(torch.equal(v, state["rival"]["weights"][k]) for k, v in judge.state_dict().items())
    for optimizer, lr, betas in ((state["optimizer"], 0.01, (0.9, 0.999)), (state["rival"]["optimizer"], 0.03, (0.5, 0.9))):
        group = optimizer["param_groups"][0]
        assert tuple(group["betas"]) == betas and group["lr"] == pytest.approx(learning_rate(LoopConfig(steps=40, lr=lr, warmup=5, final_lr=0.1), 39)), "one schedule, two rates"

def test_a_rival_that_does_not_play_yet_neither_moves_nor_counts(tmp_path):
    kept = []
    def plays(step):
        kept.append(step)
        return step >= 17
    duel(tmp_path / "run", plays=plays, steps=20)
    log = read_log(tmp_path / "run")
    assert kept == list(range(20)) and [v is None for v in log["discriminator_loss"]] == [v is None for v in log["against"]] == [True] * 17 + [False] * 3
    weights, state = load_checkpoint(tmp_path / "run/checkpoints/step-0000016")
    assert not state["rival"]["optimizer"]["state"] and state["rival"]["weights"]["1.num_batches_tracked"] == 0

def test_a_rival_whose_loss_is_not_finite_is_one_line_and_keeps_the_last_checkpoint(tmp_path):
    error(lambda: duel(tmp_path / "run", bad_at=20), "the discriminator's loss is not finite at step 20", "lower the learning rate (0.03)")
    assert steps(tmp_path / "run") == list(range(1, 20)) and [p.name for p in checkpoints(tmp_path / "run/checkpoints")] == ["step-0000008", "step-0000016"]
    assert equal(duel(tmp_path / "run")[1], duel(tmp_path / "other")[1])                                # and the run goes on from there

class Watch:
    "Warns at step 14, holds checkpoints back from then on, gives up at step `end`."
    def __init__(self, end): self.end, self.calls, self.over, self.doubtful = end, 0, False, False
    def __call__(self, values):
        self.calls += 1
        self.doubtful, self.over = self.calls >= 14, self.calls == self.end
        assert values["discriminator_loss"] > 0 and values["grad_norm"] > 0
        return "it teaches nothing" if self.calls in (14, self.end) else None

def test_a_rival_that_stops_teaching_is_said_and_then_stops_the_run_with_the_last_good_checkpoint_kept(tmp_path):
    run = tmp_path / "run"
    line = error(lambda: duel(run, watch=Watch(30)), "run: it teaches nothing; stopped at step 30", "the last checkpoint is from before")
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-0000008"] and steps(run) == list(range(1, 31))
    assert [i for i, w in enumerate(read_log(run)["warning"], 1) if w] == [14, 30]

def test_a_doubt_at_the_end_does_not_lose_the_end(tmp_path):
    duel(tmp_path / "run", watch=Watch(99))
    assert [p.name for p in checkpoints(tmp_path / "run/checkpoints")] == ["step-0000008", "step-0000040"]

def test_dropout_is_a_function_of_seed_and_step(tmp_path):
    seen = []
    def run(folder, seed):
        torch.manual_seed(len(seen))                                                                     # whatever went on before
        model, calls = nn.Linear(4, 1), []
        def loss(i, g):
            calls.append(torch.nn.functional.dropout(torch.ones(20), 0.5).tolist())
            return dict(loss=model(torch.ones(1, 4)).square().sum())
        cfg = LoopConfig(steps=3, seed=seed)
        train(model, loss, Shuffled(4, cfg), cfg, folder, {}, {}, quiet=True)
        seen.append(calls)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)): run(tmp_path / name, seed)
    assert seen[0] == seen[1] != seen[2] and len({tuple(c) for c in seen[0]}) == 3


# ---- signals ----
def test_the_first_ctrl_c_is_a_request_and_the_second_is_obeyed():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with StopRequest(apart=0) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

def test_the_same_wish_from_slurm_and_from_torchrun_is_one_request():
    with StopRequest() as stop:
        for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM): signal.raise_signal(s)
        assert stop.asked

def test_a_request_during_the_last_step_lets_the_run_finish(tmp_path):
    model, calls = nn.Linear(1, 1), 0
    def loss(batch, generator):
        nonlocal calls; calls += 1
        if calls == 3: signal.raise_signal(signal.SIGTERM)
        return dict(loss=model(torch.ones(1, 1)).square().sum())
    cfg = LoopConfig(steps=3)
    assert train(model, loss, Shuffled(4, cfg), cfg, tmp_path, {}, {}, quiet=True) is model and steps(tmp_path) == [1, 2, 3]


# ---- what the samples on the way see ----
def test_samples_are_drawn_with_averaged_weights_and_disturb_nothing(straight, tmp_path):
    seen = []
    def sample(model, path, step):
        assert not model.training and not torch.is_grad_enabled() and path == tmp_path / "run/samples" / f"{step:07d}"
        seen.append((step, {k: v.clone() for k, v in model.state_dict().items()}))
    fit(tmp_path / "run", sample=sample, sample_every=16)
    assert all(torch.equal(v, straight[1].state_dict()[k]) for k, v in seen[-1][1].items())
    assert [s for s, _ in seen] == [16, 32, 40]
    at_32, _ = load_checkpoint(tmp_path / "run/checkpoints/step-0000032")
    assert all(torch.equal(v, at_32[k]) for k, v in seen[1][1].items())


# ---- order of samples ----
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 3))
def test_each_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(sample_indices(n, seed, epoch * n, n)) == list(range(n))

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_the_order_does_not_depend_on_the_batches(n, seed, batches):
    whole, at = sample_indices(n, seed, 0, sum(batches)), 0
    for size in batches:
        assert sample_indices(n, seed, at, size) == whole[at : at + size]
        at += size
    assert max(Counter(whole).values()) - min(Counter({i: 0 for i in range(n)} | Counter(whole)).values()) <= 1      # nobody is ever two samples ahead

def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [tuple(sample_indices(20, seed, epoch * 20, 20)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9

def test_no_samples_at_all_is_one_line():
    error(lambda: Shuffled(0, LoopConfig()), "no samples")


# ---- learning rate, averaged weights, settings ----
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 50), st.floats(0, 1))
def test_the_learning_rate_rises_in_a_line_and_falls_to_its_end(steps, warmup, final):
    cfg = LoopConfig(steps=steps, warmup=warmup, lr=2.0, final_lr=final)
    rates = [learning_rate(cfg, i) for i in range(warmup + steps + 5)]
    assert all(abs(r - 2 * (i + 1) / warmup) < 1e-12 for i, r in enumerate(rates[:warmup])) and rates[warmup] == pytest.approx(2.0)
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :])) and all(r >= 2 * final - 1e-12 for r in rates[warmup:])
    if steps > warmup: assert learning_rate(cfg, steps) == pytest.approx(2 * final, abs=1e-9) and learning_rate(cfg, (steps + warmup) / 2) == pytest.approx(1 + final)

def test_the_log_tells_the_learning_rate_of_each_step(straight):
    cfg = LoopConfig(steps=40, batch_size=7, lr=0.01, warmup=5, final_lr=0.1)
    assert read_log(straight[0])["lr"] == [learning_rate(cfg, i) for i in range(40)] and read_log(straight[0])["samples"] == [7 * i for i in range(1, 41)]

def test_the_average_follows_fast_at_first_and_slowly_later():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = {"weight": torch.zeros(1, 1)}
    expected = 0.0
    for step in range(1, 30):
        update_average(average, model, 0.6, step)
        d = min(0.6, (1 + step) / (10 + step))
        expected = d * expected + 1 - d
        assert average["weight"].item() == pytest.approx(expected, abs=1e-6)
    assert expected > 0.999

def test_counters_are_copied_not_averaged():
    model = nn.BatchNorm1d(2)
    model.num_batches_tracked += 41
    average = {k: v.clone() for k, v in nn.BatchNorm1d(2).state_dict().items()}
    update_average(average, model, 0.99, 3)
    assert average["num_batches_tracked"].item() == 41

@pytest.mark.parametrize("bad", [dict(steps=0), dict(batch_size=0), dict(save_every=0), dict(keep=0), dict(precision="fp8"), dict(lr=-1.0), dict(lr=math.nan), dict(lr=0.0), dict(lr=math.inf), dict(ema=1.0), dict(ema=-0.1), dict(warmup=-1), dict(batches_per_step=-1), dict(sample_every=-1), dict(lr_switch=((5, 0.0),)), dict(lr_switch=((9, 1e-3), (5, 1e-3)))], ids=str)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="lr" if "lr_switch" in bad else next(iter(bad))): LoopConfig(**bad)

def test_the_learning_rate_is_switched_at_its_step():
    cfg = LoopConfig(steps=100, lr=5e-5, lr_switch=((40, 3e-5), (90, 1e-5)))
    assert [learning_rate(cfg, i) for i in (0, 39, 40, 89, 90, 99)] == [5e-5, 5e-5, 3e-5, 3e-5, 1e-5, 1e-5]


# ---- batches of a step ----
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_any_number_of_processes_deals_out_the_same_batches(n, size, data):
    parts = data.draw(st.integers(1, size))
    processes = data.draw(st.sampled_from([p for p in range(1, parts + 1) if parts % p == 0]))
    cfg, dealt = LoopConfig(batch_size=size, batches_per_step=parts), []
    for rank in range(processes):
        engine = Engine("cpu"); engine.rank, engine.world_size = rank, processes
        feed, lasts = iter(Shuffled(n, cfg, engine)), 0
        while lasts < 3:
            batch = next(feed); dealt.append(batch); lasts += batch.last
            assert (batch.state is None) != batch.last
    dealt.sort(key=lambda b: b.number)
    alone, whole = iter(Shuffled(n, cfg)), sample_indices(n, 42, 0, 3 * size)
    assert [(b.number, b.rows, b.share) for b in dealt] == [(b.number, b.rows, b.share) for b in (next(alone) for _ in range(3 * parts))]
    assert sorted(i for b in dealt for i in b.rows) == sorted(whole) and abs(sum(b.share for b in dealt) - 3) < 1e-9

def test_what_cannot_be_dealt_out_is_one_line():
    engine = Engine("cpu"); engine.world_size = 2
    error(lambda: Shuffled(9, LoopConfig(batch_size=4, batches_per_step=3), engine), "3 batches a step", "multiple of 2")
    error(lambda: Shuffled(9, LoopConfig(batch_size=1), engine), "2 batches a step of 1 samples")

def test_one_batch_or_several_give_the_same_step(tmp_path):
    def line(name, parts):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 1), torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        cfg = LoopConfig(steps=12, batch_size=7, batches_per_step=parts, lr=0.05, precision="fp32")
        return train(model, lambda b, g: dict(loss=(model(x[b.rows]) - x[b.rows].sum(1, keepdim=True)).square().mean()), Shuffled(50, cfg), cfg, tmp_path / name, {}, {}, quiet=True)
    one, three = line("one", 1), line("three", 3)
    assert torch.allclose(one.weight, three.weight, atol=1e-6) and read_log(tmp_path / "one")["loss"] == pytest.approx(read_log(tmp_path / "three")["loss"], rel=1e-4)
    for log in map(read_log, (tmp_path / "one", tmp_path / "three")): 
        assert log.keys() >= COSTS - {"seconds_rival", "seconds_saving", "seconds_sampling"}
        assert all(0 < sum(parts) <= s * 1.01 for s, *parts in zip(*(log[k] for k in ("seconds", *(f"seconds_{p}" for p in PARTS)))))


# ---- checkpoints ----
def test_a_checkpoint_holds_what_was_saved_and_only_the_newest_stay(tmp_path):
    for step in (1, 2, 30): save_checkpoint(tmp_path, step, {"w": torch.full((2,), float(step))}, dict(width=2), dict(samples=step, nested=[dict(a=torch.arange(3))]), keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000002", "step-0000030"]
    weights, state = load_checkpoint(tmp_path / "step-0000030")
    assert weights["w"].tolist() == [30, 30] and state["step"] == 30 and state["nested"][0]["a"].tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "step-0000030/config.json").read_text()) == dict(width=2)

def test_saving_the_same_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0): save_checkpoint(tmp_path, 5, {"w": torch.tensor(value)}, {}, {})
    assert load_checkpoint(tmp_path / "step-0000005")[0]["w"] == 2 and os.listdir(tmp_path) == ["step-0000005"]

def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_keeps_the_others(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, {}, {}, keep=1)
    with pytest.raises(Exception): save_checkpoint(tmp_path, 2, {"w": torch.zeros(1)}, {}, dict(bad=lambda: 0), keep=1)
    assert os.listdir(tmp_path) == ["step-0000001"] and load_checkpoint(tmp_path / "step-0000001")[1]["step"] == 1
