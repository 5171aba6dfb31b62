"""The Triton attention: every mode, forward and backward, against the definition in fp64, with tiles small enough to
meet every border. Without a GPU in the interpreter, in fp32 and fp16."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from test_attention import MODES, brute_mask, definition, explicit, make

from sora_kernels import Unavailable, _dispatch, spacetime_attention
from sora_kernels.attention import attention_backward, attention_forward, config, merge_attention
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

if reason := _dispatch.why_not("spacetime_attention", "triton", "cuda" if torch.cuda.is_available() else "cpu"):
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
attend = functools.partial(spacetime_attention, impl="triton")


@pytest.fixture
def tiles(monkeypatch):
    """Every kernel with tiles of this many queries and keys."""

    def use(queries: int, keys: int) -> None:
        for name in ("forward", "backward_queries", "backward_keys"):
            monkeypatch.setattr(config, name, lambda *_: config.Tile(queries, keys, 4, 2))

    use(16, 16)
    return use


def check(inputs, mask, mode, *, kv_lens=None, scale=None, few=False) -> None:
    """Output, LSE and every gradient, of both results, by the error rule. mask [Sq, Sk] or [B, 1, Sq, Sk].

    few: queries may see so few keys that what plain PyTorch does without error is all that is left. Then the roundings
    of what a backward from the LSE works with count as well: of the LSE, and of the terms of dO·V − Σ dO·O.
    """
    q = inputs["q"]
    grads = [torch.randn_like(q), torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device)]
    lens = {} if kv_lens is None else dict(kv_lens=kv_lens)
    with poison_empty():
        ours = outputs_and_grads(
            lambda **kw: attend(**kw, **mode, **lens, scale=scale, return_lse=True), inputs, grads
        )

    def formula(**kw):
        if kv_lens is not None:  # padding may be NaN
            pad = torch.arange(kw["k"].shape[1], device=q.device)[:, None, None] >= kv_lens.view(-1, 1, 1, 1)
            kw |= {n: kw[n].masked_fill(pad, 0) for n in "kv"}
        out, lse = explicit(**kw, mask=mask, scale=scale)
        return out, lse.to(torch.promote_types(lse.dtype, torch.float32))

    oracle = outputs_and_grads(formula, {n: t.double() for n, t in inputs.items()}, [g.double() for g in grads])
    baseline = outputs_and_grads(formula, inputs, grads)
    for name, expected in oracle.items():
        seen = torch.isfinite(expected)
        assert torch.equal(ours[name][~seen].double(), expected[~seen]), f"{name}: -inf where nothing is seen"
        actual, expected, plain = (t.masked_fill(~seen, 0) for t in (ours[name], expected, baseline[name]))
        if name == "output1":  # to base 2 and back: a rounding of the maximum and of the logarithm, which may cancel
            plain = plain + torch.finfo(torch.float32).eps * max(1, expected.abs().max())
        if few and name.startswith("grad"):
            eps, lse = torch.finfo(torch.float32).eps, oracle["output1"]
            slack = lse[lse.isfinite()].abs().max() * expected.abs().max()
            if name != "grad v":
                k, v = (inputs[n].nan_to_num() for n in "kv")  # padding may be NaN
                slack += grads[0].norm(dim=-1).max() * v.norm(dim=-1).max() * k.abs().max()
            plain = plain + eps * slack
        terms = q.shape[1] if name in ("grad k", "grad v") else inputs["k"].shape[1]
        assert_matches_oracle(actual, expected, plain, name, terms=terms)


def draw(name, dtype=torch.float32, heads=(1, 1), E=8, B=1):
    inputs, mode = make(name, dtype, heads, E)
    return {n: t[:B].to(DEVICE) for n, t in inputs.items()}, mode, definition(name)[None, None].to(DEVICE)


LARGE = {name for name, (q_len, k_len, _) in MODES.items() if q_len * k_len > 700}


@pytest.mark.parametrize("name", MODES)
def test_mode(name, tiles):
    if name in LARGE:
        tiles(32, 32)
    inputs, mode, mask = draw(name)
    check(inputs, mask, mode)


@pytest.mark.parametrize("name", ["cross", "window_text_start", "causal_window_sink_cache", "packed_causal"])
def test_half_precision_heads_and_batches(name, tiles):
    tiles(16, 32)
    heads, B = ((6, 2), 2) if name == "cross" else ((2, 1), 1)
    inputs, mode, mask = draw(name, torch.float16, heads, B=B)
    check(inputs, mask, mode)


@pytest.mark.parametrize("name", ["window_even", "window_text_end", "causal_window_sink", "cache_without_causal"])
def test_tiles_larger_than_the_clip(name, tiles):
    tiles(128, 64)
    inputs, mode, mask = draw(name)
    check(inputs, mask, mode)


@pytest.mark.parametrize("E", [1, 24, 40, 72, 112, 160])
def test_head_widths(E, tiles):
    inputs, mode, mask = draw("frame_causal" if E == 72 else "cross", torch.float16 if E == 40 else torch.float32, E=E)
    check(inputs, mask, mode)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("E", [16, pytest.param(64, marks=pytest.mark.gpu), pytest.param(128, marks=pytest.mark.gpu)])
def test_the_tiles_that_are_shipped(dtype, E):
    inputs, mode, mask = draw("window_text_start", dtype, heads=(2, 1), E=E)
    check(inputs, mask, mode)


WIDTHS = [40, 72, 80, 96, 112, 128, 256]  # each compiles kernels of its own: seconds
IN_BFLOAT16 = [(name, 64) for name in MODES]
IN_BFLOAT16 += [(name, E) for E in WIDTHS for name in ("cross", "window_text_start", "causal_window_sink_cache")]


@pytest.mark.gpu
@pytest.mark.parametrize("name, E", IN_BFLOAT16)
def test_mode_in_bfloat16(name, E):
    inputs, mode, mask = draw(name, torch.bfloat16, heads=(4, 2), E=E, B=2)
    check(inputs, mask, mode)


def test_window_of_one_axis_groups_several_sites(tiles):
    """Temporal and spatial attention in the order of the tokens: no rearranging."""
    grid = (3, 2, 4)
    for window in ((3, 1, 1), (1, 2, 4)):
        inputs = {n: torch.randn(1, 24, 1, 8, device=DEVICE) for n in "qkv"}
        mask = brute_mask(24, 24, grid=grid, window=window)[None, None].to(DEVICE)
        check(inputs, mask, dict(grid=grid, window=window))


def test_tiles_that_are_halved(tiles):
    """Along time 128 queries of 32 sites see 4 keys each: the plan takes tiles of 64."""
    tiles(128, 32)
    grid, window = (4, 2, 16), (4, 1, 1)
    inputs = {n: torch.randn(1, 128, 1, 8, device=DEVICE) for n in "qkv"}
    check(inputs, brute_mask(128, 128, grid=grid, window=window)[None, None].to(DEVICE), dict(grid=grid, window=window))


@pytest.fixture
def boxes(monkeypatch):
    """Visited tiles loaded as boxes; the list of what was described."""
    from sora_kernels.attention import kernels_forward

    described, original = [], kernels_forward.describe
    monkeypatch.setattr(kernels_forward, "describe", lambda *a: described.append(original(*a)) or described[-1])

    def use(queries: int, keys: int, descriptors: bool = True) -> None:
        for name in ("forward", "backward_queries", "backward_keys"):
            monkeypatch.setattr(config, name, lambda *_: config.Tile(queries, keys, 4, 2, descriptors))

    use(16, 16)
    return use, described


BOXED = ["cross", "window", "window_larger_than_grid", "window_stride", "chunk_causal", "causal_cache"]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("name", BOXED)
def test_visited_tiles_loaded_as_boxes(name, dtype, boxes):
    """A box may cross an edge of the frame or the clip: addresses give other tokens there, a descriptor zeros."""
    use, described = boxes
    E, tile = (16, (32, 16)) if dtype == torch.float32 else (64, (64, 64))
    inputs, mode, mask = draw(name, dtype, heads=(4, 2), E=E)
    use(*tile)
    check(inputs, mask, mode)
    assert len(described) == 6 and None not in described, "k and v twice, then q and dO"
    grads = [torch.randn_like(inputs["q"]), torch.randn(1, 4, inputs["q"].shape[1], device=DEVICE)]
    run = functools.partial(outputs_and_grads, lambda **kw: attend(**kw, **mode, return_lse=True), inputs, grads)
    ours = run()
    use(*tile, descriptors=False)
    expected = run()
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


def test_what_no_descriptor_fits_is_loaded_by_address(boxes):
    _, described = boxes
    for E, change in (
        (24, lambda t: t),  # no power of two
        (16, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),  # heads do not lie side by side
        (16, lambda t: t[:, :1].expand_as(t)),
        (16, lambda t: torch.nn.functional.pad(t.flatten(2), (0, 1))[..., :-1].unflatten(2, (2, 16))),  # 33 a token
    ):
        described.clear()
        inputs, mode, mask = draw("chunk_causal", heads=(2, 2), E=E)
        inputs = {n: change(t) for n, t in inputs.items()}
        out = attend(**inputs, **mode)
        assert described == [None, None]
        torch.testing.assert_close(out.double(), explicit(**{n: t.double() for n, t in inputs.items()}, mask=mask)[0],
                                   rtol=1e-3, atol=1e-3)  # fmt: skip
    described.clear()
    lens = torch.tensor([4], device=DEVICE)
    for name, padding in (("window_text_end", None), ("packed", None), ("window_sink", None), ("cross", lens)):
        inputs, mode, _ = draw(name, E=16)
        inputs["k"].requires_grad_()
        attend(**inputs, **mode, kv_lens=padding).sum().backward()
    assert not described, "runs, several clips, and padding that may be NaN"


@pytest.mark.parametrize("name", ["cross", "window_text_end", "window_text_start"])
def test_kv_lens_hide_padding_that_holds_nan(name, tiles):
    tiles(32, 16)
    inputs, mode, mask = draw(name, B=2)
    inputs = {n: torch.cat((t, t[:1].clone())) for n, t in inputs.items()}
    k_len = mask.shape[-1]
    lens = torch.tensor([k_len - 2, 0, 5], dtype=torch.int32, device=DEVICE)
    real = torch.arange(k_len, device=DEVICE) < lens[:, None]
    for n in "kv":
        inputs[n] = inputs[n].masked_fill(~real[:, :, None, None], float("nan"))
    check(inputs, mask & real[:, None, None], mode, kv_lens=lens)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(scale, tiles):
    inputs, mode, mask = draw("frame_causal")
    check(inputs, mask, mode, scale=scale)


def test_large_scores_do_not_overflow(tiles):
    inputs, mode, mask = draw("chunk_causal")
    inputs = {n: 100 * t for n, t in inputs.items()}
    out, lse = attend(**inputs, **mode, return_lse=True)
    expected = explicit(**{n: t.double() for n, t in inputs.items()}, mask=mask)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_gradients(layout, tiles):
    tiles(16, 32)
    inputs, mode, _ = draw("causal_cache_text", heads=(2, 1))
    arranged = {n: arrange(t, layout) for n, t in inputs.items()}
    grads = [torch.randn_like(inputs["q"]), torch.randn(1, 2, 16, device=DEVICE)]
    awkward = [arrange(g, layout) for g in grads]
    run = functools.partial(outputs_and_grads, lambda **kw: attend(**kw, **mode, return_lse=True))
    ours = run(arranged, awkward)
    expected = run({n: t.contiguous() for n, t in arranged.items()}, [g.contiguous() for g in awkward])
    for n in expected:
        assert torch.equal(ours[n], expected[n]), n


def test_heads_before_tokens_by_stride(tiles):
    inputs, mode, mask = draw("packed", heads=(2, 2))
    check({n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in inputs.items()}, mask, mode)


@pytest.mark.parametrize("name", ["cross", "causal_window_sink_cache"])
def test_backward_repeats_bitwise(name, tiles):
    tiles(16, 32)
    inputs, mode, _ = draw(name, heads=(2, 1))
    grads = [torch.randn_like(inputs["q"])]
    first, second = (outputs_and_grads(lambda **kw: attend(**kw, **mode), inputs, grads) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_only_the_gradients_asked_for(tiles):
    inputs, mode, _ = draw("causal_cache")
    grads = [torch.randn_like(inputs["q"])]
    whole = outputs_and_grads(lambda **kw: attend(**kw, **mode), inputs, grads)
    for name in inputs:
        some = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        (grad,) = torch.autograd.grad(attend(**some, **mode), some[name], grads)
        assert torch.equal(grad, whole[f"grad {name}"])


@pytest.mark.parametrize(
    "B, Sq, Sk, H, E", [(0, 3, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 3, 0, 4), (2, 3, 3, 2, 0)]
)
def test_empty(B, Sq, Sk, H, E, tiles):
    q, k, v = (torch.ones(B, n, H, E, requires_grad=True, device=DEVICE) for n in (Sq, Sk, Sk))
    with poison_empty():
        out, lse = attend(q, k, v, return_lse=True)
        (out.sum() + (0 if Sk == 0 else lse.sum())).backward()
    assert out.shape == q.shape and (Sk > 0 or not out.any())
    expected = torch.full_like(lse, float("-inf") if Sk == 0 else math.log(3) + (E**0.5 if E else 0))
    torch.testing.assert_close(lse, expected)
    for t in (q, k, v):
        assert t.grad.shape == t.shape and t.grad.isfinite().all()


def test_a_clip_without_its_queries(tiles):
    """A cache of frames and no new frame: keys get no gradient."""
    q, k = torch.zeros(1, 0, 1, 8, device=DEVICE), torch.randn(1, 12, 1, 8, device=DEVICE, requires_grad=True)
    attend(q, k, k, grid=(2, 2, 3), causal="frame").sum().backward()
    assert not k.grad.any()


def test_heads_that_are_too_wide():
    q = torch.zeros(1, 2, 1, 257, device=DEVICE)
    with pytest.raises(Unavailable, match="heads of up to 256; got 257"):
        attend(q, q, q)


@pytest.mark.parametrize("impl", ["triton", "reference", "cpu"])
def test_halves_of_the_keys_merge_to_the_whole(impl, tiles):
    """What ring attention does: forward in parts merged by their LSE, backward in parts with the LSE of the whole."""
    if impl == "cpu" and DEVICE != "cpu":
        pytest.skip("tensors are on a GPU")
    inputs, _, _ = draw("cross", heads=(2, 1))
    q, k, v = inputs.values()
    dout = torch.randn_like(q)
    exact = {n: t.double() for n, t in inputs.items()}
    whole = outputs_and_grads(lambda **kw: explicit(**kw)[0], exact, [dout.double()])
    halves = [(k[:, s], v[:, s]) for s in (slice(4), slice(4, None))]
    out, lse = merge_attention(*(attention_forward(q, *half, impl=impl) for half in halves))
    grads = [attention_backward(dout, q, *half, out, lse, impl=impl) for half in halves]
    dk, dv = (torch.cat(parts, 1) for parts in ([g[1] for g in grads], [g[2] for g in grads]))
    ours = dict(zip(whole, (out, grads[0][0] + grads[1][0], dk, dv), strict=True))
    for name, expected in whole.items():
        torch.testing.assert_close(ours[name].double(), expected, rtol=2e-5, atol=2e-6)


def test_merging_is_differentiable_and_knows_queries_that_see_nothing():
    a, b = (torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(2))
    la, lb = (torch.randn(1, 2, 3, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda a, la, b, lb: merge_attention((a, la), (b, lb)), [t.requires_grad_() for t in (a, la, b, lb)]
    )
    la, lb = la.detach().clone(), lb.detach().clone()
    la[:, :, 0] = lb[:, :, 0] = lb[:, :, 1] = float("-inf")
    zero = torch.zeros(1, dtype=torch.float64)
    out, lse = merge_attention((a.detach().index_fill(1, torch.tensor([0]), 0), la), (b.detach() * zero, lb))
    assert not out[:, 0].any() and torch.isneginf(lse[:, :, 0]).all()
    assert torch.equal(out[:, 1], a.detach()[:, 1]) and torch.equal(lse[:, :, 1], la[:, :, 1])
    with pytest.raises(ValueError, match="the out of b must have shape"):
        merge_attention((a, la), (b[:, :2], lb))
