"""The machine that a request is for: its device, and whether its memory will do."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class TooLargeError(ValueError):
    """A request that would need more memory than there is; the message says what would fit."""


def choose_device(device: str | torch.device | None) -> torch.device:
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from error
    if device.type == "cuda" and not cuda:
        raise ValueError("device is 'cuda', but torch finds no GPU here; use 'cpu'")
    return device


def available(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
