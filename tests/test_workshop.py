"The workshop: one process that makes clips, visitors that come, drag, leave and break things."
import json, os, signal, subprocess, sys, threading, time
from multiprocessing.connection import Client
import pytest
from opensora_nb.cluster.files import UserError
from opensora_nb.flow.solver import Cancelled
from opensora_nb.inference.workshop import Desk, Turns, Visitor, Workshop

def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()): assert time.monotonic() < end, "waited too long"; time.sleep(0.01)
    return found

class Steps:
    "Makes by steps that the test lets go."
    def __init__(self, steps=5, pause=0.0): self.steps, self.pause, self.go, self.finished, self.under_way = steps, pause, threading.Event(), [], 0
    def __call__(self, request, tell, work):
        self.under_way += 1
        for k in range(self.steps):
            with work.step(): self.go.wait(5); time.sleep(self.pause)
            tell("step", done=k + 1)
        self.finished.append(request)
        return dict(made=request.get("n"))

def kinds(events): return [e["event"] for e in events if e["event"] != "step"]

def test_turns_are_given_in_the_order_asked():
    turns, order = Turns(), []
    def wait(k):
        with turns: order.append(k)
    with turns:
        threads = []
        for k in range(20): threads.append(t := threading.Thread(target=wait, args=(k,))); t.start(); until(lambda: len(turns._waiting) == k + 1)
    for t in threads: t.join(60)
    assert order == list(range(20))
    with turns: pass                                             # free again

def test_an_error_inside_gives_the_turn_back():
    turns = Turns()
    with pytest.raises(KeyError):
        with turns: raise KeyError
    with turns: pass

def test_a_drag_of_two_hundred_wishes_leaves_one_waiting_and_makes_two():
    make, heard = Steps(), []
    desk = Desk(make, Turns(), heard.append)
    numbers = [desk.ask(dict(n=n)) for n in range(200)]
    assert numbers == list(range(1, 201)) and sum(k == "replaced" for k in kinds(heard)) == 198
    make.go.set(); assert desk.idle.wait(120)
    assert [r["n"] for r in make.finished] == [0, 199] and make.under_way == 2

def test_cancel_takes_effect_at_the_next_step_and_only_there():
    make, heard = Steps(50, 0.02), []
    make.go.set()
    desk = Desk(make, Turns(), heard.append)
    desk.ask({}); until(lambda: any(e["event"] == "step" for e in heard))
    desk.ask({}); desk.cancel(); assert desk.idle.wait(120)
    assert sorted(kinds(heard)[-2:]) == ["cancelled", "cancelled"] and not make.finished
    heard.clear(); desk.ask(dict(n=1)); assert desk.idle.wait(120) and heard[-1]["event"] == "done", "the desk is as before"

def test_a_maker_that_raises_costs_its_clip_alone():
    def make(request, tell, work): raise ValueError("two\nlines")
    heard = []
    desk = Desk(make, Turns(), heard.append)
    desk.ask({}); assert desk.idle.wait(120)
    assert heard[-1]["event"] == "failed" and heard[-1]["why"] == "ValueError: two lines"

def test_visitors_share_steps_and_see_nothing_of_each_other(tmp_path):
    make = Steps(6); make.go.set()
    with Workshop(make, tmp_path / "shop") as shop:
        heard = {name: [] for name in "AB"}
        a, b = (Visitor(tmp_path / "shop", heard[name].append) for name in "AB")
        a.ask(dict(n="a")); b.ask(dict(n="b"))
        until(lambda: all("done" in kinds(h) for h in heard.values()))
        assert [h[-1]["made"] for h in heard.values()] == ["a", "b"] and "welcome" == heard["A"][0]["event"]
        a.cancel(); b.ask(dict(n="b2")); until(lambda: heard["B"][-1].get("made") == "b2")      # a's button is not b's

