"""Rules of each head's own: windows and strides given as lists, in every implementation, against the definition."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo.testing
from test_attention import brute_mask
from test_attention_plan import expand
from test_attention_triton import DEVICE, check

from sora_kernels import _dispatch, attention_plan, spacetime_attention
from sora_kernels.attention import attention_backward, attention_forward, config
from sora_kernels.attention.mode import by_head, resolve
from sora_kernels.testing import outputs_and_grads, poison_empty

ONE, TILE, SPACE, TIME, WHOLE = (1, 1, 1), (2, 2, 2), (1, 3, 4), (3, 1, 1), (3, 3, 4)
SMALL = (3, 3, 4)
MODES = {  # of four heads; some keep the same rule
    "space_and_time": (36, 36, dict(grid=SMALL, window=[SPACE, TIME, TIME, SPACE])),
    "strides": (
        38, 38, dict(grid=SMALL, window=[TILE, TILE, (1, 2, 2), WHOLE], stride=[ONE, TILE, (1, 1, 2), ONE], text_len=2)
    ),
    "strides_alone": (36, 36, dict(grid=SMALL, window=(2, 3, 2), stride=[ONE, (1, 1, 2), (2, 1, 1), ONE])),
    "causal_sink_cache": (
        16, 28, dict(grid=(4, 2, 3), window=[(1, 2, 3), (2, 1, 2), (4, 2, 3), (1, 2, 3)], causal="frame", sink=1,
                     text_len=4, text_at="start"),
    ),
    "packed": (
        26, 26, dict(grids=[(2, 2, 3), (1, 2, 1), (3, 2, 2)], window=[(1, 1, 2), (3, 2, 3), (1, 1, 2), (2, 1, 1)])
    ),
}  # fmt: skip
HEADS = {"of its own": (4, 4), "mixed in a group": (4, 2), "one key head": (4, 1)}


def alone(mode: dict, head: int) -> dict:
    """The mode of one head."""
    lists = {n: mode[n] for n in ("window", "stride") if isinstance(mode.get(n), list)}
    return mode | {name: rules[head] for name, rules in lists.items()}


@functools.cache
def definition(name: str) -> torch.Tensor:
    """`[1, heads, Sq, Sk]`"""
    q_len, k_len, mode = MODES[name]
    return torch.stack([brute_mask(q_len, k_len, **alone(mode, h)) for h in range(4)])[None]


def draw(name, heads, dtype=torch.float32, E=8):
    q_len, k_len, mode = MODES[name]
    B = 1 if "grids" in mode else 2
    shapes = dict(q=(B, q_len, heads[0], E), k=(B, k_len, heads[1], E), v=(B, k_len, heads[1], E))
    return {n: torch.randn(s, device=DEVICE).to(dtype) for n, s in shapes.items()}, mode, definition(name).to(DEVICE)


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request, monkeypatch, require):
    if request.param == "cpu" and DEVICE != "cpu":
        pytest.skip("tensors are on a GPU")
    require("spacetime_attention", request.param, DEVICE)
    monkeypatch.setattr(
        "test_attention_triton.attend", functools.partial(spacetime_attention, impl=request.param)
    )
    for kernel in ("forward", "backward_queries", "backward_keys"):
        monkeypatch.setattr(config, kernel, lambda *_: config.Tile(16, 32, 4, 2))
    return request.param


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", MODES)
def test_mode_of_each_head(name, heads, impl):
    inputs, mode, mask = draw(name, heads)
    check(inputs, mask, mode, few=True)


def test_half_precision_and_padding(impl):
    inputs, mode, mask = draw("strides", (4, 2), torch.float16)
    lens = torch.tensor([38, 11], device=DEVICE)
    real = torch.arange(38, device=DEVICE) < lens[:, None]
    for n in "kv":
        inputs[n] = inputs[n].masked_fill(~real[:, :, None, None], float("nan"))
    check(inputs, mask & real[:, None, None], mode, kv_lens=lens, few=True)


@pytest.mark.parametrize("name", ["space_and_time", "causal_sink_cache"])
def test_heads_are_what_calls_of_their_own_give_and_repeat_bitwise(name, impl):
    inputs, mode, _ = draw(name, (4, 4))
    grads = [torch.randn_like(inputs["q"])]

    def run(inputs, mode, grads):
        with poison_empty():
            return outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode, impl=impl), inputs, grads)

    first, second = (run(inputs, mode, grads) for _ in range(2))
    for head in range(4):
        one = slice(head, head + 1)
        single = run({n: t[:, :, one] for n, t in inputs.items()}, alone(mode, head), [g[:, :, one] for g in grads])
        for n, value in first.items():
            assert torch.equal(value, second[n]), n
            if impl != "reference":  # whose products of several heads are one call
                assert torch.equal(value[:, :, one], single[n]), (n, head)
            torch.testing.assert_close(value[:, :, one], single[n])


def test_mixed_groups_repeat_bitwise_and_give_only_the_gradients_asked_for(impl):
    inputs, mode, _ = draw("causal_sink_cache", (4, 2))
    grads = [torch.randn_like(inputs["q"])]
    whole, again = (
        outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode, impl=impl), inputs, grads) for _ in range(2)
    )
    for name in inputs:
        some = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        (grad,) = torch.autograd.grad(spacetime_attention(**some, **mode, impl=impl), some[name], grads)
        assert torch.equal(grad, whole[f"grad {name}"]) and torch.equal(grad, again[f"grad {name}"])


def test_the_two_halves_take_lists_too(impl):
    inputs, mode, _ = draw("strides", (4, 2))
    dout = torch.randn_like(inputs["q"])
    out, lse = attention_forward(**inputs, **mode, impl=impl)
    grads = attention_backward(dout, *inputs.values(), out, lse, **mode, impl=impl)
    whole = outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode, impl=impl), inputs, [dout])
    for ours, expected in zip((out, *grads), whole.values(), strict=True):
        assert torch.equal(ours, expected)


def test_one_launch_for_each_distinct_rule(monkeypatch):
    if reason := _dispatch.why_not("spacetime_attention", "triton", DEVICE):
        pytest.skip(reason)
    from sora_kernels.attention import kernels_forward

    launches = []

    class Counter:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(kwargs)

    monkeypatch.setattr(kernels_forward, "attention_fwd_kernel", Counter())
    for name, count in (("space_and_time", 2), ("strides", 4), ("packed", 3)):
        inputs, mode, _ = draw(name, (4, 4))
        launches.clear()
        attention_forward(**inputs, **mode, impl="triton")
        assert len(launches) == count, name


def test_equal_rules_are_one_rule():
    rules = dict(grids=None, dilation=1, causal=None, sink=1, text_len=0, text_at="end")
    given = functools.partial(resolve, "test", 36, 36, (3, 3, 4), **rules, heads=3)
    assert given(window=[TILE] * 3, stride=2) == given(window=TILE, stride=(2, 2, 2))
    assert given(window=[WHOLE, (9, 9, 9), WHOLE], stride=1) == given(window=None, stride=1), "they hide nothing"
    form = given(window=[TILE, WHOLE, TILE], stride=[(2, 2, 2), (3, 3, 3), [2, 2, 2]])
    assert by_head(form, 3) == [((0, 2), given(window=TILE, stride=2)), ((1,), given(window=None, stride=1))]


@pytest.mark.parametrize("transposed", [False, True], ids=["queries own", "keys own"])
@pytest.mark.parametrize("name", MODES)
def test_plans_of_a_list(name, transposed):
    q_len, k_len, mode = MODES[name]
    plans = attention_plan(q_len, k_len, **mode, tile=8, key_tile=4, transposed=transposed)
    assert sorted(h for heads, _ in plans for h in heads) == [0, 1, 2, 3]
    assert len(plans) == len({id(plan) for _, plan in plans}) < 5
    for heads, plan in plans:
        met, _ = expand(plan)
        for head in heads:
            mask = definition(name)[0, head]
            assert torch.equal(met, (mask.T if transposed else mask).int()), head


def test_a_list_of_one_head():
    ((heads, plan),) = attention_plan(36, grid=(3, 3, 4), window=[TILE])
    assert heads == (0,) and plan is attention_plan(36, grid=(3, 3, 4), window=TILE)


def test_compiles_whole():
    inputs, mode, _ = draw("strides", (4, 2))
    attend = functools.partial(spacetime_attention, **mode)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    grads = [torch.randn_like(inputs["q"])]
    ours, expected = (outputs_and_grads(f, inputs, grads) for f in (compiled, attend))
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


x = torch.zeros(1, 12, 4, 8)
ERRORS = [
    (dict(window=[TILE] * 3), "window must be one .t, h, w. for all heads or a list .* the 4 heads of q; got 3"),
    (dict(window=TILE, stride=[(1, 1, 2)] * 5), "stride must be one .* the 4 heads of q; got 5"),
    (dict(window=[TILE, TILE, None, TILE]), r"window\[2\] must be three integers .t, h, w.; got None"),
    (dict(window=[TILE, (1, 2), TILE, TILE]), r"window\[1\] must be three integers"),
    (dict(window=[TILE, TILE, TILE, (1, 0, 2)]), r"window\[3\] must be at least 1; got .1, 0, 2."),
    (dict(window=[TILE] * 4, stride=[(1, 1, 1), 2, 2, 2]), r"stride\[1\] must be three integers"),
    (dict(window=[]), "window must be three integers"),
    (dict(stride=[(1, 1, 2)] * 4), "give window as well"),
    (dict(grid=None, window=[TILE] * 4), "window needs grid"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        spacetime_attention(x, x, x, **dict(grid=(2, 2, 3)) | change)
    assert "spacetime_attention" in str(caught.value)


def test_plan_of_lists_that_do_not_match():
    with pytest.raises(ValueError, match="window and stride must be one rule or one for each head; got 2 and 3"):
        attention_plan(12, grid=(2, 2, 3), window=[TILE] * 2, stride=[(1, 1, 2)] * 3)
