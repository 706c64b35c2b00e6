"""Workers may die and hang; the run goes on. Real processes, a real Ray.

A Ray of one's own costs twenty seconds to start, so its tests share one; only those that are about its end start another."""
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
import pool_tasks as tasks
from opensora_nb.cluster.pool import Failure, WorkerTraceback, run_tasks
from opensora_nb.data.curate import curate
from opensora_nb.data.footage import make_footage
from opensora_nb.data.ocr import OCRConfig
from opensora_nb.data.stages import CurateConfig

HERE = Path(__file__).parent
ENGINES = ["processes", pytest.param("ray", marks=pytest.mark.slow)]

@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    yield
    ray.shutdown()

@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "ray": request.getfixturevalue("local_ray")
    return request.param

def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False

def soon(condition, seconds=120.0):
    "Waits for a condition, not longer than a busy machine may need."
    end = time.monotonic() + seconds
    while not (ok := condition()) and time.monotonic() < end: time.sleep(0.02)
    return ok

def started(path, n): return soon(lambda: path.exists() and path.read_text().count("\n") == n)

LOST = {"segfault": "SIGSEGV", "null": "SIGSEGV", "abort": "SIGABRT", "kill": "SIGKILL", "exit 0": "exit code 0", "sys.exit": "exit code 3", "hog": "out of memory", "hang": "over 1 s", "deaf": "over 1 s"}

def test_every_way_to_be_lost_costs_one_task(engine):
    items = [x for i, name in enumerate(LOST) for x in (f"good {i}", name)] + ["last"]
    results = dict(run_tasks(tasks.misbehave, items, workers=2, engine=engine, time_limit=lambda item: 1 if item in ("hang", "deaf") else None))
    assert results.keys() == set(items)
    for item, result in results.items():
        if item not in LOST: assert result == item; continue
        assert isinstance(result, Failure) and LOST[item] in result.detail, (item, result)
        assert result.kind == ("timeout" if item in ("hang", "deaf") else "crashed")

@pytest.mark.parametrize("workers", [1, 3])         # Ray has two CPUs here and never starts the third
def test_each_item_once_whatever_dies(engine, workers):
    if (engine, workers) == ("ray", 1): pytest.skip("three is the harder case")
    items = [(i, "segfault" if i % 5 == 3 else "ok")[1] + ("" if i % 5 == 3 else str(i)) for i in range(60)]
    results = list(run_tasks(tasks.misbehave, iter(items), workers=workers, engine=engine))
    assert sorted(item for item, _ in results) == sorted(items)
    assert all((item == "segfault") == isinstance(result, Failure) for item, result in results)

@pytest.mark.slow
def test_ray_curates_to_the_same_bytes(local_ray, tmp_path):
    make_footage(tmp_path / "raw", shots=3, seed=2, defects=False, size=96, progress=False)
    (tmp_path / "raw/truth.json").rename(tmp_path / "truth.json"); (tmp_path / "raw/nothing.mp4").write_bytes(b"")
    cfg = CurateConfig(tmp_path / "raw", tmp_path / "processes", ocr=OCRConfig(enabled=False), progress=False)
    def files(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("journal.sqlite")}
    manifest = curate(cfg)
    assert curate(CurateConfig(tmp_path / "raw", tmp_path / "ray", ocr=cfg.ocr, workers=2, engine="ray", progress=False)).equals(manifest)
    assert files(tmp_path / "ray") == files(tmp_path / "processes") and len(list((tmp_path / "ray/clips").iterdir())) == 3

def test_few_items_and_none(engine):
    assert list(run_tasks(tasks.double, [], workers=2, engine=engine)) == []
    assert list(run_tasks(tasks.double, [4], workers=3, engine=engine)) == [(4, 8)]
    assert sorted(run_tasks(tasks.misbehave, [None, 0, ""], workers=2, engine=engine), key=str) == [("", ""), (0, 0), (None, None)]

def test_workers_are_reused_and_all_work():
    pids = [pid for _, pid in run_tasks(tasks.where, range(100), workers=2)]
    assert len(set(pids)) == 2 and os.getpid() not in pids and min(pids.count(p) for p in set(pids)) > 10

