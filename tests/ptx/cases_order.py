"""Kernels that leave other bits in another order, which --ptx-again finds in them; run by tests/test_ptx.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ptx import Fault


@triton.jit
def sum_by_atomics(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.atomic_add(out_ptr, tl.sum(x, 0))


@triton.jit
def last_to_write(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))


@pytest.mark.parametrize("kernel", [sum_by_atomics, last_to_write])
def test_what_depends_on_the_order_of_programs_is_found(kernel, pytestconfig):
    assert pytestconfig.getoption("--ptx-again")
    x, out = torch.randn(64, 128).bfloat16(), torch.zeros(128)
    with pytest.raises(Fault, match=f"^{kernel.__name__}: order: .* bytes of out_ptr"):
        kernel[(64,)](x, out, BLOCK=128)
