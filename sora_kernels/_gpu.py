"""What tiles are chosen by: the compute capability of a GPU, and what it means for a kernel's operands."""

from __future__ import annotations

import torch


def capability(device: torch.device) -> int:
    """Of the GPU, 90 for sm_90; elsewhere that of the GPU most code is written for."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


capability._dynamo_marked_constant = True  # as in _dispatch: what chooses by it is traced


def asynchronous(capability: int) -> bool:
    """Products read their operands from shared memory: wgmma, tcgen05."""
    return 90 <= capability < 120


def small(capability: int) -> bool:
    """100 KiB of shared memory: consumer GPUs."""
    return capability in (86, 87, 89) or capability >= 120