def test_in_order_of_completion_while_others_wait(tmp_path):
    last, *others = items = [(tmp_path, 3), (tmp_path, "a"), (tmp_path, "b"), (tmp_path, "c")]
    assert [item for item, _ in run_tasks(tasks.touch_or_wait, items, workers=2)] == [*others, last]

def test_items_are_drawn_lazily(engine):
    drawn = 0
    def endless():
        nonlocal drawn
        while True: drawn += 1; yield drawn
    results = run_tasks(tasks.double, endless(), workers=2, engine=engine)
    for n in range(1, 200):
        next(results)
        assert drawn <= n + 4
    results.close()

def test_time_limit_may_depend_on_the_item():
    results = dict(run_tasks(tasks.sleep, [0.1, 1000, 0.2], workers=2, time_limit=lambda s: 0.3 if s == 1000 else None if s == 0.2 else 120))
    assert results == {0.1: 0.1, 0.2: 0.2, 1000: Failure("timeout", "over 0.3 s")}

def test_what_the_function_raises_is_raised_with_its_traceback(engine):
    with pytest.raises(LookupError, match="no luck with 3") as error: list(run_tasks(tasks.fail, [3], engine=engine))
    assert isinstance(error.value.__cause__, WorkerTraceback) and "in fail" in str(error.value.__cause__)
    with pytest.raises(RuntimeError, match="Awkward: 1 and 2"): list(run_tasks(tasks.fail_awkwardly, [1], engine=engine))
    with pytest.raises(TypeError, match="pickle"): list(run_tasks(tasks.unsendable, [1], engine=engine))

def test_a_function_that_kills_every_worker_at_its_import_is_an_error(engine):
    with pytest.raises(RuntimeError, match="exit code 7"): list(run_tasks(tasks.Deadly(), range(5), workers=2, engine=engine))

def test_death_between_two_tasks_is_nobodys_fault():
    def items():
        yield "afterwards"
        assert soon(lambda: not multiprocessing.active_children())
        yield from "abc"
    assert sorted(run_tasks(tasks.misbehave, items(), workers=1)) == [("a", "a"), ("afterwards", "afterwards"), ("b", "b"), ("c", "c")]

@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_limit_counts_from_what_the_imports_take(engine):
    results = dict(run_tasks(tasks.hog, [10**9, 10**8, 10**9 + 1, 3 * 10**8], workers=2, engine=engine, memory_limit=5 * 10**8))
    lost = Failure("crashed", "out of memory")
    assert results == {10**9: lost, 10**9 + 1: lost, 10**8: 10**8, 3 * 10**8: 3 * 10**8}

def test_many_workers_use_one_thread_each(engine, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"): monkeypatch.delenv(name, raising=False)
    assert list(run_tasks(tasks.threads, [0], workers=2, engine=engine)) == [(0, ("1", 1, 1))]

def test_one_worker_may_use_all_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"): monkeypatch.delenv(name, raising=False)
    [(_, (omp, opencv, torch))] = run_tasks(tasks.threads, [0])
    assert omp is None and opencv == len(os.sched_getaffinity(0))           # of the cores that we may use

def test_an_abandoned_run_leaves_nothing(tmp_path):
    results = run_tasks(tasks.misbehave, ["good", "hang", "hang"], workers=2)
    assert next(results) == ("good", "good")
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "spawn_main"], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    results.close()
    assert not any(map(alive, children))

def test_stopped_tasks_take_their_temporary_files_along(tmp_path):
    results = run_tasks(tasks.half_written, [tmp_path / "out", tmp_path / "begun"], workers=2)
    assert next(results) == (tmp_path / "begun", None) and len(list(tmp_path.iterdir())) == 2
    results.close()
    assert [p.name for p in tmp_path.iterdir()] == ["begun"]
    (tmp_path / "begun").unlink()
    assert list(run_tasks(tasks.half_written, [tmp_path / "out"], time_limit=2)) == [(tmp_path / "out", Failure("timeout", "over 2 s"))]
    assert [p.name for p in tmp_path.iterdir()] == ["begun"]

