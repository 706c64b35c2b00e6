"Commands in processes of their own: what they say, how they are stopped, that nothing stays behind; and the script for Slurm."
import os, shlex, signal, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from opensora_nb.cluster.files import UserError
from opensora_nb.cluster.launch import MARK, launch, marked, reason, sbatch_script, write_sbatch

PROGRAM = """
import os, subprocess, sys, time
if "deaf" in sys.argv: import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
if "child" in sys.argv: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print("begun \u00e9\u00e9", flush=True)
if "fail" in sys.argv: raise ValueError("of a kind")
time.sleep(0 if "quick" in sys.argv else 100)
"""

@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    def start(*words, **more): return launch(words, log=tmp_path / "log", program=[str(tmp_path / "program.py")], **more)
    return start

def begun(run, seconds=60):
    end = time.monotonic() + seconds
    while b"begun" not in run.log.read_bytes(): assert time.monotonic() < end and run.running, run.verdict(); time.sleep(0.02)

def test_what_does_not_hear_is_ended_with_all_its_children(program):
    run = program("deaf", "child", patience=0.5)
    begun(run)
    assert len(marked(run.mark)) == 2 and run.returncode is None and "running" in repr(run)
    run.stop()
    assert not marked(run.mark) and run.returncode == -signal.SIGKILL and run.interrupted
    assert run.stop() == -signal.SIGKILL, "twice is once"

def test_children_of_a_program_that_was_killed_from_outside_do_not_stay(program, capsys):
    run = program("child")
    begun(run)
    run.process.kill()
    assert run.follow() == -signal.SIGKILL and not marked(run.mark)
    assert "was ended by signal 9" in capsys.readouterr().out

def test_the_end_of_the_notebook_is_the_end_of_what_it_started(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    code = f"import time\nfrom opensora_nb.cluster.launch import launch\nrun = launch(['child'], log='log', patience=1, program=['program.py'])\nwhile 'begun' not in open('log').read(): time.sleep(0.02)\nprint(run.mark)"
    mark = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert len(mark) == 32 and not marked(mark)

def test_a_figure_that_fails_stops_the_run(program):
    run = program("child", patience=1)
    def show(): begun(run); raise RuntimeError("cannot draw")
    with pytest.raises(RuntimeError, match="cannot draw"): run.follow(show, every=0.05)
    assert not run.running and not marked(run.mark)

def test_its_lines_are_shown_and_its_traceback_is_not(program, capsys):
    assert program("fail").follow() == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "begun \u00e9\u00e9" and out[1].startswith("program.py fail ended with 1: ValueError: of a kind (output: ") and len(out) == 2
    assert program("quick").follow() == 0 and capsys.readouterr().out == "begun \u00e9\u00e9\n"

@pytest.mark.slow
@pytest.mark.soak
def test_a_training_on_two_processes_is_stopped_saves_and_goes_on(tmp_path, monkeypatch):
    from opensora_nb.cluster.checkpoint import checkpoints
    from opensora_nb.training.loop import read_log
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["train", "pocket", "--clips", 4, "--init", "shipped", "--batch-size", 2, "--steps", 8, "--sample-every", 0, "--warmup", 0]
    run = launch(words, 2)
    assert run.log.parent == Path("runs/launched")
    def show():
        if not run.interrupted and Path("runs/pocket/log.jsonl").exists() and read_log("runs/pocket").get("step"): raise KeyboardInterrupt
    assert run.follow(show) != 0 and not marked(run.mark)
    at = read_log("runs/pocket")["step"][-1]
    assert f"stopped at step {at} of 8; the same command goes on from there (runs/pocket)" in run.verdict() and checkpoints("runs/pocket/checkpoints")[-1].name == f"step-{at:07d}"
    assert launch(words, 2).follow() == 0 and read_log("runs/pocket")["step"] == list(range(1, 9))


# ---- what was said ----
def test_the_reason_is_found_among_what_the_launcher_says():
    noise = "W1122 02:00:00 torch/distributed/run.py:852] \n*****\nE1122 02:00:00 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: 2)\nTraceback (most recent call last):\n  File \"x\"\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\ntraceback : Signal 9 (SIGKILL) received by PID 3\n----\n"
    assert reason("pocket: 1%|\rosnb train: a: b\n" + noise) == "osnb train: a: b"
    assert reason("[rank0]: torch.OutOfMemoryError: 3 GB\n[rank1]: RuntimeError: peer\n" + noise) == "torch.OutOfMemoryError: 3 GB"
    assert reason(noise) == "Signal 9 (SIGKILL)"
    assert reason("line\n\nSegmentation fault\n") == "Segmentation fault"


# ---- Slurm ----
@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), max_size=8), min_size=1, max_size=4))
def test_words_arrive_as_they_were_typed(words):
    script = sbatch_script(["train", *words], name="x")
    assert shlex.split(script[script.rindex("-m opensora_nb.commands.cli"):]) == ["-m", "opensora_nb.commands.cli", "train", *words]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0

@pytest.mark.parametrize("wrong", [dict(nodes=0), dict(gpus_per_node=0), dict(hours=0), dict(name="a b"), dict(partition="x\n#SBATCH --wrap=ls"), dict(account="$(ls)"), dict(log="a b/%j"), dict(grace=0), dict(hours=0.05)], ids=str)
def test_what_slurm_would_misread_is_refused(wrong):
    with pytest.raises(UserError) as e: sbatch_script(["train", "pocket"], **wrong)
    assert "\n" not in str(e.value)

def test_the_script_runs_on_each_machine_with_the_jobs_own_port(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_sbatch("job.sbatch", ["train", "pocket", "--name", "a b"], nodes=3, gpus_per_node=4, hours=1.5, setup=["export X=1"], log="out/%x.log")
    for tool, text in (("srun", 'printf "%s\\n" "$X" "$@"'), ("scontrol", "printf 'first\\nsecond\\n'")): (tmp_path / tool).write_text(f"#!/bin/bash\n{text}\n"); (tmp_path / tool).chmod(0o755)
    said = subprocess.run(["bash", path], capture_output=True, text=True, env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="20003", SLURM_NNODES="3", SLURM_JOB_NODELIST="n[1-3]"), check=True).stdout.splitlines()
    assert said[0] == "1" and {"first:20003", "--nproc-per-node", "4", "--nnodes", "3", "20003"} <= set(said) and said[-5:] == ["opensora_nb.commands.cli", "train", "pocket", "--name", "a b"]
    text = path.read_text()
    assert "--time=1:30:00" in text and "--gpus-per-node=4" in text and (tmp_path / "out").is_dir()
