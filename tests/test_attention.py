"""spacetime_attention and attention_plan: every mode against its definition, gradients, contract."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels import Unavailable, spacetime_attention
from sora_kernels.attention import reference
from sora_kernels.attention.mode import resolve
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 4, 8), torch.randn(2, 14, 2, 8), torch.randn(2, 14, 2, 8)
    lens = torch.tensor([14, 3])
    one, none = [1, 1, 1], [0, 0, 0]
    dense = (None, None, one, one, none, 0, 0, False, 0.3)
    windowed = ([2, 2, 3], [1, 2, 2], [1, 2, 1], one, [1, 0, 0], 1, 2, True, 0.3)
    dilated = ([2, 2, 3], [1, 2, 2], one, [1, 1, 2], [0, 1, 0], 0, 2, False, 0.3)
    samples = []
    by_head = ([2, 2, 3], [1, 2, 2, 2, 2, 3] * 2, [1, 2, 1, 1, 1, 1] * 2, one, none, 0, 2, True, 0.3)
    for mode in ((None, *dense), (lens, *dense), (lens, *windowed), (None, *dilated), (None, *by_head)):
        out, lse = torch.empty_like(q), torch.empty(2, 4, 8)
        samples.append(("spacetime_attention_fwd", (q, k, v, *mode, out, lse)))
        dlse = torch.randn_like(lse) if mode[0] is not None else None
        out, lse = reference.spacetime_attention(q, k, v, *mode)
        grads = (torch.empty_like(q), None, torch.empty_like(v)) if dlse is None else map(torch.empty_like, (q, k, v))
        samples.append(("spacetime_attention_bwd", (torch.randn_like(q), dlse, q, k, v, out, lse, *mode, True, *grads)))
    return samples


# The definition, by loops over tokens


def sees(query, key, grid, window, stride, dilation, causal, sink):
    """Whether the video token at `query` (t, h, w) sees the one at `key` of the same clip."""
    axes = []
    for i, j, L, d, chunk in zip(query, key, grid, dilation, causal, strict=True):
        if i % d != j % d or (chunk and j // d // chunk > i // d // chunk):
            return False
        axes.append((i // d, j // d, len(range(i % d, L, d))))
    if window is None or key[0] < sink:
        return True
    for (i, j, L), w, s, chunk in zip(axes, window, stride, causal, strict=True):
        w = min(w, L)
        if chunk:
            leader = max(min(i // s * s + s, L), min((i // chunk + 1) * chunk, L)) - 1
            neighbours = range(leader - w + 1, L)
        else:
            leader = min((i // s) * s + s // 2, L - 1)
            start = min(max(leader - w // 2, 0), L - w)
            neighbours = range(start, start + w)
        if j not in neighbours:
            return False
    return True


def brute_mask(q_len, k_len, *, grid=None, grids=None, window=None, stride=1, dilation=1, causal=None, sink=0,
               text_len=0, text_at="end"):  # fmt: skip
    stride, dilation = ((n,) * 3 if isinstance(n, int) else n for n in (stride, dilation))
    causal = causal if isinstance(causal, tuple) else ({None: 0, "frame": 1}.get(causal, causal), 0, 0)
    clips = [grid] if grid else grids or []

    def tokens(length):
        if not clips:
            return [None] * length
        video = [(c, p) for c, g in enumerate(clips) for p in itertools.product(*map(range, g))]
        video = video[len(video) - (length - text_len) :]
        return [None] * text_len + video if text_at == "start" else video + [None] * text_len

    mask = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i, query in enumerate(tokens(q_len)):
        for j, key in enumerate(tokens(k_len)):
            if query is None or key is None:
                mask[i, j] = True
            elif query[0] == key[0]:
                mask[i, j] = sees(query[1], key[1], clips[key[0]], window, stride, dilation, causal, sink)
    return mask


def explicit(q, k, v, mask=None, scale=None):
    """Softmax in the dtype of q, with a mask `[B or 1, 1, Sq, Sk]`; returns the output and the LSE."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    if mask is None:
        return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v), scores.logsumexp(-1)
    empty = ~mask.any(-1)
    scores = scores.masked_fill(~(mask | empty[..., None]), float("-inf"))
    p = scores.softmax(-1) * mask
    return torch.einsum("bhqk,bkhe->bqhe", p, v), scores.logsumexp(-1).masked_fill(empty, float("-inf"))


