"The journal: what was put is there, whole, whatever happened to the process or the file."
import os, random, signal, sqlite3, subprocess, sys, time
import pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.cluster.journal import Journal

@pytest.fixture
def path(tmp_path): return tmp_path / "work" / "journal.db"

def anything(rng, depth=0):
    pick = rng.randrange(8 if depth < 3 else 6)
    if pick == 6: return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if pick == 7: return {text(rng): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.randrange(-2**70, 2**70), rng.gauss(0, 1) * 10.0 ** rng.randrange(-300, 300), text(rng), True, None, float("inf")][pick]

def text(rng):
    "Letters, controls, emoji, and the lone surrogates of file names that are not UTF-8."
    letters = "ab/-'\"\\\n\0\t é雪🎬\udc80\udcff\ud800"
    return "".join(rng.choice(letters) for _ in range(rng.randrange(12)))

def test_it_holds_what_a_dictionary_would(path):
    rng, model = random.Random(1), {}
    for round in range(5):
        with Journal(path) as journal:                       # reopened again and again
            for _ in range(300):
                stage, item, key = rng.choice(["probe", "survey", "", "\udcfe"]), text(rng), rng.choice(["k1", "k2", text(rng)])
                if rng.random() < 0.2: journal.forget(stage, item); model.pop((stage, item), None)
                else: journal.put(stage, item, key, result := anything(rng) or 0); model[stage, item] = key, result
            for (stage, item), (key, result) in model.items():
                assert journal.get(stage, item, key) == result
                assert journal.get(stage, item, key + "x") is None
            for stage in ("probe", "survey", "", "\udcfe", "never"):
                assert list(journal.items(stage)) == sorted((i, *v) for (s, i), v in model.items() if s == stage)
    assert [p.name for p in path.parent.iterdir()] == ["journal.db"]      # the log is folded in

def test_none_cannot_be_a_result(path):
    with Journal(path) as journal, pytest.raises(ValueError, match="None"): journal.put("s", "i", "k", None)

def test_what_json_cannot_hold_is_refused_and_nothing_is_written(path):
    with Journal(path) as journal:
        journal.put("s", "i", "k", 1)
        with pytest.raises(TypeError): journal.put("s", "i", "k", {1, 2})
        assert journal.get("s", "i", "k") == 1

def test_items_may_change_while_they_are_read(path):
    with Journal(path) as journal:
        for i in range(2500): journal.put("s", f"{i:05}", "k", i)
        seen = []
        for item, _, result in journal.items("s"):
            seen.append(result)
            journal.put("s", item, "k2", result); journal.forget("s", f"{result - 1:05}")
        assert seen == list(range(2500)) and list(journal.items("s")) == [("02499", "k2", 2499)]

@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001, 2000])
def test_pages_have_no_seams(path, n):
    with Journal(path) as journal:
        for i in range(n): journal.put("s", f"{i:05}", "k", i)
        assert [r for _, _, r in journal.items("s")] == list(range(n))

def test_a_second_run_is_told_and_does_no_harm(path):
    code = "import sys\nfrom opensora_nb.cluster.journal import Journal\nfrom opensora_nb.cluster.files import UserError\ntry: Journal(sys.argv[1]).put('s', 'i', 'k', 2)\nexcept UserError as e: print(e)"
    other = lambda: subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    with Journal(path) as journal:
        said = other()
        assert "another run is working in this folder" in said and str(path) in said and said.count("\n") == 1
        journal.put("s", "i", "k", 1)
    with Journal(path) as journal: assert journal.get("s", "i", "k") == 1
    assert other() == ""                                     # free again
    with Journal(path) as journal: assert journal.get("s", "i", "k") == 2

