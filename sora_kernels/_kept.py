"""What kernels read beside their operands, computed once and kept: plans of attention, steps of rotary angles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")  # a tensor or a dataclass with some


def kept(build: Callable[..., T]) -> Callable[..., T]:
    """`build(*key, device)`, from a cache wherever what is made now may be kept.

    On a GPU it is made in a thread of its own. Where a thread allocates is its own affair: torch.compile warms up in
    the private pool of its CUDA graphs, whose memory the graphs overwrite, long before it captures. It is made on the
    default stream; any other waits for it once, and is known to the allocator when the cache lets go.
    """

    @functools.lru_cache(maxsize=64)
    def entry(*key) -> tuple[T, torch.cuda.Event | None, set[int]]:
        if key[-1].type == "cuda":
            with ThreadPoolExecutor(1) as thread:
                return *thread.submit(_on_default_stream, build, key).result(), set()
        with torch.inference_mode(False):  # whose tensors no later backward could keep
            return build(*key), None, set()

    @functools.wraps(build)
    def get(*key) -> T:
        device = key[-1]
        if not may_keep(device):
            return build(*key)
        if device.type == "cuda" and device.index is None:
            key = *key[:-1], torch.device("cuda", torch.cuda.current_device())
        value, ready, readers = entry(*key)
        if ready is not None:
            stream = torch.cuda.current_stream(device)
            if stream.cuda_stream not in readers:
                stream.wait_event(ready)
                for tensor in _tensors(value):
                    tensor.record_stream(stream)
                readers.add(stream.cuda_stream)
        return value

    return get


def may_keep(device: torch.device) -> bool:
    """Whether a tensor made now may enter a cache: it has values, and they outlive what is going on.

    Not so in a FakeTensorMode or another dispatch mode, in a transform of torch.func, and while a CUDA graph is
    captured: what a graph reads it must make itself, as no cache may free it.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or device.type == "meta":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _on_default_stream(build: Callable[..., T], key: tuple) -> tuple[T, torch.cuda.Event]:
    with torch.cuda.device(key[-1]):
        value = build(*key)
        return value, torch.cuda.current_stream(key[-1]).record_event()


def _tensors(value: object) -> list[Tensor]:
    parts = vars(value).values() if dataclasses.is_dataclass(value) else [value]
    return [part for part in parts if isinstance(part, Tensor)]