MODES = {
    "dense": (7, 7, {}),
    "cross": (5, 9, {}),
    "one_key": (3, 1, {}),
    "grid_alone": (12, 12, dict(grid=(2, 2, 3))),
    "window": (60, 60, dict(grid=(3, 4, 5), window=(2, 3, 3))),
    "window_even": (48, 48, dict(grid=(4, 3, 4), window=(4, 2, 2))),
    "window_larger_than_grid": (24, 24, dict(grid=(2, 3, 4), window=(5, 2, 9))),
    "window_one": (12, 12, dict(grid=(2, 2, 3), window=(1, 1, 1))),
    "window_stride": (105, 105, dict(grid=(3, 5, 7), window=(3, 3, 4), stride=2)),
    "sliding_tile": (96, 96, dict(grid=(4, 4, 6), window=(2, 4, 6), stride=(2, 2, 3))),
    "stride_larger_than_grid": (30, 30, dict(grid=(2, 3, 5), window=(1, 2, 3), stride=(4, 4, 8))),
    "window_sink": (40, 40, dict(grid=(5, 2, 4), window=(1, 1, 3), sink=2)),
    "window_text_end": (27, 27, dict(grid=(2, 3, 4), window=(1, 3, 2), text_len=3)),
    "window_text_start": (27, 27, dict(grid=(2, 3, 4), window=(1, 3, 2), text_len=3, text_at="start")),
    "frame_causal": (24, 24, dict(grid=(4, 2, 3), causal="frame")),
    "chunk_causal": (30, 30, dict(grid=(5, 2, 3), causal=2)),
    "chunk_longer_than_clip": (12, 12, dict(grid=(2, 2, 3), causal=7)),
    "causal_cache": (12, 30, dict(grid=(5, 2, 3), causal="frame")),
    "causal_cache_chunk": (12, 36, dict(grid=(6, 2, 3), causal=2)),
    "causal_text": (28, 28, dict(grid=(4, 2, 3), causal="frame", text_len=4, text_at="start")),
    "causal_cache_text": (16, 28, dict(grid=(4, 2, 3), causal="frame", text_len=4)),
    "causal_window_sink": (60, 60, dict(grid=(10, 2, 3), causal=2, window=(4, 1, 3), sink=1, stride=(1, 2, 1))),
    "causal_window_partial_chunk": (30, 30, dict(grid=(5, 2, 3), causal=3, window=(2, 2, 3))),
    "causal_window_sink_cache": (12, 42, dict(grid=(7, 2, 3), causal="frame", window=(2, 2, 2), sink=2)),
    "sink_longer_than_past": (24, 24, dict(grid=(4, 2, 3), causal="frame", window=(1, 2, 2), sink=3)),
    "cache_without_causal": (12, 24, dict(grid=(4, 2, 3), window=(3, 1, 3))),
    "packed": (26, 26, dict(grids=[(2, 2, 3), (1, 2, 1), (3, 2, 2)])),
    "packed_window": (45, 45, dict(grids=[(2, 3, 3), (3, 3, 3)], window=(1, 2, 3), stride=(1, 2, 1), sink=1)),
    "packed_causal": (30, 30, dict(grids=[(2, 2, 3), (3, 3, 2)], causal="frame")),
    "dilated": (60, 60, dict(grid=(3, 4, 5), window=(2, 2, 2), dilation=(1, 2, 3))),
    "dilated_stride_text": (
        62, 62, dict(grid=(2, 5, 6), window=(2, 2, 3), stride=(1, 2, 2), dilation=(1, 2, 1), text_len=2,
                     text_at="start")
    ),
    "dilated_causal_cache": (
        20, 44, dict(grid=(7, 2, 3), window=(2, 2, 3), dilation=(3, 1, 1), causal="frame", text_len=2)
    ),
    "dilated_packed": (42, 42, dict(grids=[(2, 3, 3), (2, 3, 4)], window=(1, 2, 2), dilation=2, causal=(0, 0, 1))),
    "dilation_larger_than_grid": (24, 24, dict(grid=(2, 3, 4), window=(2, 3, 4), dilation=(4, 1, 7))),
    "causal_columns": (24, 24, dict(grid=(2, 4, 3), causal=(0, 2, 1))),
    "causal_columns_window": (42, 42, dict(grid=(2, 4, 5), window=(2, 3, 2), causal=(0, 1, 1), text_len=2)),
    "causal_everywhere_cache": (24, 48, dict(grid=(4, 3, 4), window=(2, 2, 3), causal=(1, 2, 1))),
    "causal_stride": (60, 60, dict(grid=(5, 3, 4), window=(3, 2, 3), stride=(2, 2, 2), causal=(1, 0, 1))),
    "causal_stride_chunks": (56, 56, dict(grid=(7, 2, 4), window=(4, 2, 3), stride=(3, 1, 2), causal=2, sink=1)),
    "causal_stride_sees_nothing": (16, 16, dict(grid=(4, 2, 2), window=(1, 2, 2), stride=(3, 1, 1), causal="frame")),
}  # fmt: skip


