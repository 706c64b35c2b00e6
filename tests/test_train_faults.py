"What goes wrong while a training runs: the disk fills up, a checkpoint is another model's, the log is half written. Nothing good is lost, one line says what to do."
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
from torch import nn

from opensora_nb.cluster.checkpoint import checkpoints, load_checkpoint
from opensora_nb.cluster.files import UserError
from opensora_nb.training.loop import LoopConfig, Shuffled, read_log, train

PROGRAM = """
import resource, sys, torch
from torch import nn
from opensora_nb.commands.cli import exit_code
from opensora_nb.training.loop import LoopConfig, Shuffled, train

def fit(run, limit=0, width=500):
    "From the fifth step on no file may grow beyond `limit` bytes, as on a disk that is full."
    torch.manual_seed(0)
    model, x, calls = nn.Linear(100, width), torch.randn(50, 100, generator=torch.Generator().manual_seed(1)), 0
    def loss(batch, generator):
        nonlocal calls; calls += 1
        if limit and calls == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return dict(loss=(model(x[batch.rows]) - 1).square().mean())
    cfg = LoopConfig(steps=12, batch_size=7, lr=0.01, ema=0.9, precision="fp32", save_every=4)
    return train(model, loss, Shuffled(50, cfg), cfg, run, {}, dict(width=width), quiet=True)

if __name__ == "__main__": sys.exit(exit_code(lambda: fit(sys.argv[1], int(sys.argv[2])) and 0, "train"))
"""
space = {"__name__": "program"}
exec(PROGRAM, space)
fit = space["fit"]

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

@pytest.mark.slow
@pytest.mark.parametrize("limit, words", [pytest.param(400_000, "cannot write checkpoint step-0000008", id="state"), pytest.param(100_000, "cannot write checkpoint step-0000008", id="weights", marks=pytest.mark.soak), pytest.param(1000, "while the log was written", id="log")])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_a_line_and_the_run_goes_on(tmp_path, limit, words):
    run = tmp_path / "run"
    r = subprocess.run([sys.executable, "-c", PROGRAM, run, str(limit)], capture_output=True, text=True)
    assert r.returncode == 2 and len(r.stderr.splitlines()) == 1, r.stderr
    assert words in r.stderr and "the last good checkpoint is step-0000004" in r.stderr and "the same command goes on" in r.stderr
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-0000004"] and load_checkpoint(run / "checkpoints/step-0000004")[1]["step"] == 4
    whole = fit(tmp_path / "whole")
    assert torch.equal(fit(run).weight, whole.weight) and read_log(run)["step"] == list(range(1, 13)) and read_log(run)["loss"] == read_log(tmp_path / "whole")["loss"]

def test_a_checkpoint_of_another_shape_is_one_line_and_stays_as_it_is(tmp_path):
    fit(tmp_path / "run", width=20); fit(tmp_path / "other", width=30)
    for p in (tmp_path / "run/checkpoints").iterdir(): (p.rename(tmp_path / p.name))
    (tmp_path / "other/checkpoints/step-0000012").rename(tmp_path / "run/checkpoints/step-0000012")
    before = files(tmp_path / "run")
    with pytest.raises(UserError) as e: fit(tmp_path / "run", width=20)
    line = str(e.value)
    assert "\n" not in line and "another model's" in line and "bias ((30,) there, (20,) here)" in line and files(tmp_path / "run") == before

def test_a_log_that_is_being_written_is_read_as_far_as_it_is_whole(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(step=1, loss=2.0)) + "\n" + '{"step": 2, "lo')
    assert read_log(tmp_path) == dict(step=[1], loss=[2.0])
