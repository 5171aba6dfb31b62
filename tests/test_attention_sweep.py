"""Random modes of attention over small clips: the plan's promises, the Triton kernels and the C++ kernels."""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_attention import brute_mask
from test_attention_plan import expand
from test_attention_triton import DEVICE, check

from sora_kernels import attention_plan, spacetime_attention
from sora_kernels.attention import config

QUICK = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
TILES = st.sampled_from([(16, 16), (32, 16), (16, 64)])


@st.composite
def modes(draw):
    """(q_len, k_len, mode) of any combination of rules over small clips."""
    side, flag = st.integers(1, 5), st.booleans()
    mode, packed = {}, draw(st.integers(0, 4)) == 0
    size = st.tuples(st.integers(1, 4), side, side)
    if draw(flag):
        mode["window"] = draw(st.tuples(side, side, side))
        mode["stride"] = draw(st.tuples(side, side, side))
        if draw(flag):
            mode["dilation"] = draw(st.tuples(*[st.integers(1, 3)] * 3))
        else:
            mode["sink"] = draw(st.integers(0, 2))
    if draw(flag):
        mode["causal"] = draw(st.sampled_from(["frame", 2, 3]))
        if not mode.get("sink") and draw(flag):
            mode["causal"] = draw(st.tuples(*[st.integers(0, 2)] * 3))
    if packed:
        mode["grids"] = draw(st.lists(size, min_size=1, max_size=3))
        length = sum(math.prod(g) for g in mode["grids"])
        return length, length, mode
    mode["grid"] = grid = draw(size)
    mode["text_len"], mode["text_at"] = draw(st.integers(0, 18)), draw(st.sampled_from(["end", "start"]))
    frames = draw(st.integers(1, grid[0]))
    length = math.prod(grid)
    return frames * grid[1] * grid[2] + mode["text_len"], length + mode["text_len"], mode


def check_plan(case, tile, key_tile, transposed) -> None:
    q_len, k_len, mode = case
    plan = attention_plan(q_len, k_len, **mode, tile=tile, key_tile=key_tile, transposed=transposed)
    mask = brute_mask(q_len, k_len, **mode)
    met, owned = expand(plan)
    assert (owned == 1).all() and torch.equal(met, (mask.T if transposed else mask).int())
    assert plan.visible_pairs() == mask.sum()


VOLUME = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(modes(), VOLUME, VOLUME, st.booleans())
def test_plans(case, tile, key_tile, transposed):
    check_plan(case, tile, key_tile, transposed)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(modes(), VOLUME, VOLUME, st.booleans())
def test_many_plans(case, tile, key_tile, transposed):
    check_plan(case, tile, key_tile, transposed)


def run(case, attend) -> None:
    q_len, k_len, mode = case
    inputs = {n: torch.randn(1, q_len if n == "q" else k_len, 1, 8, device=DEVICE) for n in "qkv"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_attention_triton.attend", attend)
        check(inputs, brute_mask(q_len, k_len, **mode)[None, None].to(DEVICE), mode, few=True)


def run_triton(case, shape) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward_queries", "backward_keys"):
            patch.setattr(config, name, lambda *_: config.Tile(*shape, 4, 2))
        run(case, functools.partial(spacetime_attention, impl="triton"))


@QUICK
@given(modes(), TILES)
def test_triton(case, shape):
    run_triton(case, shape)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(modes(), TILES)
def test_triton_long(case, shape):
    run_triton(case, shape)


@pytest.mark.skipif(DEVICE != "cpu", reason="tensors are on a GPU")
@settings(QUICK, max_examples=100)
@given(modes())
def test_cpu(case):
    run(case, functools.partial(spacetime_attention, impl="cpu"))