@functools.cache
def definition(name):
    """The mask of a mode, `[Sq, Sk]`."""
    q_len, k_len, mode = MODES[name]
    return brute_mask(q_len, k_len, **mode)


def make(name, dtype=torch.float64, heads=(4, 2), E=8, seed=0):
    q_len, k_len, mode = MODES[name]
    torch.manual_seed(seed)
    B = 1 if "grids" in mode else 2
    shapes = dict(q=(B, q_len, heads[0], E), k=(B, k_len, heads[1], E), v=(B, k_len, heads[1], E))
    return {name: torch.randn(s).to(dtype) for name, s in shapes.items()}, mode


@pytest.mark.parametrize("name", MODES)
def test_mode_by_its_definition(name):
    inputs, mode = make(name)
    mask = definition(name)[None, None]
    grads = [torch.randn_like(inputs["q"]), torch.randn(explicit(**inputs)[1].shape, dtype=torch.float64)]

    def ours(**kw):
        return spacetime_attention(**kw, **mode, return_lse=True)

    results = outputs_and_grads(ours, inputs, grads)
    expected = outputs_and_grads(lambda **kw: explicit(**kw, mask=mask), inputs, grads)
    for n in expected:
        torch.testing.assert_close(results[n], expected[n], rtol=1e-11, atol=1e-11)


def test_window_is_exact_everywhere():
    """Each query sees exactly min(w, L) keys along each axis, at the borders too."""
    for grid, window, stride in (
        ((4, 5, 6), (2, 3, 4), (1, 1, 1)),
        ((3, 7, 2), (3, 2, 9), (2, 3, 1)),
        ((1, 1, 8), (1, 1, 3), (5, 5, 5)),
    ):
        tokens = reference.token_table(math.prod(grid), [grid], 0, False, "cpu")
        mask = reference.visible(tokens, tokens, window, stride, (1,) * 3, (0,) * 3, 0)
        expected = math.prod(min(w, n) for w, n in zip(window, grid, strict=True))
        assert torch.equal(mask.sum(-1), torch.full((math.prod(grid),), expected))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tile", [3, 4])
