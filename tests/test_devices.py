"""Which GPU is current, what streams and captured graphs may share: with stand-ins for what needs a GPU."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sora_kernels  # noqa: F401  (registers the ops)
from sora_kernels import _library
from sora_kernels._kept import kept

CUDA = torch._C.DispatchKey.CUDA


class Gpus:
    """Two GPUs as torch.cuda shows them; each thread has a current one and a current stream."""

    def __init__(self, monkeypatch):
        self.threads, self.capturing, self.waits, self.switches = {}, False, [], []
        for name in ("current_device", "current_stream", "device", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @property
    def here(self):
        return self.threads.setdefault(threading.get_ident(), SimpleNamespace(device=0, stream=0))

    def current_device(self):
        return self.here.device

    def is_current_stream_capturing(self):
        return self.capturing

    def current_stream(self, device):
        number = self.here.stream
        event = SimpleNamespace(device=device, stream=number)
        return SimpleNamespace(
            cuda_stream=number, record_event=lambda: event, wait_event=lambda e: self.waits.append((number, e.stream))
        )

    @contextlib.contextmanager
    def device(self, device):
        before, self.here.device = self.here.device, device.index
        self.switches.append(device.index)
        yield
        self.here.device = before


class Resident(torch.Tensor):
    """A tensor that says which streams the allocator was told of."""

    def record_stream(self, stream):
        self.streams = [*getattr(self, "streams", []), stream.cuda_stream]


@pytest.fixture
def gpus(monkeypatch):
    return Gpus(monkeypatch)


@pytest.fixture
def built():
    """A kept function of (key, device), with the threads that it ran in."""
    threads = []

    @kept
    def build(key, device):
        threads.append(threading.get_ident())
        return torch.zeros(1).as_subclass(Resident)

    return build, threads


GPU = torch.device("cuda", 1)


def test_a_kernel_runs_on_the_gpu_of_its_tensors(gpus):
    """Every op that Python provides, whatever the implementation, is registered in this one way."""
    seen = []
    overload = _library._register(
        "_device_test", "(Tensor? x, Tensor(a!) y) -> ()", lambda x, y: seen.append(gpus.current_device())
    )
    with FakeTensorMode():
        first, second = (torch.empty(2, device=f"cuda:{index}") for index in (0, 1))
    overload._op_dk(CUDA, None, second)
    overload._op_dk(CUDA, first, first)
    assert seen == [1, 0] and gpus.current_device() == 0
    assert gpus.switches == [1], "the current device is left alone where it is right"


def test_what_is_kept_is_made_once_in_a_thread_of_its_own(gpus, built):
    """A private pool of the caller's thread, as torch.compile's CUDA graphs warm up in, is none of the new thread's."""
    build, threads = built
    assert build(3, GPU) is build(3, GPU)
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    assert gpus.switches == [1]


def test_each_stream_waits_once_for_what_another_made(gpus, built):
    build, _ = built
    gpus.here.stream = 7
    value = build(3, GPU)
    assert build(3, GPU) is value
    gpus.here.stream = 8
    assert build(3, GPU) is value
    assert gpus.waits == [(7, 0), (8, 0)] and value.streams == [7, 8]


def test_what_a_captured_graph_reads_is_made_in_it_and_not_kept(gpus, built):
    build, threads = built
    before = build(3, GPU)
    gpus.capturing = True
    inside = build(3, GPU)
    assert inside is not before and build(3, GPU) is not inside, "a cache could free what the graph still reads"
    assert threads[1:] == [threading.get_ident()] * 2, "by the stream that is captured"
    gpus.capturing = False
    assert build(3, GPU) is before


def test_a_gpu_without_a_number_is_the_current_one(gpus, built):
    build, _ = built
    gpus.here.device = 1
    assert build(3, torch.device("cuda")) is build(3, GPU)
    gpus.here.device = 0
    assert build(3, torch.device("cuda")) is not build(3, GPU)


def test_plans_and_rotary_steps_are_kept_this_way():
    from sora_kernels.attention import plan

    assert plan._build.__wrapped__ and plan._heads.__wrapped__
    assert plan._build.__code__ is kept(lambda device: None).__code__ is plan._heads.__code__
    kernels = pytest.importorskip("sora_kernels.qknorm_rope.kernels", reason="triton is not installed")
    assert kernels.steps.__code__ is plan._heads.__code__
