"""The machine that a request is for: its device, and whether its memory will do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from sora_kernels import _dispatch, _library

from .safety import limits

_ROOT = Path("/")


class TooLargeError(ValueError):
    """A request that would need more memory than there is; the message says what would fit."""


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; for None a GPU where there is one. ValueError for what is not there."""
    cuda = torch.cuda.is_available()
    try:
        chosen = torch.device(("cuda" if cuda else "cpu") if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if chosen.type == "cuda" and not cuda:
        raise ValueError("device is 'cuda', but torch finds no GPU here; use 'cpu'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is '{chosen}', and the last GPU here is 'cuda:{torch.cuda.device_count() - 1}'")
    return chosen


def check_impl(impl: str) -> None:
    """ValueError for the name of an implementation that a whole model cannot run with, as not every op has it."""
    ops = [op for op in _library.ops() if op.endswith("_fwd")]
    known = [name for name in _dispatch.IMPLS if name == "auto" or all(name in _library.impls(op) for op in ops)]
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, which every operation of a model has; got {impl!r}")


def own_dtypes(device: torch.device) -> torch.autocast:
    """Without a surrounding `torch.autocast`: a model knows by itself what it computes in which dtype."""
    return torch.autocast(device.type, enabled=False)


def available(device: torch.device) -> int:
    """Bytes of memory that are free on a device; of a CPU's, those that the process's control groups leave it. Of
    either no more than `Limits.memory`."""
    most = limits.current().memory
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = min([_free(), *_left_by_groups()])
    return free if most is None else min(free, most)


def left(free: int, what: str = "") -> str:
    """Of what `available` gives, for an error: "2.0 GiB of memory are free"."""
    return f"{gib(free)} {what}are free" + (" or allowed" if limits.current().memory is not None else "")


def _free() -> int:
    for line in _read("proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40


def _left_by_groups() -> Iterator[int]:
    """What each control group that the process is in, and each above it, leaves of its limit: version 2, then 1.

    In a container the path of a group may be that of the host, which is not there: then the root is the group.
    """
    for line in _read("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, cache = "sys/fs/cgroup/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = PurePosixPath("/") / path
        for folder in dict.fromkeys((group, *group.parents)):
            base = f"{top}{folder if folder != PurePosixPath('/') else ''}"
            most, used = _read(f"{base}/{limit}").strip(), _read(f"{base}/{usage}").strip()
            if most.isdigit() and used.isdigit():
                stat = dict(line.split() for line in _read(f"{base}/memory.stat").splitlines() if line.count(" ") == 1)
                # the kernel gives back what it only keeps for reading again
                yield max(0, int(most) - int(used) + int(stat.get(cache, 0)))


def _read(name: str) -> str:
    try:
        return (_ROOT / name).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


class Turns:
    """The parts of a model that take turns on a device; called with one before it is at work. Without parts all stay.

    What leaves the device is dropped there: its weights are kept where they came from, in files mapped into memory too.
    """

    def __init__(self, device: torch.device, parts: Sequence[object] = ()) -> None:
        self.device = device
        self._modules = {id(part): getattr(part, "model", part) for part in parts}  # an encoder of text holds a model
        self._here, self._home = None, []

    @property
    def largest(self) -> int:
        """Bytes of the largest part: what must be left for it on the device."""
        return max((sum(t.nbytes for t in _tensors(module)) for module in self._modules.values()), default=0)

    @property
    def whole(self) -> int:
        """Bytes of all parts."""
        return sum(t.nbytes for module in self._modules.values() for t in _tensors(module))

    def __call__(self, part: object) -> None:
        module = self._modules.get(id(part))
        if module is None or module is self._here:
            return
        self.leave()
        self._here, self._home = module, [(t, t.data) for t in _tensors(module)]
        for tensor, data in self._home:
            tensor.data = data.to(self.device)

    def leave(self) -> None:
        """The device is free of them."""
        for tensor, data in self._home:
            tensor.data = data
        self._here, self._home = None, []


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