def test_a_window_of_tiles_is_that_of_sliding_tile_attention(tiles, tile):
    """Its kernels see `tiles // 2` on each side of a centre kept as far from the edges: of an even number one more."""
    L = 5 * tile
    place = torch.arange(L) // tile
    centre = place.clamp(tiles // 2, 4 - tiles // 2)
    expected = (centre[:, None] - place).abs() <= tiles // 2
    tokens = reference.token_table(L, [(1, 1, L)], 0, False, "cpu")
    side = (tiles // 2 * 2 + 1) * tile
    mask = reference.visible(tokens, tokens, (1, 1, side), (1, 1, tile), (1,) * 3, (0,) * 3, 0)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation, stride", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_modes_of_one_axis_are_those_of_natten(dilation, stride, causal):
    """Written as NATTEN does: a leader, keys left and right of it, all among the tokens of a dilation group."""
    L, w = 17, 4
    expected = torch.zeros(L, L, dtype=torch.bool)
    for query, key in itertools.product(range(L), repeat=2):
        if query % dilation != key % dilation:
            continue
        i, j, n = query // dilation, key // dilation, len(range(query % dilation, L, dilation))
        if causal:
            leader = min(i // stride * stride + stride - 1, n - 1)
            expected[query, key] = i - j >= 0 and leader - j < w
        else:
            leader = min(i // stride * stride + stride // 2, n - 1)
            left, right = w // 2, w // 2 + (w % 2 - 1)
            centre = max(left, min(leader, n - 1 - right))
            expected[query, key] = centre - left <= j <= centre + right
    for axis in range(3):
        grid, rules = [1, 1, 1], [[1, 1, 1] for _ in range(3)]
        grid[axis] = L
        for rule, n in zip(rules, (w, stride, dilation), strict=True):
            rule[axis] = n
        tokens = reference.token_table(L, [grid], 0, False, "cpu")
        rules.append([causal * (a == axis) for a in range(3)])
        assert torch.equal(reference.visible(tokens, tokens, *rules, 0), expected)


def test_packed_clips_equal_separate_calls():
    inputs, mode = make("packed_window", torch.float32)
    settings = {n: value for n, value in mode.items() if n != "grids"}
    packed, lse = spacetime_attention(**inputs, **mode, return_lse=True)
    start = 0
    for grid in mode["grids"]:
        part = slice(start, start := start + math.prod(grid))
        clip = {n: t[:, part] for n, t in inputs.items()}
        alone, alone_lse = spacetime_attention(**clip, grid=grid, **settings, return_lse=True)
        torch.testing.assert_close(packed[:, part], alone)
        torch.testing.assert_close(lse[:, :, part], alone_lse)


@pytest.mark.parametrize("rule", [dict(causal="frame"), dict(causal=2, window=(4, 2, 3), sink=1)])
def test_causal_with_a_cache_equals_the_last_frames_of_the_full_run(rule):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 48, 2, 8, dtype=torch.float64) for _ in range(3))
    whole = spacetime_attention(q, k, v, grid=(8, 2, 3), **rule)
    step = 6 * (1 if rule["causal"] == "frame" else 2)
    for end in range(step, 49, step):
        now = slice(end - step, end)
        part = spacetime_attention(q[:, now], k[:, :end], v[:, :end], grid=(end // 6, 2, 3), **rule)
        torch.testing.assert_close(part, whole[:, now], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_kv_lens_hide_padding_that_holds_nan(impl):
    torch.manual_seed(0)
    inputs = dict(q=torch.randn(3, 5, 4, 8), k=torch.randn(3, 7, 2, 8), v=torch.randn(3, 7, 2, 8))
    lens = torch.tensor([7, 0, 3], dtype=torch.int32)
    for b, n in enumerate(lens):
        inputs["k"][b, n:] = inputs["v"][b, n:] = float("nan")
    grads = [torch.randn_like(inputs["q"]), torch.randn(3, 4, 5)]
    attend = functools.partial(spacetime_attention, kv_lens=lens, return_lse=True, impl=impl)
    results = outputs_and_grads(attend, inputs, grads)
    for b, n in enumerate(lens):
        if n == 0:
            assert not results["output0"][b].any() and torch.isneginf(results["output1"][b]).all()
            assert not any(results[f"grad {name}"][b].any() for name in "qkv")
            continue
        alone = {name: t[b : b + 1, : n if name != "q" else 5] for name, t in inputs.items()}
        expected = outputs_and_grads(explicit, alone, [g[b : b + 1] for g in grads])
        for name, t in expected.items():
            length = n if name in ("grad k", "grad v") else None
            torch.testing.assert_close(results[name][b : b + 1, :length], t)
            assert not results[name][b, t.shape[1] :].any()


def test_kv_lens_with_a_grid_and_text():
    inputs, mode = make("window_text_end")
    lens = torch.tensor([25, 27])
    out = spacetime_attention(**inputs, **mode, kv_lens=lens)
    mask = brute_mask(27, 27, **mode) & (torch.arange(27) < lens[:, None, None])
    torch.testing.assert_close(out, explicit(**inputs, mask=mask[:, None])[0], rtol=1e-12, atol=1e-12)


def test_memory_is_worked_off_in_chunks(monkeypatch):
    inputs, mode = make("causal_window_sink")
    grads = [torch.randn_like(inputs["q"])]

    def run():
        return outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode), inputs, grads)

    whole = run()
    monkeypatch.setattr(reference, "SCORES", 2 * 4 * 60 * 7)
    chunked = run()
    for name in whole:
        torch.testing.assert_close(whole[name], chunked[name], rtol=1e-12, atol=1e-12)


def test_scale():
    inputs, _ = make("cross")
    for scale in (0.0, 1.0, -0.5):
        torch.testing.assert_close(spacetime_attention(**inputs, scale=scale), explicit(**inputs, scale=scale)[0])


# Numbers


@pytest.mark.parametrize("name", ["cross", "causal_window_sink_cache", "window_text_start", "packed_window"])
def test_gradcheck(name):
    inputs, mode = make(name, heads=(2, 1), E=3)
    leaves = tuple(t[:1].requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(
        lambda q, k, v: spacetime_attention(q, k, v, **mode, return_lse=True), leaves, fast_mode=True
    )


def test_reference_is_differentiable_by_autograd():
    inputs, _ = make("causal_window_sink_cache")
    mode = (None, [7, 2, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1], [1, 0, 0], 2, 0, False, 0.4)
    grads = [torch.randn(2, 12, 4, 8, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)]
    by_autograd = outputs_and_grads(lambda q, k, v: reference.spacetime_attention(q, k, v, *mode), inputs, grads)
    by_formula = reference.spacetime_attention_backward(*grads, *inputs.values(), *mode)
    for name, grad in zip("qkv", by_formula, strict=True):
        torch.testing.assert_close(by_autograd[f"grad {name}"], grad, rtol=1e-12, atol=1e-12)


RULED = [("cpu", name) for name in MODES]
RULED += [("reference", name) for name in ("dense", "cross", "window_stride", "causal_window_sink", "packed_causal")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl, name", RULED)
def test_error_rule(impl, name, dtype, device):
    impl = "reference" if device == "cuda" else impl
    inputs, mode = make(name, dtype, heads=(6, 2), E=20)
    inputs = {n: t.to(device) for n, t in inputs.items()}
    mask = definition(name)[None, None].to(device)
    grads = [torch.randn_like(inputs["q"])]
    with poison_empty():
        ours = outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode, impl=impl), inputs, grads)

    def formula(**kw):
        return explicit(**kw, mask=mask)[0]

    oracle = outputs_and_grads(formula, {n: t.double() for n, t in inputs.items()}, [grads[0].double()])
    baseline = outputs_and_grads(formula, inputs, grads)
    for n, result in ours.items():  # the output and the gradient of q are sums over keys, the others over queries
        terms = inputs["q" if n in ("grad k", "grad v") else "k"].shape[1]
        assert_matches_oracle(result, oracle[n], baseline[n], n, terms)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (4, 1)])
@pytest.mark.parametrize("E", [1, 5, 64])
def test_cpu_is_the_reference(heads, E):
    for q_len, k_len in ((1, 1), (33, 70), (130, 3)):
        torch.manual_seed(0)
        shapes = dict(q=(2, q_len, heads[0], E), k=(2, k_len, heads[1], E), v=(2, k_len, heads[1], E))
        inputs = {n: torch.randn(s) for n, s in shapes.items()}
        grads = [torch.randn_like(inputs["q"])]
        cpu, expected = (
            outputs_and_grads(lambda impl=impl, **kw: spacetime_attention(**kw, impl=impl), inputs, grads)
            for impl in ("cpu", "reference")
        )
        for n in cpu:
            torch.testing.assert_close(cpu[n], expected[n], rtol=2e-5, atol=2e-5)


def test_lse_merges_two_halves_with_gradients():
    """Attention over two halves of the keys, merged by their LSE (as ring attention does), is attention over all."""
    inputs, _ = make("cross")
    grads = [torch.randn_like(inputs["q"])]

    def merged(q, k, v):
        parts = [spacetime_attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(4), slice(4, None))]
        weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
        return weights[0] * parts[0][0] + weights[1] * parts[1][0]

    whole = outputs_and_grads(lambda **kw: explicit(**kw)[0], inputs, grads)
    halves = outputs_and_grads(merged, inputs, grads)
    for n in whole:
        torch.testing.assert_close(halves[n], whole[n], rtol=1e-11, atol=1e-11)


