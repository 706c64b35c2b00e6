"ColossalAI 0.5 trains on cards only. For tests: streams that do nothing, and a check for a card that says yes, so that its ZeRO runs on a processor, over gloo."
import contextlib, torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

class Stream:
    def wait_stream(self, *args): ...
    def synchronize(self): ...
    def record_event(self, *args): return self

class Processor(CpuAccelerator):
    def Stream(self, *args, **kwargs): return Stream()
    def current_stream(self, *args): return Stream()
    def default_stream(self, *args): return Stream()
    def stream(self, stream): return contextlib.nullcontext()
    def synchronize(self, *args): ...
    def current_device(self): return 0

def pretend():
    set_accelerator(Processor())
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
