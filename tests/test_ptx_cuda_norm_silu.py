"""CUDA C++ of norm_silu as nvcc compiles it, executed without a GPU, in both layouts of a video."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.sweeps import in_turns

from sora_kernels import Unavailable, _dispatch, norm_silu
from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAST, FIRST = torch.channels_last_3d, torch.contiguous_format


def expected(x, weight, bias):
    """In fp64, and by the reference in the dtypes given."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    return norm_silu(*wide, impl="reference"), norm_silu(x, weight, bias, impl="reference")


def unwritten(x):
    """Of x's shape and layout."""
    B, C, T, H, W = x.shape
    if x.is_contiguous():
        return ptx.unwritten(B, C, T, H, W, dtype=x.dtype)
    return ptx.unwritten(B, T, H, W, C, dtype=x.dtype).permute(0, 4, 1, 2, 3)


# C, (B, T, H, W), processors. Channels last: pixels of one lane to a whole warp, with and without idle lanes, as many
# as warps have and more. Channels first: a vector of pixels to several blocks, channels of one warp to all, or a rest.
CASES = [
    (LAST, 8, (1, 1, 3, 5), 1), (LAST, 96, (2, 3, 7, 9), 1), (LAST, 64, (1, 1, 11, 3), 1),
    (LAST, 1024, (1, 1, 5, 7), 1), (LAST, 200, (1, 2, 3, 5), 1), (LAST, 24, (3, 1, 7, 1), 132),
    (LAST, 512, (1, 1, 1, 1), 2), (FIRST, 1, (1, 1, 2, 4), 1), (FIRST, 96, (2, 3, 5, 8), 1),
    (FIRST, 70, (1, 1, 3, 24), 1), (FIRST, 513, (1, 2, 1, 28), 1), (FIRST, 1024, (1, 1, 1, 8), 1),
]  # fmt: skip


@pytest.mark.parametrize(
    "layout, C, size, processors, dtype, sm", in_turns(CASES, DTYPES, list(nvcc.ARCHITECTURES)), ids=str
)
def test_norm_silu_as_nvcc_compiles_it(layout, C, size, processors, dtype, sm):
    (B, T, H, W), rows = size, (0.1, 1, 30)[C % 3]
    x = (torch.randn(B, C, T, H, W) * rows).to(dtype).contiguous(memory_format=layout)
    weight, bias = (torch.rand(C) + 0.5).to(dtype), torch.randn(C).to(dtype) if B < 3 else None
    if H == 3:
        weight, bias = weight.float(), bias.float()
    out = unwritten(x)
    counters = nvcc.norm_silu(sm, x, weight, bias, 0, 1e-6, out, processors, schedule=2, again=5)
    assert_matches_oracle(out, *expected(x, weight, bias), "out", C)
    assert counters.written == -(-out.nbytes // 32)  # each byte read once from DRAM, each sector written whole
    parameters = sum(-(-t.nbytes // 32) for t in (weight, bias) if t is not None)
    assert counters.read == -(-x.nbytes // 32) + parameters


def test_the_op_takes_any_strides_and_keeps_the_layout():
    x = torch.randn(1, 2, 6, 8, 24).bfloat16().permute(0, 4, 1, 2, 3)[:, :, :, 1:]
    weight, bias = torch.rand(25).bfloat16()[1:], torch.rand(24).half()
    with nvcc.nvcc_on(90):
        last, first = (norm_silu(t, weight, bias, impl="cuda") for t in (x, x.contiguous()))
    assert last.is_contiguous(memory_format=LAST) and first.is_contiguous()
    for y in (last, first):
        assert_matches_oracle(y, *expected(x, weight, bias), "out", 24)


def test_special_values_stay_in_their_pixels():
    x = torch.randn(1, 16, 1, 2, 4)
    x[0, 3, 0, 0, 1], x[0, 5, 0, 1, 2], x[0, :, 0, 1, 3] = float("nan"), float("inf"), 0
    for layout in (LAST, FIRST):
        with nvcc.nvcc_on(80):
            y = norm_silu(x.contiguous(memory_format=layout), torch.ones(16), impl="cuda")
        reference = norm_silu(x, torch.ones(16), impl="reference")
        assert torch.equal(y.isnan(), reference.isnan()) and not y[0, :, 0, 1, 3].any()


REFUSED = [
    (dict(C=32), dict(norm="group"), 'cuda takes norm="rms", one pass; got norm="group"'),
    (dict(C=1032), {}, "cuda takes at most 1024 channels; got 1032"),
    (dict(C=12), {}, "channels in multiples of 8 in channels-last videos of torch.bfloat16; got 12"),
    (dict(layout=FIRST, W=3), {}, r"T·H·W in multiples of 8 in channels-first videos of torch.bfloat16; got 12"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, how, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_the_kernel_does_not_take_is_unavailable_with_the_reason(sizes, how, message):
    size = dict(C=16, W=4, layout=LAST) | sizes
    x = torch.zeros(1, size["C"], 2, 2, size["W"]).bfloat16().contiguous(memory_format=size["layout"])
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        norm_silu(x, torch.ones(size["C"]), impl="cuda", **how)


def test_gradients_and_offsets_are_unavailable_and_auto_does_not_choose_it():
    x = torch.zeros(1, 8, 1, 2, 17)
    with nvcc.nvcc_on(90):
        with pytest.raises(Unavailable, match="norm_silu is forward-only in cuda"):
            norm_silu(x.requires_grad_(), torch.ones(8), impl="cuda")
        with pytest.raises(Unavailable, match="storage offsets that are multiples of 4; got 1"):
            norm_silu(torch.zeros(65)[1:].view(1, 8, 1, 2, 4), torch.ones(8), impl="cuda")
        assert "cuda" not in _dispatch._able.__wrapped__("norm_silu", "cpu", torch.bfloat16, False)