def test_gradient_of_the_lse_alone():
    inputs, _ = make("cross")
    leaves = [t.requires_grad_() for t in inputs.values()]
    ours = torch.autograd.grad(spacetime_attention(*leaves, return_lse=True)[1].sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(explicit(*leaves)[1].sum(), leaves[:2])
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a, b)
    assert not ours[2].any()


def test_large_scores_do_not_overflow():
    inputs = {n: 200 * t for n, t in make("dense", torch.float32)[0].items()}
    for impl in ("reference", "cpu"):
        torch.testing.assert_close(
            spacetime_attention(**inputs, impl=impl).double(), explicit(**{n: t.double() for n, t in inputs.items()})[0]
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "impl, name, heads", [("reference", "window_sink", 2), ("cpu", "window_sink", 2), ("cpu", "cross", 4)]
)
def test_layouts_of_inputs_and_gradients(layout, impl, name, heads):
    inputs, mode = make(name, torch.float32 if impl == "cpu" else torch.float64, heads=(4, heads))
    arranged = {n: arrange(t, layout) for n, t in inputs.items()}
    grad = arrange(torch.randn_like(inputs["q"]), layout)

    def run(inputs, grad):
        return outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode, impl=impl), inputs, [grad])

    ours, expected = run(arranged, grad), run({n: t.contiguous() for n, t in arranged.items()}, grad.contiguous())
    tolerance = 1e-5 if impl == "cpu" else 1e-12
    for n in ours:
        torch.testing.assert_close(ours[n], expected[n], rtol=tolerance, atol=tolerance)