def test_who_leaves_gets_the_clip_finished_and_what_waited_is_forgotten(tmp_path):
    make = Steps(3)
    with Workshop(make, tmp_path / "shop") as shop:
        heard = []
        v = Visitor(tmp_path / "shop", heard.append)
        v.ask(dict(n=1)); until(lambda: make.under_way == 1); v.ask(dict(n=2)); until(lambda: sum(e["event"] == "waiting" for e in heard) == 2)
        v.close(); until(lambda: not shop.desks)
        make.go.set(); until(lambda: make.finished); time.sleep(0.2)
        assert make.finished == [dict(n=1)]

def test_leaving_in_the_middle_of_a_read_is_no_error_of_the_reading_thread(tmp_path, monkeypatch):
    from multiprocessing.connection import Connection
    read, reading, left, told = Connection._recv, threading.Event(), threading.Event(), []
    def late(self, size, **how):
        if threading.current_thread() is not threading.main_thread() and visitor and self is visitor[0]._connection: reading.set(); left.wait(60)
        return read(self, size, **how)
    monkeypatch.setattr(threading, "excepthook", told.append)
    make, heard, visitor = Steps(1), [], []
    make.go.set()
    with Workshop(make, tmp_path / "shop"):
        visitor.append(Visitor(tmp_path / "shop", heard.append)); visitor[0].ask(dict(n=1)); until(lambda: "done" in kinds(heard))
        monkeypatch.setattr(Connection, "_recv", late)
        visitor[0].ask(dict(n=2)); assert reading.wait(60)
        visitor[0].close(); left.set(); until(lambda: "gone" in kinds(heard) or told)
        assert not told and visitor[0]._connection.closed
        visitor[0].close()                                                                     # once more is nothing

@pytest.mark.parametrize("message", [b"no json", b"[1]", b'{"do": "dance"}', b'{"do": "ask", "request": 3}'])
def test_what_is_no_request_ends_that_visit_alone(tmp_path, message):
    make = Steps(1); make.go.set()
    with Workshop(make, tmp_path / "shop") as shop:
        door = json.loads((tmp_path / "shop/door.json").read_text())
        bad = Client(door["address"], authkey=door["key"].encode()); bad.recv_bytes(); bad.send_bytes(message)
        with pytest.raises((EOFError, OSError)): bad.recv_bytes()
        heard = []; v = Visitor(tmp_path / "shop", heard.append); v.ask(dict(n=1)); until(lambda: "done" in kinds(heard))

def test_a_stranger_without_the_key_is_not_let_in_and_the_door_is_the_owners(tmp_path):
    with Workshop(Steps(1), tmp_path / "shop"):
        door = tmp_path / "shop/door.json"
        assert door.stat().st_mode & 0o077 == 0
        told = json.loads(door.read_text())
        with pytest.raises(Exception): Client(told["address"], authkey=b"guess")
        door.write_text(json.dumps(told | dict(key="guess")))
        with pytest.raises(UserError, match="does not let us in"): Visitor(tmp_path / "shop", print)
    assert not door.exists()

SHOP = """
import sys, time
from opensora_nb.inference.workshop import Workshop
def make(request, tell, work):
    for k in range(100):
        with work.step(): time.sleep(0.05)
        tell("step", done=k + 1)
    return {}
shop = Workshop(make, sys.argv[1]); print("open", flush=True); time.sleep(60)
"""

@pytest.mark.slow
def test_a_workshop_that_is_killed_is_gone_and_the_next_one_serves(tmp_path):
    folder = tmp_path / ("a long folder's name " * 6)                             # sockets have short names
    for _ in range(2):
        shop = subprocess.Popen([sys.executable, "-c", SHOP, str(folder)], stdout=subprocess.PIPE, text=True)
        assert shop.stdout.readline() == "open\n"
        heard = []
        v = Visitor(folder, heard.append)
        v.ask({}); until(lambda: any(e["event"] == "step" for e in heard))
        shop.send_signal(signal.SIGKILL); shop.wait(60)
        until(lambda: heard[-1]["event"] == "gone")
        with pytest.raises(UserError, match="gone"):
            for _ in range(20): v.ask({}); time.sleep(0.05)
        with pytest.raises(UserError, match="no workshop"): Visitor(folder, heard.append)
