"What test_pool.py has done in worker processes: they import this module by name."
import ctypes, os, signal, sys, threading, time
from pathlib import Path

def double(x): return 2 * x
def where(x): time.sleep(0.05); return x, os.getpid()
def sleep(seconds): time.sleep(seconds); return seconds
def hog(n): return len(bytearray(n))
def threads(x): return os.environ.get("OMP_NUM_THREADS"), os.environ.get("OPENCV_FOR_THREADS_NUM")
def modules(x): return sorted(set(sys.modules))

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
    if what == "afterwards": threading.Timer(0.2, os._exit, [9]).start()
    if what == "deaf": signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); time.sleep(1000)
    return what