def test_heads_before_tokens_by_stride():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 24, 8).transpose(1, 2) for _ in range(3))
    for mode in ({}, dict(grid=(2, 3, 4), window=(1, 2, 2))):
        out = spacetime_attention(q, k, v, **mode)
        torch.testing.assert_close(out, spacetime_attention(*(t.contiguous() for t in (q, k, v)), **mode))


@pytest.mark.parametrize("impl, name", [("reference", "causal_window_sink"), ("cpu", "causal_window_sink")])
def test_backward_repeats_bitwise(impl, name):
    inputs, mode = make(name, torch.float32)
    grads = [torch.randn_like(inputs["q"])]
    first, second = (
        outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode, impl=impl), inputs, grads) for _ in range(2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    "B, Sq, Sk, H, E", [(0, 3, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 3, 0, 4), (2, 3, 3, 2, 0)]
)
def test_empty(B, Sq, Sk, H, E, impl):
    q, k, v = (torch.ones(B, n, H, E, requires_grad=True) for n in (Sq, Sk, Sk))
    with poison_empty():
        out = spacetime_attention(q, k, v, impl=impl)
        out.sum().backward()
    assert out.shape == q.shape and (Sk > 0 or not out.any())
    for t in (q, k, v):
        assert t.grad.shape == t.shape and t.grad.isfinite().all()
    if Sk == 0:
        _, lse = spacetime_attention(q, k, v, return_lse=True)
        assert torch.isneginf(lse).all()


def test_auto_takes_the_kernels_but_for_fp64(monkeypatch):
    from sora_kernels import _library

    called = []
    original = _library.call
    monkeypatch.setattr(_library, "call", lambda op, impl: called.append(impl) or original(op, impl))
    q = torch.randn(1, 12, 2, 8)
    spacetime_attention(q, q, q)
    spacetime_attention(q, q, q, grid=(2, 2, 3), window=(1, 2, 3))
    spacetime_attention(q, q, q, return_lse=True)
    spacetime_attention(q.double(), q.double(), q.double())
    assert called == ["cpu", "cpu", "cpu", "reference"]


# The C++ kernels: blocks of keys, tiles of queries, threads


BLOCKS = {  # several tiles and blocks, and runs of keys that end inside of both
    "dense": (150, 300, {}),
    "window": (3 * 12 * 14, 3 * 12 * 14, dict(grid=(3, 12, 14), window=(3, 9, 11))),
    "tiles": (4 * 12 * 8 + 9, 4 * 12 * 8 + 9, dict(grid=(4, 12, 8), window=(2, 8, 8), stride=(2, 4, 4), text_len=9)),
    "causal": (2 * 99, 5 * 99, dict(grid=(5, 9, 11), causal="frame", window=(2, 9, 5), sink=1)),
}


@pytest.mark.parametrize("E", [32, 72])
@pytest.mark.parametrize("name", BLOCKS)
def test_cpu_of_several_tiles_and_blocks_matches_the_fp64_oracle_for_any_number_of_threads(name, E, for_any_threads):
    q_len, k_len, mode = BLOCKS[name]
    shapes = dict(q=(2, q_len, 4, E), k=(2, k_len, 2, E), v=(2, k_len, 2, E))
    inputs = {n: torch.randn(s) for n, s in shapes.items()}
    lens = torch.tensor([k_len, k_len - 40])
    for n in "kv":
        inputs[n][1, k_len - 40 :] = float("nan")
    grads = [torch.randn_like(inputs["q"]), torch.randn(2, 4, q_len)]

    def run(impl, inputs, grads):
        function = functools.partial(spacetime_attention, **mode, kv_lens=lens, return_lse=True, impl=impl)
        return outputs_and_grads(function, inputs, grads)

    def poisoned():
        with poison_empty():
            return run("cpu", inputs, grads)

    ours = for_any_threads(poisoned)
    oracle = run("reference", {n: t.double() for n, t in inputs.items()}, [g.double() for g in grads])
    plain = run("reference", inputs, grads)
    for n, value in ours.items():
        assert_matches_oracle(value, oracle[n], plain[n], n)


