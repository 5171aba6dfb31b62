"""Attention over parts of the keys, joined in fp32: what a ring of devices computes is rounded once, as one call is."""

from __future__ import annotations

import pytest
import torch

from sora_kernels import Unavailable, _dispatch, attention_backward, attention_forward
from sora_kernels.attention import merge_attention
from sora_kernels.testing import assert_matches_oracle

IMPLS = ["reference", "cpu", "triton"]
PARTS = 3


def drawn(dtype, S=42, H=4, Hk=2, E=16):
    return [torch.randn(2, S, heads, E).to(dtype) for heads in (H, Hk, Hk, H)]


def whole(q, k, v, dout, impl, **how):
    out, lse = attention_forward(q, k, v, impl=impl, **how)
    return [out, *attention_backward(dout, q, k, v, out, lse, impl=impl, **how)]


def in_parts(q, k, v, dout, impl, out_dtype):
    parts = list(zip(k.chunk(PARTS, 1), v.chunk(PARTS, 1), strict=True))
    out, lse = attention_forward(q, *parts[0], out_dtype=out_dtype, impl=impl)
    for part in parts[1:]:
        out, lse = merge_attention((out, lse), attention_forward(q, *part, out_dtype=out_dtype, impl=impl))
    out = out.to(q.dtype)
    grads = [attention_backward(dout, q, *part, out, lse, out_dtype=out_dtype, impl=impl) for part in parts]
    dqs, dks, dvs = zip(*grads, strict=True)
    assert {d.dtype for part in grads for d in part} == {out_dtype or q.dtype}
    return [t.to(q.dtype) for t in (out, sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_parts_joined_in_fp32_are_rounded_once(impl, dtype, require):
    require("spacetime_attention", impl, dtype=dtype, grad=True)
    if impl == "triton" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("Triton's interpreter computes bf16 products on raw bits")
    given = drawn(dtype)
    ours, one = in_parts(*given, impl, torch.float32), whole(*given, impl)
    exact = whole(*(t.double() for t in given), "reference")
    for name, part, single, oracle in zip(("out", "dq", "dk", "dv"), ours, one, exact, strict=True):
        assert_matches_oracle(part, oracle, single, name)
    if dtype == torch.float32:
        return
    rounded = in_parts(*given, impl, None)
    for name, *results, oracle in zip(("out", "dq"), ours, one, rounded, exact, strict=False):
        of_ours, of_one, of_rounded = [(t.double() - oracle).square().mean().sqrt().item() for t in results]
        assert of_ours < 1.05 * of_one and 1.03 * of_ours < of_rounded, (name, of_ours, of_one, of_rounded)


@pytest.mark.parametrize("impl", IMPLS)
def test_windows_take_it_too(impl, require):
    require("spacetime_attention", impl, dtype=torch.float16, grad=True)
    q, k, v, dout = drawn(torch.float16)
    how = dict(grid=(3, 2, 7), window=(2, 1, 3), causal="frame")
    out, lse = attention_forward(q, k, v, out_dtype=torch.float32, impl=impl, **how)
    grads = attention_backward(dout, q, k, v, out.half(), lse, out_dtype=torch.float32, impl=impl, **how)
    for wide, narrow in zip((out, *grads), whole(q, k, v, dout, impl, **how), strict=True):
        assert wide.dtype == torch.float32 and not torch.equal(wide, narrow.float())
        assert torch.equal(wide.half(), narrow)


def test_what_cannot_give_fp32_says_so():
    q, k, v, dout = drawn(torch.bfloat16, Hk=4)
    with pytest.raises(Unavailable, match=r"sdpa gives torch.bfloat16 for torch.bfloat16; got out_dtype=torch.float32"):
        attention_forward(q, k, v, out_dtype=torch.float32, impl="sdpa")
    out, lse = attention_forward(q, k, v, impl="sdpa")
    with pytest.raises(Unavailable, match="sdpa gives"):
        attention_backward(dout, q, k, v, out, lse, out_dtype=torch.float32, impl="sdpa")
    for wrong in (torch.float16, torch.float64, "fp32"):
        with pytest.raises(ValueError, match="out_dtype must be q's torch.bfloat16, torch.float32 or None; got"):
            attention_forward(q, k, v, out_dtype=wrong)
