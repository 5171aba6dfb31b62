"""CUDA C++ attention as nvcc compiles it for sm_90a, executed without a GPU: numbers, schedules, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator

import ptx
import pytest
import torch
from ptx import nvcc
from test_attention import explicit

from sora_kernels import Unavailable, _dispatch, _library, spacetime_attention
from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)
# Sq, Sk, H, Hk, E, blocks; a tile has 128 queries and 176 keys, a ring two tiles. One of each; one more than a tile of
# each; rings that wrap, and whose places are odd where a block goes on to its next tile; keys that fill their tiles.
CASES = [
    (1, 1, 1, 1, 64, 1), (129, 177, 2, 2, 64, 3), (70, 540, 2, 1, 64, 1), (130, 352, 1, 1, 96, 1),
    (129, 129, 1, 1, 128, 2), (65, 400, 2, 1, 128, 1),
]  # fmt: skip


def heads(B: int, S: int, H: int, E: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(B, S, H, E).to(dtype)


def check(Sq: int, Sk: int, H: int, Hk: int, E: int, blocks: int, dtype: torch.dtype, **schedules: int) -> None:
    q, k, v = heads(1, Sq, H, E, dtype), heads(1, Sk, Hk, E, dtype), heads(1, Sk, Hk, E, dtype)
    out, lse = ptx.unwritten(1, Sq, H, E, dtype=dtype), ptx.unwritten(1, H, Sq)
    nvcc.attention(90, q, k, v, 0.2, out, lse, blocks, **schedules)
    oracle = explicit(q.double(), k.double(), v.double(), scale=0.2)
    baseline = explicit(q, k, v, scale=0.2)
    assert_matches_oracle(out, oracle[0], baseline[0], "out", max(Sk, E))
    assert_matches_oracle(lse, oracle[1], baseline[1].float(), "lse", max(Sk, E))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Sq, Sk, H, Hk, E, blocks", CASES, ids=str)
def test_attention_as_nvcc_compiles_it(Sq, Sk, H, Hk, E, blocks, dtype):
    check(Sq, Sk, H, Hk, E, blocks, dtype, schedule=2, again=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize("Sk", [2, 175, 176, 511, 900])
def test_sweep_of_sizes_and_schedules(Sk, E, dtype):
    for seed, Sq in enumerate((63, 64, 128, 191, 300)):
        check(Sq, Sk, 3, 1, E, 1 + seed, dtype, schedule=10 + seed, again=20 + seed)


FAULTS = {  # label -> pattern, replacement; each place by itself
    "a wait for an mbarrier removed": (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, .*$", "setp.eq.u32 p, 0, 0;"),
    "a barrier of the block removed": (r"^\tbar\.sync \t0;$", ""),
    "a named barrier removed": (r"^\tbar\.(sync|arrive) %r\d+, %r\d+;$", ""),
    "a fence of the async proxy removed": (r"^\tfence\.proxy\.async\.shared::cta;$", ""),
    "a wait for products removed": (r"^\twgmma\.wait_group\.sync\.aligned \d;$", ""),
    "a wait for products too lax": (r"^\twgmma\.wait_group\.sync\.aligned 0;$", "\twgmma.wait_group.sync.aligned 1;"),
    "a fence of products removed": (r"^\twgmma\.fence\.sync\.aligned;$", ""),
    "a wait for stores removed": (r"^\tcp\.async\.bulk\.wait_group\.read 0;$", ""),
}
UNSEEN = {  # places of a fault that may go unseen
    "a named barrier removed": 2,  # of turns, which order work and guard no data: the loop's wait, the last
    "a fence of products removed": 3,  # the first scores, before which nothing was written; each of two in a row
}


def planted(label: str) -> Iterator[str]:
    """The PTX with one fault in the kernel of bf16 heads of 64."""
    text = nvcc.compiled("attention", 90)
    begin = text.index("13__nv_bfloat16Li64E")
    end = text.find(".entry", begin)
    pattern, replacement = FAULTS[label]
    for hit in re.compile(pattern, re.M).finditer(text, begin, end if end > 0 else len(text)):
        yield text[: hit.start()] + replacement + text[hit.end() :]


def found(text: str) -> str | None:
    """What finds the fault, under one of eight schedules."""
    q, k, v = heads(1, 140, 1, 64, torch.bfloat16), *heads(2, 540, 1, 64, torch.bfloat16).split(1)
    oracle, baseline = explicit(q.double(), k.double(), v.double()), explicit(q, k, v)
    for schedule in range(8):
        out, lse = ptx.unwritten(1, 140, 1, 64, dtype=q.dtype), ptx.unwritten(1, 1, 140)
        try:
            nvcc.attention(90, q, k, v, 0.125, out, lse, 1, lambda _: text, schedule=schedule, budget=400_000)
            assert_matches_oracle(out, oracle[0], baseline[0], "out", 540)
        except ptx.Fault as fault:
            return fault.kind
        except AssertionError:
            return "wrong result"
    return None


@pytest.mark.parametrize("label", FAULTS)
def test_planted_faults_are_found(label):
    by = [found(text) for text in planted(label)]
    assert len(by) - by.count(None) >= 1 and by.count(None) <= UNSEEN.get(label, 0), by
    assert "wrong result" not in by, f"{by}: the checks themselves should have found it"


def test_the_op_takes_slices_and_other_orders_of_axes_as_they_are():
    """Of packed qkv the heads in turns, and keys [B, H, S, E]: each has a TMA descriptor of its own strides."""
    q, _, v = heads(2, 40, 6, 64, torch.bfloat16).view(2, 40, 2, 3, 64).unbind(3)
    k = heads(2, 2, 40, 64, torch.bfloat16).transpose(1, 2)
    with nvcc.nvcc_on(90, schedule=3):
        out, lse = spacetime_attention(q, k, v, return_lse=True, impl="cuda")
    oracle, baseline = explicit(q.double(), k.double(), v.double()), explicit(q, k, v)
    assert_matches_oracle(out, oracle[0], baseline[0], "out", 64)
    assert_matches_oracle(lse, oracle[1], baseline[1].float(), "lse", 64)


def test_special_values_reach_the_queries_that_see_them_and_no_others():
    q, k, v = (heads(1, 130, 1, 64, torch.float16) for _ in range(3))
    q[0, 3, 0, 5] = float("nan")
    q[0, 77] = float("inf")  # scores of both infinities
    v[0, 129, 0, 7] = float("inf")
    out, lse = ptx.unwritten(1, 130, 1, 64, dtype=torch.float16), ptx.unwritten(1, 1, 130)
    nvcc.attention(90, q, k, v, 0.125, out, lse)
    plain = torch.nn.functional.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)))
    plain = plain.transpose(1, 2)
    assert torch.equal(out.isnan(), plain.isnan()) and torch.equal(out.isinf(), plain.isinf())
    assert out.isnan().any(-1).sum() == 2 and out.isinf().sum() == 128


REFUSED = [
    (dict(E=72), {}, r"cuda takes bfloat16 or float16 heads of \(64, 96, 128\); got torch.bfloat16 heads of 72"),
    (dict(dtype=torch.float32), {}, "got torch.float32 heads of 64"),
    (dict(S=0), {}, "cuda takes no empty tensors"),
    ({}, dict(scale=0.0), "cuda takes a scale above 0; got 0.0"),
    ({}, dict(grid=(1, 2, 5), window=(1, 1, 3)), "cuda takes attention without kv_lens, window, causal or packed"),
    ({}, dict(kv_lens=torch.tensor([3])), "cuda takes attention without kv_lens, window, causal or packed"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, change, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_the_kernel_does_not_take_is_unavailable_with_the_reason(sizes, change, message):
    x = heads(*(dict(B=1, S=10, H=2, E=64, dtype=torch.bfloat16) | sizes).values())
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        spacetime_attention(x, x, x, impl="cuda", **change)


def test_strides_that_no_descriptor_takes_and_gradients_are_unavailable():
    x = heads(1, 10, 2, 64, torch.bfloat16)
    odd = torch.zeros(1, 10, 2, 68, dtype=x.dtype)[..., :64]
    with nvcc.nvcc_on(90):
        for k in (odd, x[:, :1].expand(1, 10, 2, 64)):
            with pytest.raises(Unavailable, match="multiples of 8 elements, no expanded ones; got k with strides"):
                spacetime_attention(x, k, x, impl="cuda")
        with pytest.raises(Unavailable, match="forward-only in cuda"):
            spacetime_attention(x.clone().requires_grad_(), x, x, impl="cuda")
    with nvcc.nvcc_on(80), pytest.raises(Unavailable, match="cuda needs a GPU of compute capability 9.0; got 8.0"):
        spacetime_attention(x, x, x, impl="cuda")


def test_auto_does_not_choose_what_was_never_run():
    assert "cuda" in _library.impls("spacetime_attention_fwd")
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__("spacetime_attention", "cpu", torch.bfloat16, False)