def test_bad_arguments():
    with pytest.raises(ValueError, match="workers"): run_tasks(tasks.double, [1], workers=0)
    with pytest.raises(ValueError, match="engine.*processes, ray.*'dask'"): run_tasks(tasks.double, [1], engine="dask")
    with pytest.raises((AttributeError, Exception), match="local object|pickle"): run_tasks(lambda x: x, [1])

# Without `if __name__ == "__main__"`, and it says so when it is run a second time.
SCRIPT = """
import os, sys
SECRET = "of the script"
with open(sys.argv[1], "a") as f: f.write("script run\\n")
sys.path.insert(0, sys.argv[2])
from pool_tasks import is_main_hidden
from opensora_nb.cluster.pool import run_tasks
print(sorted(run_tasks(is_main_hidden, range(3), workers=2, engine=sys.argv[3])))
print(sys.modules["__main__"].SECRET)
def mine(x): return x
try: run_tasks(mine, [1])
except ValueError as error: print(error)
"""

@pytest.mark.parametrize("engine, how", [("processes", "script"), ("processes", "-c"), ("processes", "-m"), pytest.param("ray", "script", marks=[pytest.mark.slow, pytest.mark.soak]), pytest.param("ray", "-m", marks=[pytest.mark.slow, pytest.mark.soak])])
def test_the_callers_script_is_not_run_again(engine, how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    start = {"script": [tmp_path / "script.py"], "-c": ["-c", SCRIPT], "-m": ["-m", "script"]}[how]
    r = subprocess.run([sys.executable, *start, tmp_path / "log", HERE, engine], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines()[:2] == ["[(0, True), (1, True), (2, True)]", "of the script"] and "move it into a module" in r.stdout
    assert (tmp_path / "log").read_text() == "script run\n" and r.stderr == ""

@pytest.mark.slow
def test_from_a_notebook():
    import nbformat
    from nbclient import NotebookClient
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom pool_tasks import double\nfrom opensora_nb.cluster.pool import run_tasks\nprint(sorted(run_tasks(double, range(5), workers=2)))"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("def f(x): return x\ntry: run_tasks(f, [1])\nexcept ValueError as e: print(e)")])
    NotebookClient(nb, timeout=600, kernel_name="python3").execute()
    assert nb.cells[0].outputs[0].text == "[(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]\n" and "notebook" in nb.cells[1].outputs[0].text

RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from pool_tasks import log_pid_and_sleep
from opensora_nb.cluster.pool import run_tasks
for _ in run_tasks(log_pid_and_sleep, [sys.argv[1]] * 3, workers=2, engine=sys.argv[3]): pass
"""

SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}

@pytest.mark.parametrize("engine, sent", [*(("processes", name) for name in SIGNALS), pytest.param("ray", "SIGKILL", marks=pytest.mark.slow), *(pytest.param("ray", name, marks=[pytest.mark.slow, pytest.mark.soak]) for name in ("Ctrl-C", "SIGTERM"))])
def test_workers_go_when_the_run_goes(engine, sent, tmp_path):
    "Ctrl-C goes to the whole family, as from a terminal; the others to the head alone. Of Ray's three the hardest: a head that is killed can clear nothing away."
    run = subprocess.Popen([sys.executable, "-c", RUN, tmp_path / "pids", HERE, engine], start_new_session=True, stderr=subprocess.PIPE, text=True)
    assert started(tmp_path / "pids", 2)
    pids = (tmp_path / "pids").read_text().split()
    assert all(map(alive, pids))
    if sent == "Ctrl-C": os.killpg(run.pid, signal.SIGINT)
    else: run.send_signal(SIGNALS[sent])
    assert soon(lambda: not any(map(alive, pids)))                                # they would sleep a thousand seconds
    try: stderr = run.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired: stderr = ""; assert engine == "ray"          # its daemons may hold the pipe a little
    if sent == "Ctrl-C" and engine == "processes": assert stderr.count("Traceback") == 1 and stderr.rstrip().endswith("KeyboardInterrupt")
