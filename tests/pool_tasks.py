"What test_pool.py has done in worker processes, which import this module by name."
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from opensora_nb.cluster.files import whole

def double(x): return 2 * x
def sleep(seconds): time.sleep(seconds); return seconds
def where(x): time.sleep(0.02); return os.getpid()
def hog(n): return len(bytearray(n))
def threads(x): return os.environ.get("OMP_NUM_THREADS"), __import__("cv2").getNumThreads(), __import__("torch").get_num_threads()
def is_main_hidden(x): return getattr(sys.modules["__main__"], "SECRET", None) is None
def fail(x): raise LookupError(f"no luck with {x}")
def unsendable(x): return open(os.devnull)

class Awkward(Exception):
    "Cannot be put together again from its `args`."
    def __init__(self, a, b): super().__init__(f"{a} and {b}")

def fail_awkwardly(x): raise Awkward(x, 2)

class Deadly:
    "A function whose import ends the process."
    def __call__(self, x): return x
    def __reduce__(self): return os._exit, (7,)

def half_written(path):
    "Writes for ever, or (a path named `begun`) waits until another worker does so."
    if path.name == "begun":
        while not path.exists(): time.sleep(0.01)
    else:
        with whole(path) as out: out.write_text("half"); path.with_name("begun").touch(); time.sleep(1000)

def touch_or_wait(item):
    "(folder, name): makes a file; (folder, number): waits until there are so many."
    folder, what = item
    if isinstance(what, str): (folder / what).touch(); return
    while len(list(folder.iterdir())) < what: time.sleep(0.01)

def log_pid_and_sleep(path):
    with open(path, "a") as f: f.write(f"{os.getpid()}\n")
    time.sleep(1000)

def misbehave(what):
    "Each way in which a worker can be lost, by name; anything else comes back as it is."
    if what == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "null": ctypes.string_at(0)
    if what == "abort": os.abort()
    if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit 0": os._exit(0)
    if what == "sys.exit": sys.exit(3)
    if what == "hang": time.sleep(1000)
    if what == "hog": bytearray(10**12)
    if what == "deaf": signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); time.sleep(1000)
    if what == "afterwards": threading.Timer(0.2, os._exit, [9]).start()
    return what