def test_what_is_no_journal_is_named_and_left_as_it_is(tmp_path):
    foreign = tmp_path / "history.db"
    db = sqlite3.connect(foreign); db.execute("CREATE TABLE urls (url)"); db.commit(); db.close()
    (video := tmp_path / "film.mp4").write_bytes(os.urandom(5000))
    (newer := tmp_path / "newer.db"); Journal(newer).close()
    db = sqlite3.connect(newer); db.execute("PRAGMA user_version=99"); db.close()
    (blocked := tmp_path / "file").write_text("x")
    for path in (foreign, video, newer):
        before = path.read_bytes()
        with pytest.raises(UserError) as error: Journal(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value) and path.read_bytes() == before
    for path in (tmp_path, blocked / "journal.db"):
        with pytest.raises(UserError) as error: Journal(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

def test_a_full_disk_is_said(path):
    with Journal(path) as journal:
        journal._db.execute("PRAGMA max_page_count=20")      # what SQLite does when the disk is full
        with pytest.raises(UserError, match="full"):
            for i in range(10**4): journal.put("s", str(i), "k", "x" * 500)
        good = [i for i, _, _ in journal.items("s")]
    with Journal(path) as journal: assert [i for i, _, _ in journal.items("s")] == good and len(good) > 10

def test_damage_is_said_or_harmless(path):
    "Any record that can still be read is as it was put; the rest is a UserError that names the file."
    truth = {f"film {i:04}": {"score": i / 7, "text": "abc" * (i % 9)} for i in range(400)}
    with Journal(path) as journal:
        for item, result in truth.items(): journal.put("s", item, "k", result)
    whole, rng, told = path.read_bytes(), random.Random(3), 0
    for n in range(150):
        data = bytearray(whole)
        if n % 5 == 4: data = data[:rng.randrange(len(data))]
        else:
            for _ in range(rng.choice([1, 3, 30])): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            with Journal(path) as journal:
                for item, key, result in journal.items("s"): assert key == "k" and truth[item] == result, n
        except UserError as error: told += 1; assert str(path) in str(error) and "\n" not in str(error)
        try:
            with Journal(path) as journal:
                for item in rng.sample(list(truth), 50): assert journal.get("s", item, "k") in (None, truth[item])
                journal.put("s", "new", "k", 1)
        except UserError as error: assert str(path) in str(error)
    assert told > 30

WRITER = """
import os, sys
from opensora_nb.cluster.journal import Journal
journal, start = Journal(sys.argv[1]), int(sys.argv[2])
for i in range(start, 10**9):
    journal.put("s", f"{i % 3000:06}", str(i), {"i": i, "long": [i] * (i % 500)})       # after 3000 it replaces
    os.write(1, b"%d\\n" % i)
"""

@pytest.mark.slow
def test_kill_at_twenty_moments_loses_nothing_that_was_put(path):
    rng, start, last = random.Random(), 0, -1
    for n in range(20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path, str(start)], stdout=subprocess.PIPE)
        os.set_blocking(writer.stdout.fileno(), False)
        said, end = b"", None
        while end is None or time.monotonic() < end:
            said += writer.stdout.read() or b""
            if end is None and said: end = time.monotonic() + rng.uniform(0, 0.3)
        writer.send_signal(signal.SIGKILL)
        os.set_blocking(writer.stdout.fileno(), True)
        said += writer.stdout.read(); writer.wait(); writer.stdout.close()
        last = int(said.split(b"\n")[-2])
        with Journal(path) as journal:                       # the log of the dead one is there; no lock is left
            rows = list(journal.items("s"))
            assert all(result == {"i": int(key), "long": [int(key)] * (int(key) % 500)} and int(item) == int(key) % 3000 for item, key, result in rows)
            newest = max(int(key) for _, key, _ in rows)
            assert newest in (last, last + 1)
            assert {int(key) for _, key, _ in rows} == set(range(max(0, newest - 2999), newest + 1))
        start = newest + 1

MANY = """
import resource, sys
from opensora_nb.cluster.journal import Journal
n = int(sys.argv[2])
with Journal(sys.argv[1]) as journal:
    for i in range(n): journal.put("s", f"{i:09}", "k", [i] * 20)
    assert sum(1 for _ in journal.items("s")) == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_memory_is_flat(path):
    few, many = (int(subprocess.run([sys.executable, "-c", MANY, path.with_name(str(n)), str(n)], capture_output=True, text=True, check=True).stdout) for n in (5_000, 100_000))
    assert many - few < 15_000                               # as Python objects they would take about 80,000
