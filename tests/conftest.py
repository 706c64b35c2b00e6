"Options of the test-suite, and what it says at the end."
import os, re, signal
from collections import Counter, defaultdict
from pathlib import Path

import pytest

def share_cores():
    "Each process of `pytest -n` uses its part of the cores, and so does what it starts: more threads than cores wait for each other. What the user set stays."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        for name in ("OMP_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"): os.environ.setdefault(name, str(max(1, cores // processes)))

share_cores()                             # before a test imports torch

def trouble(log):
    "What a server's log says of errors, each with the lines about it."
    return re.findall(r"(?:.*\n){0,4}.*(?:Traceback|ERROR).*(?:\n.*){0,20}", log)

def still(page, what):
    "What a page says once it has said the same for a second and a half."
    said = None
    while said != (now := page.evaluate(what)): said = now; page.wait_for_timeout(1500)
    return said

class Tally(Counter):
    "How many cases, arrays, ... of a family of reference values were compared; `not_yet` counts what was left out, by reason."
    def __init__(self):
        super().__init__()
        self.not_yet = Counter()

GOLDEN = pytest.StashKey[dict]()          # family -> Tally, filled by test_golden.py


def pytest_addoption(parser):
    parser.addoption("--golden", metavar="DIR", default=None,
                     help="folder of reference values for test_golden.py (default: tests/golden)")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)    # run from a script with &: children must hear Ctrl-C
    config.stash[GOLDEN] = defaultdict(Tally)
    if given := config.getoption("--golden"):
        if not Path(given).is_dir(): raise pytest.UsageError(f"--golden {given}: no such folder; give one with <family>.json and .npz files")
        if not any(Path(given).glob("*.json")): raise pytest.UsageError(f"--golden {given}: no reference values (*.json) in this folder")


LONG = ("test_tour", "test_curate", "test_verdicts", "test_notebooks", "test_pool", "test_bench", "test_bench_ae", "test_commands", "test_train", "test_explorer", "test_kernels", "test_bench_mmdit", "test_plan", "test_loader", "test_pipelines", "test_gallery", "test_preference", "test_launch", "test_train_faults", "test_judge")      # files of minutes: begun first, so that processes end together

def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if "soak" not in config.option.markexpr:                # only when asked for: make soak
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "`--dist loadfile`, but for notebooks: they share nothing, so each goes to whichever process is free. Other files stay in one process, for what their tests share."
    if config.getoption("dist") != "loadfile": return None
    from xdist.scheduler import LoadScopeScheduling
    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if "test_notebooks.py::" in nodeid else nodeid.partition("::")[0]
    return Scheduler(config, log)


@pytest.fixture(autouse=True)
def ordinary_priority():
    "The AV1 encoder, run by root, leaves its process at real-time priority, which would starve all that runs beside it."
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def golden_tally(request): return request.config.stash[GOLDEN]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):          # one of several processes (-n): what it compared travels to the one that sums up
        session.config.workeroutput["golden"] = {family: (dict(t), dict(t.not_yet)) for family, t in session.config.stash[GOLDEN].items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    "Adds up what the processes of `pytest -n` compared."
    for family, (counts, not_yet) in getattr(node, "workeroutput", {}).get("golden", {}).items():
        node.config.stash[GOLDEN][family].update(counts); node.config.stash[GOLDEN][family].not_yet.update(not_yet)


def pytest_terminal_summary(terminalreporter, config):
    if not (tallies := config.stash[GOLDEN]): return
    terminalreporter.section("golden values")
    for family, t in sorted(tallies.items()):
        if t: terminalreporter.write_line(f"{family}: compared " + ", ".join(f"{n} {what}" for what, n in t.items()))
        for why, n in t.not_yet.items(): terminalreporter.write_line(f"{family}: left out {n}, not yet built: {why}")