@pytest.mark.parametrize("scale", [None, -0.2])
def test_cpu_of_a_long_dense_sequence_matches_the_fp64_oracle(scale, for_any_threads):
    """It is left to PyTorch's own kernel, but for a negative scale."""
    qkv, grads = torch.randn(2, 601, 3, 24), [torch.randn(2, 601, 3, 8), torch.randn(2, 3, 601)]

    def run(impl, qkv, grads):
        inputs = dict(zip("qkv", qkv.split(8, -1), strict=True))
        function = functools.partial(spacetime_attention, scale=scale, return_lse=True, impl=impl)
        return outputs_and_grads(function, inputs, grads)

    def poisoned():
        with poison_empty():
            return run("cpu", qkv, grads)

    ours, oracle = for_any_threads(poisoned), run("reference", qkv.double(), [g.double() for g in grads])
    plain = run("reference", qkv, grads)
    for n, value in ours.items():
        assert_matches_oracle(value, oracle[n], plain[n], n)


def test_cpu_of_one_key_has_no_gradient_of_the_query():
    """Its weight is 1 whatever the query is. Two sums that ought to cancel are added up in the same order."""
    q, k, v = (torch.randn(1, n, 2, 200, requires_grad=True) for n in (3, 1, 1))
    spacetime_attention(q, k, v, impl="cpu").backward(torch.randn(1, 3, 2, 200))
    assert not q.grad.any() and not k.grad.any() and v.grad.any()


@pytest.mark.parametrize("mode", [dict(window=(1, 2, 3), causal="frame", sink=1), dict(kv_lens=True)])
def test_compiles_whole_with_dynamic_shapes(mode):
    def attend(q, k, v, lens):
        settings = dict(kv_lens=lens) if "kv_lens" in mode else dict(mode, grid=(q.shape[1] // 6, 2, 3))
        return spacetime_attention(q, k, v, **settings)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (2, 3):
        torch.manual_seed(0)
        tensors = [torch.randn(1, 6 * T, h, 8, requires_grad=True) for h in (2, 1, 1)]
        lens = torch.tensor([5 * T])
        ours, expected = compiled(*tensors, lens), attend(*tensors, lens)
        assert torch.equal(ours, expected)
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), tensors) for o in (ours, expected)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["dense", "window"])
def test_autocast_changes_nothing(name):
    inputs, mode = make(name, torch.float32)
    grads = [torch.randn_like(inputs["q"])]

    def run():
        return outputs_and_grads(lambda **kw: spacetime_attention(**kw, **mode), inputs, grads)

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run()
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would make a GPU wait for the host or the host for a GPU: .item(), bool(), data-dependent shapes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in function.tags, function
        assert torch.Tag.dynamic_output_shape not in function.tags, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["cross", "causal_window_sink_cache", "packed_window", "window_text_start", "dilated"])
def test_no_host_synchronisation(name):
    inputs, mode = make(name)
    q_len, k_len, _ = MODES[name]
    given = dict(grid=None, grids=None, window=None, stride=1, dilation=1, causal=None)
    flat = resolve("test", q_len, k_len, *(given | dict(sink=0, text_len=0, text_at="end") | mode).values())
    lens = torch.full((inputs["q"].shape[0],), k_len)
    with NoSynchronisation():
        reference.spacetime_attention(*inputs.values(), lens, *flat, 1.0)
        reference.spacetime_attention_backward(inputs["q"], None, *inputs.values(), lens, *flat, 1.0)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            lens.sum().item()


# Bad input


