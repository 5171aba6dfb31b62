"""CUDA C++ attention as nvcc compiles it for sm_90a, executed without a GPU: numbers, schedules, refusals."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.planted import found, planted
from ptx.sweeps import faults, in_turns
from test_attention import explicit

from sora_kernels import Unavailable, _dispatch, _library, spacetime_attention
from sora_kernels.attention import reference
from sora_kernels.attention.mode import resolve
from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)
RULES = (
    ("grid", None), ("grids", None), ("window", None), ("stride", 1), ("dilation", 1), ("causal", None), ("sink", 0),
    ("text_len", 0), ("text_at", "end"),
)  # fmt: skip
# Sq, Sk, H, Hk, E, blocks; a tile has 128 queries and 176 keys, a ring two tiles. One of each; one more than a tile of
# each; rings that wrap, and whose places are odd where a block goes on to its next tile; keys that fill their tiles.
CASES = [
    (1, 1, 1, 1, 64, 1), (129, 177, 2, 2, 64, 3), (70, 540, 2, 1, 64, 1), (130, 352, 1, 1, 96, 1),
    (129, 129, 1, 1, 128, 2), (65, 400, 2, 1, 128, 1),
]  # fmt: skip


def heads(B: int, S: int, H: int, E: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(B, S, H, E).to(dtype)


def check(
    Sq: int, Sk: int, H: int, Hk: int, E: int, blocks: int, dtype: torch.dtype, lengths: torch.Tensor | None = None,
    **schedules: int,
) -> None:  # fmt: skip
    B, mask = 1 if lengths is None else len(lengths), None
    q, k, v = heads(B, Sq, H, E, dtype), heads(B, Sk, Hk, E, dtype), heads(B, Sk, Hk, E, dtype)
    out, lse = ptx.unwritten(B, Sq, H, E, dtype=dtype), ptx.unwritten(B, H, Sq)
    shown = k, v
    if lengths is not None:
        mask = (torch.arange(Sk) < lengths[:, None])[:, None, None].expand(B, 1, Sq, Sk)
        hidden = ~mask[:, 0, 0, :, None, None]
        k, v = (t.masked_fill(hidden, 0) for t in shown)
        shown = [t.masked_fill(hidden, float("nan")) for t in shown]
    nvcc.attention(90, q, *shown, 0.2, out, lse, blocks, kv_lens=lengths, **schedules)
    oracle = explicit(q.double(), k.double(), v.double(), mask, scale=0.2)
    baseline = explicit(q, k, v, mask, scale=0.2)
    assert_matches_oracle(out, oracle[0], baseline[0], "out", max(Sk, E))
    check_lse(lse, oracle[1], baseline[1].float(), max(Sk, E))


def check_lse(*found: torch.Tensor | int) -> None:
    """Of the kernel, the oracle and plain PyTorch: -inf where a query sees nothing, by the error rule elsewhere."""
    *tables, terms = found
    assert all(torch.equal(t.isneginf(), tables[0].isneginf()) for t in tables)
    assert_matches_oracle(*(t.nan_to_num(neginf=0.0) for t in tables), "lse", terms)


@pytest.mark.parametrize("Sq, Sk, H, Hk, E, blocks, dtype", in_turns(CASES, DTYPES), ids=str)
def test_attention_as_nvcc_compiles_it(Sq, Sk, H, Hk, E, blocks, dtype):
    check(Sq, Sk, H, Hk, E, blocks, dtype, schedule=2, again=5)


@pytest.mark.parametrize("dtype, E, kind", [(DTYPES[0], 64, torch.int64), (DTYPES[1], 96, torch.int32)], ids=str)
def test_keys_that_kv_lens_hides_are_no_numbers(dtype, E, kind):
    """No key at all, one; a tile less one, a tile, one more; all: a block goes on from each to the next."""
    lengths = torch.tensor([0, 1, 175, 176, 177, 190], dtype=kind)
    check(70, 190, 1, 1, E, 1, dtype, lengths, schedule=3, again=4)


def test_the_op_takes_kv_lens():
    q, k, v = heads(2, 20, 4, 64, torch.bfloat16), *heads(4, 200, 2, 64, torch.bfloat16).split(2)
    lengths, mask = torch.tensor([180, 7]), (torch.arange(200) < torch.tensor([[180], [7]]))[:, None, None]
    oracle = explicit(q.double(), k.double(), v.double(), mask.expand(2, 1, 20, 200))
    baseline = explicit(q, k, v, mask.expand(2, 1, 20, 200))
    k[0, 180:], v[1, 7:] = float("nan"), float("inf")
    with nvcc.nvcc_on(90, schedule=3):
        out, lse = spacetime_attention(q, k, v, kv_lens=lengths, return_lse=True, impl="cuda")
    assert_matches_oracle(out, oracle[0], baseline[0], "out", 200)
    check_lse(lse, oracle[1], baseline[1].float(), 200)


# Sq, Sk, H, Hk, E, mode. A tile has 128 queries and 128 keys, a ring three tiles
PLANS = {
    "packed": (410, 410, 2, 1, 64, dict(grids=[(3, 5, 9), (1, 1, 1), (2, 1, 70), (2, 67, 1)])),
    "packed causal": (287, 287, 1, 1, 96, dict(grids=[(4, 5, 7), (3, 7, 7)], causal="frame")),
    "packed time window": (180, 180, 1, 1, 64, dict(grids=[(6, 4, 5), (4, 3, 5)], window=(3, 9, 9))),
    "frame causal": (600, 600, 2, 1, 128, dict(grid=(5, 10, 12), causal="frame")),
    "chunk causal": (350, 350, 1, 1, 64, dict(grid=(7, 5, 10), causal=2)),
    "cache": (110, 330, 2, 2, 64, dict(grid=(6, 5, 11), causal="frame")),
    "causal window, sink": (420, 420, 1, 1, 64, dict(grid=(7, 6, 10), window=(2, 6, 10), causal="frame", sink=1)),
    "window": (9 * 11 * 13, 9 * 11 * 13, 1, 1, 64, dict(grid=(9, 11, 13), window=(5, 5, 7))),
    "tiles": (4 * 9 * 17, 4 * 9 * 17, 2, 1, 128, dict(grid=(4, 9, 17), window=(2, 6, 8), stride=(2, 3, 8))),
    "narrow": (300, 300, 1, 1, 96, dict(grid=(15, 10, 2), window=(5, 3, 1))),
    "window along w": (2 * 3 * 70, 2 * 3 * 70, 1, 1, 64, dict(grid=(2, 3, 70), window=(2, 3, 20))),
    "text first": (330, 330, 1, 1, 64, dict(grid=(4, 8, 10), window=(2, 5, 4), text_len=10, text_at="start")),
    "text last, cache": (170, 330, 2, 1, 96, dict(grid=(4, 8, 10), window=(2, 5, 4), text_len=10)),
    "text alone": (10, 330, 1, 1, 64, dict(grid=(4, 8, 10), window=(2, 5, 4), text_len=10)),
    "sink": (480, 480, 1, 1, 64, dict(grid=(6, 8, 10), window=(1, 3, 4), sink=2)),
    "causal on all axes": (480, 480, 1, 1, 64, dict(grid=(6, 8, 10), causal=(2, 3, 1))),
    "sees nothing": (480, 480, 1, 1, 64, dict(grid=(6, 8, 10), window=(1, 8, 10), stride=(4, 1, 1), causal="frame")),
    "heads": (320, 320, 4, 2, 64, dict(grid=(4, 8, 10), window=[(2, 8, 10), (4, 4, 4), (4, 8, 10), (2, 8, 10)])),
}  # fmt: skip
PADDED = {  # and lengths of two clips
    "frame causal": (*PLANS["frame causal"], [600, 333]),
    "window, text": (330, 330, 2, 1, 64, dict(grid=(4, 8, 10), window=(2, 5, 4), text_len=10), [324, 320]),
    "window": (480, 480, 1, 1, 96, dict(grid=(6, 8, 10), window=(3, 5, 4)), [0, 273]),
}


def check_plan(Sq, Sk, H, Hk, E, mode, lengths=None, dtype=torch.bfloat16, blocks=2, **schedules) -> None:
    B = len(lengths or (1,))
    q, k, v = heads(B, Sq, H, E, dtype), heads(B, Sk, Hk, E, dtype), heads(B, Sk, Hk, E, dtype)
    lens = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    form = resolve("test", Sq, Sk, *(mode.get(n, d) for n, d in RULES), heads=H)
    mask = torch.cat([part.expand(B, H, -1, Sk) for _, part in reference.masks(q, k, lens, *form)], 2)
    shown = k, v
    if lens is not None:
        hidden = (torch.arange(Sk) >= lens[:, None])[:, :, None, None]
        k, v = (t.masked_fill(hidden, 0) for t in shown)
        shown = [t.masked_fill(hidden, float("nan")) for t in shown]
    with nvcc.nvcc_on(90, blocks=blocks, **schedules):
        out, lse = spacetime_attention(q, *shown, kv_lens=lens, **mode, return_lse=True, impl="cuda")
    oracle = explicit(q.double(), k.double(), v.double(), mask)
    baseline = explicit(q, k, v, mask)
    assert_matches_oracle(out, oracle[0], baseline[0], "out", Sk)
    check_lse(lse, oracle[1], baseline[1].float(), Sk)


@pytest.mark.parametrize("name", PLANS)
def test_plans_as_nvcc_compiles_them(name):
    """Each in one dtype here; in the sweep in both."""
    check_plan(*PLANS[name], dtype=DTYPES[len(name) % 2], schedule=2, again=5)


@pytest.mark.parametrize("name", PADDED)
def test_plans_hide_what_kv_lens_hides(name):
    check_plan(*PADDED[name], dtype=DTYPES[len(name) % 2], schedule=2, again=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*PLANS, *(f"{name}, padded" for name in PADDED)])
def test_sweep_of_plans_and_schedules(name, dtype):
    Sq, Sk, H, Hk, _, *rest = PLANS[name] if name in PLANS else PADDED[name.removesuffix(", padded")]
    for seed, E in enumerate((64, 96, 128)):
        check_plan(Sq, Sk, H, Hk, E, *rest, dtype=dtype, blocks=1 + 2 * seed, schedule=seed, again=10 + seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [64, 96, 128])
def test_sweep_of_lengths_and_schedules(E, dtype):
    for seed, lengths in enumerate(([352, 0, 353], [175, 176, 177], [400, 399, 2], [1, 340, 0])):
        check(1 + 64 * seed, 400, 2, 1, E, 1 + seed, dtype, torch.tensor(lengths), schedule=seed, again=20 + seed)


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
    "a barrier of a warp removed": (r"^\tbar\.warp\.sync \t-1;$", ""),
    "a named barrier removed": (r"^\tbar\.(sync|arrive) %r\d+, %r\d+;$", ""),
    "a fence of the async proxy removed": (r"^\tfence\.proxy\.async\.shared::cta;$", ""),
    "a wait for products removed": (r"^\twgmma\.wait_group\.sync\.aligned \d;$", ""),
    "a wait for products too lax": (r"(?<=^\twgmma\.wait_group\.sync\.aligned )0;$", "1;"),
    "a fence of products removed": (r"^\twgmma\.fence\.sync\.aligned;$", ""),
    "a wait for stores removed": (r"^\tcp\.async\.bulk\.wait_group\.read 0;$", ""),
}
UNSEEN = {  # places of a fault that may go unseen
    "a named barrier removed": 2,  # of turns, which order work and guard no data: the loop's wait, the last
    "a fence of products removed": 3,  # the first scores, before which nothing was written; each of two in a row
}


def check_planted(text: str, over_plan: bool, schedule: int) -> None:
    if over_plan:  # values of text are in part hidden; a ring's places are used again
        grid = dict(grid=(4, 8, 9), window=(2, 5, 4), text_len=10)
        how = dict(rewrite=lambda _: text, schedule=schedule, budget=400_000)
        check_plan(298, 298, 1, 1, 64, grid, [293], blocks=1, **how)
        return
    q, k, v = heads(1, 140, 1, 64, torch.bfloat16), *heads(2, 540, 1, 64, torch.bfloat16).split(1)
    real, lengths = (k[:, :530], v[:, :530]), torch.tensor([530])
    oracle, baseline = explicit(q.double(), *(t.double() for t in real)), explicit(q, *real)
    out, lse = ptx.unwritten(1, 140, 1, 64, dtype=q.dtype), ptx.unwritten(1, 1, 140)
    nvcc.attention(90, q, k, v, 0.125, out, lse, 1, lengths, lambda _: text, schedule=schedule, budget=400_000)
    assert_matches_oracle(out, oracle[0], baseline[0], "out", 540)


def check_found_everywhere(label: str, over_plan: bool) -> None:
    texts = planted("attention", f"13__nv_bfloat16Li64ELb{over_plan:d}E", *FAULTS[label])
    by = [found(lambda schedule: check_planted(text, over_plan, schedule)) for text in texts]  # noqa: B023
    unseen = UNSEEN.get(label, 0)
    if over_plan and "async proxy" in label:
        unseen = 1  # before the TMA writes queries where results were, an order that the executor does not ask for
    assert len(by) - by.count(None) >= 1 and by.count(None) <= unseen, by
    assert "wrong result" not in by, f"{by}: the checks themselves should have found it"


@pytest.mark.parametrize("label", faults(FAULTS))
def test_planted_faults_are_found(label):
    check_found_everywhere(label, over_plan=False)


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in FAULTS if "stores" not in label])  # which are no boxes here
def test_planted_faults_are_found_over_a_plan(label):
    check_found_everywhere(label, over_plan=True)


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
    ({}, dict(grid=(1, 2, 5), window=(1, 1, 3), dilation=(1, 1, 2)), r"cuda takes no dilation; got \(1, 1, 2\)"),
    ({}, dict(grids=[(1, 2, 3), (1, 1, 4)], window=(1, 1, 2)), "takes packed clips whose windows hold whole frames"),
    ({}, dict(kv_lens=torch.tensor([3]), scale=-1.0), "cuda takes a scale above 0; got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, change, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_the_kernel_does_not_take_is_unavailable_with_the_reason(sizes, change, message):
    x = heads(*(dict(B=1, S=10, H=2, E=64, dtype=torch.bfloat16) | sizes).values())
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        spacetime_attention(x, x, x, impl="cuda", **change)


def test_heads_of_a_video_that_are_not_side_by_side_are_unavailable():
    x, apart = heads(1, 10, 2, 64, torch.bfloat16), heads(1, 10, 4, 64, torch.bfloat16)[:, :, ::2]
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match="takes heads side by side with grid or grids; got k with"):
        spacetime_attention(x, apart, x, grid=(1, 2, 5), window=(1, 1, 3), impl="cuda")


def test_strides_that_no_descriptor_takes_are_unavailable():
    x = heads(1, 10, 2, 64, torch.bfloat16)
    odd = torch.zeros(1, 10, 2, 68, dtype=x.dtype)[..., :64]
    with nvcc.nvcc_on(90):
        for k in (odd, x[:, :1].expand(1, 10, 2, 64)):
            with pytest.raises(Unavailable, match="multiples of 8 elements, no expanded ones; got k with strides"):
                spacetime_attention(x, k, x, impl="cuda")
    with nvcc.nvcc_on(80), pytest.raises(Unavailable, match="cuda needs a GPU of compute capability 9.0; got 8.0"):
        spacetime_attention(x, x, x, impl="cuda")


def test_auto_does_not_choose_what_was_never_run():
    assert "cuda" in _library.impls("spacetime_attention_fwd")
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__("spacetime_attention", "cpu", torch.bfloat16, False)
