"""Seeds and markers. Without a GPU, Triton kernels run in the interpreter, chosen before triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from sora_kernels import _dispatch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is present"))


@pytest.fixture
def require():
    """Skip, with the reason the library itself gives, where an implementation cannot run here."""

    def check(op: str, impl: str, device: str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = False) -> None:
        if reason := _dispatch.why_not(op, impl, device, dtype, grad):
            pytest.skip(reason)

    return check