x = torch.zeros(2, 12, 4, 8)
ERRORS = [
    (dict(q=None), TypeError, "q must be a tensor"),
    (dict(q=x[0]), ValueError, "q must be .B, Sq, H, E."),
    (dict(q=x.int()), TypeError, "q must be float32"),
    (dict(k=x[:1]), ValueError, "k must be .* with B=2 and E=8"),
    (dict(k=x[..., :4]), ValueError, "k must be .* with B=2 and E=8 from q; got .2, 12, 4, 4."),
    (dict(k=x[:, :, :3], v=x[:, :, :3]), ValueError, "must divide the 4 heads of q; got 3"),
    (dict(k=x[:, :, :0], v=x[:, :, :0]), ValueError, "must divide the 4 heads of q; got 0"),
    (dict(k=x.half()), TypeError, "k must have q's dtype torch.float32; got torch.float16"),
    (dict(v=x[:, :6]), ValueError, r"v must have shape \[2, 12, 4, 8\]"),
    (dict(v=x.half()), TypeError, "v must have k's dtype"),
    (dict(k=x.to("meta")), ValueError, "k must be on q's device"),
    (dict(grid=(2, 2, 2)), ValueError, r"grid \(2, 2, 2\) and text_len 0 make 8 key tokens; k has 12"),
    (dict(grid=(2, 6)), ValueError, "grid must be three integers"),
    (dict(q=x[:, :5], grid=(2, 2, 3)), ValueError, "0 to 2 whole frames of 2 x 3 tokens .* got 5 tokens"),
    (dict(grid=(2, 2, 3), grids=[(2, 2, 3)]), ValueError, "not both"),
    (dict(grids=[(2, 2, 2)]), ValueError, "hold 8 tokens; q has 12 and k has 12"),
    (dict(grids=[(1, 2, 3), (1, 2, 3)]), ValueError, "B must be 1; got 2"),
    (dict(grids=[(1, 2, 3), (1, 2)]), ValueError, r"grids\[1\] must be three integers"),
    (dict(grids=[(2, 2, 3)], text_len=2), ValueError, "text_len must be 0 with grids"),
    (dict(window=(1, 2, 3)), ValueError, r"window needs grid=\(T, H, W\)"),
    (dict(causal="frame"), ValueError, "causal needs grid"),
    (dict(sink=1), ValueError, "sink needs grid"),
    (dict(text_len=1), ValueError, "text_len needs grid"),
    (dict(grid=(2, 2, 3), window=(0, 2, 3)), ValueError, "window must be at least 1"),
    (dict(grid=(2, 2, 3), window=5), ValueError, "window must be three integers"),
    (dict(grid=(2, 2, 3), window=(1, 2, 3), stride=0), ValueError, "stride must be at least 1"),
    (dict(grid=(2, 2, 3), stride=2), ValueError, "give window as well"),
    (dict(grid=(2, 2, 3), causal=0), ValueError, "causal must be None, 'frame', a number of frames"),
    (dict(grid=(2, 2, 3), causal=(1, 0)), ValueError, "or the sides .t, h, w. of a chunk .* got .1, 0."),
    (dict(grid=(2, 2, 3), causal=(1, 0, -1)), ValueError, "causal must be .* got .1, 0, -1."),
    (dict(grid=(2, 2, 3), causal=(0, 1, 0), sink=1), ValueError, "sink must be 0 with causal along h or w"),
    (dict(grid=(2, 2, 3), dilation=2), ValueError, "dilation=.2, 2, 2. thins out .* give window as well"),
    (dict(dilation=2), ValueError, "dilation needs grid"),
    (dict(grid=(2, 2, 3), window=(1, 2, 3), dilation=0), ValueError, "dilation must be at least 1"),
    (dict(grid=(2, 2, 3), window=(1, 2, 3), dilation=(1, 2)), ValueError, "dilation must be three integers"),
    (dict(grid=(2, 2, 3), window=(1, 2, 3), dilation=2, sink=1), ValueError, "sink must be 0 with dilation.* got 1"),
    (dict(grid=(2, 2, 3), window=(1, 2, 3), dilation=(1, 2, 1), kv_lens=torch.tensor([3, 4])), ValueError,
     "dilation=.1, 2, 1. takes no kv_lens"),
    (dict(grid=(2, 2, 3), causal=True), ValueError, "causal must be"),
    (dict(grid=(2, 2, 3), causal="chunk"), ValueError, "causal must be .* got 'chunk'"),
    (dict(grid=(2, 2, 3), sink=-1), ValueError, "sink must be an integer of at least 0; got -1"),
    (dict(grid=(2, 2, 3), text_at="middle"), ValueError, "text_at must be one of 'end', 'start'"),
    (dict(kv_lens=[3, 4]), TypeError, "kv_lens must be an int32 or int64 tensor .B.; got list"),
    (dict(kv_lens=torch.ones(2)), TypeError, "kv_lens must be an int32 or int64 tensor .B.; got torch.float32"),
    (dict(kv_lens=torch.tensor([3])), ValueError, r"one length per batch, \[2\]; got \[1\]"),
    (dict(kv_lens=torch.tensor([3, 13])), ValueError, "kv_lens must lie between 0 and Sk=12; got 3 to 13"),
    (dict(kv_lens=torch.tensor([-1, 3])), ValueError, "got -1 to 3"),
    (dict(scale=float("nan")), ValueError, "scale must be a finite number; got nan"),
    (dict(deterministic="yes"), ValueError, "deterministic must be one of None, True, False"),
    (dict(impl="cuda"), Unavailable, "reference: usable"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message) as caught:
        spacetime_attention(**dict(q=x, k=x, v=x) | change)
    assert "spacetime_attention" in str(caught.value)
