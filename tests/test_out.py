"""`out=`: what may be written where, and who learns of it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sora_kernels import _check, gate_residual, gate_residual_norm_modulate, norm_modulate, qk_norm_rope

IMPLS = ("reference", "cpu", "triton")
B, S, D = 2, 6, 8


def norm(x, y, out, **kwargs):
    return norm_modulate(x, y[:, 0], None, out=out, **kwargs)


def gate(x, y, out, **kwargs):
    return gate_residual(x, y, torch.ones(x.shape[-1]), out=out, **kwargs)


def both(x, y, out, **kwargs):
    return gate_residual_norm_modulate(
        x, y, torch.ones(x.shape[-1]), y[:, 0], None, out=(torch.empty_like(x), out), **kwargs
    )[1]


def first(x, y, out, **kwargs):
    return gate_residual_norm_modulate(
        x, y, torch.ones(x.shape[-1]), None, None, out=(out, torch.empty_like(x)), **kwargs
    )[0]


def turned(x, y, out, k_out, **kwargs):
    q, k, q_out, k_out = (t[:, :, None] for t in (x, y, out, k_out))
    return qk_norm_rope(q, k, grid=(1, x.shape[1] // 2, 2), out=(q_out, k_out), **kwargs)


def queries(x, y, out, **kwargs):
    return turned(x, y, out, torch.empty_like(y), **kwargs)[0][:, :, 0]


def keys(x, y, out, **kwargs):
    return turned(y, x, torch.empty_like(y), out, **kwargs)[1][:, :, 0]


CALLS = [norm, gate, both, first, queries, keys]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved, across", [(True, "width"), (False, "head")])
def test_video_and_text_are_written_into_one_buffer(interleaved, across, dtype, impl, require):
    """Each with its own weights, at its place in `[B, text + video, H, E]`: as if made apart and joined."""
    require("qk_norm_rope", impl, dtype=dtype)
    H, E = 3, 10
    grid, text = (1, 2, 3), 5
    rule = dict(across=across, interleaved=interleaved, impl=impl)
    weights = torch.randn(4, H * E if across == "width" else E)
    video, words = torch.randn(2, B, 6, H, E, dtype=dtype), torch.randn(2, B, text, H, E, dtype=dtype)
    calls = [
        (video, slice(text, None), dict(q_weight=weights[0], k_weight=weights[1], grid=grid)),
        (words, slice(text), dict(q_weight=weights[2], k_weight=weights[3])),
    ]
    apart = [qk_norm_rope(*x, **own, **rule) for x, _, own in calls]
    joint = torch.full((2, B, text + 6, H, E), float("nan"), dtype=dtype)
    if across == "head":  # as F.scaled_dot_product_attention takes them
        joint = joint.transpose(2, 3).contiguous().transpose(2, 3)
    for x, place, own in calls:
        out = joint[0, :, place], joint[1, :, place]
        assert qk_norm_rope(*x, **own, **rule, out=out) == out
    for i in range(2):
        assert torch.equal(joint[i], torch.cat((apart[1][i], apart[0][i]), 1))


def test_queries_and_keys_have_a_buffer_each():
    x = torch.randn(B, S, 2, D)
    for out in (x, (x,), [torch.empty_like(x)] * 2, (torch.empty_like(x),) * 3):
        with pytest.raises(ValueError, match="out must be a pair of two tensors .q_out, k_out.; got"):
            qk_norm_rope(x, x, out=out)
    pair = torch.empty(2, B, S, 2, D).unbind()
    with pytest.raises(ValueError, match="out must have shape .2, 5, 2, 8. .the shape of k.; got .2, 6, 2, 8."):
        qk_norm_rope(x, x[:, 1:], out=pair)
    with pytest.raises(ValueError, match="out must not share memory with an input or another result"):
        qk_norm_rope(x, x, out=(pair[0], pair[0].view_as(x)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", CALLS)
def test_a_buffer_that_a_backward_needs_is_not_written_unseen(call, impl, require):
    require("norm_modulate", impl)
    x, y = torch.randn(2, B, S, D)
    buffer, weight = torch.randn(B, S, D), torch.randn(B, S, D, requires_grad=True)
    loss = (weight * buffer).sum()
    with torch.no_grad():
        call(x, y, buffer, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("call", CALLS)
def test_compiled_code_counts_the_change_too(call):
    torch._dynamo.reset()
    x, y = torch.randn(2, B, S, D)
    buffer = torch.randn(B, S, D)
    before, version = buffer.clone(), buffer._version
    with torch.no_grad():
        torch.compile(call, backend="aot_eager")(x, y, buffer)
        assert buffer._version > version and not torch.equal(buffer, before)


@pytest.mark.parametrize("call", CALLS)
def test_a_buffer_of_an_inference_is_written_in_it_and_after_it(call):
    x, y = torch.randn(2, B, S, D)
    expected = call(x, y, torch.empty(B, S, D))
    with torch.inference_mode():
        buffer, own = torch.empty(B, S, D), torch.empty_like(x)
        assert torch.equal(call(x, y, buffer), expected) and torch.equal(call(x, y, own), expected)
    with torch.no_grad():
        assert torch.equal(call(x, y, buffer), expected)


@pytest.mark.parametrize("call", CALLS)
def test_a_buffer_that_is_recorded_is_refused(call):
    x, y = torch.randn(2, B, S, D)
    leaf = torch.zeros(B, S, D, requires_grad=True)
    for buffer in (leaf, leaf * 1):
        with pytest.raises(ValueError, match="out= is for inference"):
            call(x, y, buffer)
        with torch.no_grad():
            call(x, y, buffer.detach())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strides", [(0, D, 1), (S * D, 0, 1), (D, D, 1), (S * D, D - 1, 1)])
def test_elements_that_share_memory_are_refused(call, strides):
    x, y = torch.randn(2, B, S, D)
    out = torch.empty(B * S * D).as_strided((B, S, D), strides)
    with pytest.raises(ValueError, match="out must hold each element in memory of its own"):
        call(x, y, out)


@pytest.mark.parametrize("call", CALLS)
def test_a_buffer_that_negates_is_refused(call):
    x, y, buffer = torch.randn(3, B, S, D)
    before = buffer.clone()
    with pytest.raises(ValueError, match="out must hold what is written; got a view that negates"):
        call(x, y, torch._neg_view(buffer))
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shift", [1, D, -D, S * D, -3])
def test_memory_of_an_input_is_refused_in_part(call, which, shift):
    memory = torch.randn(3, B * S * D).flatten()
    given, own = (
        memory[start:].as_strided((B, S, D), (S * D, D, 1), start) for start in (B * S * D, B * S * D + shift)
    )
    x, y = (given, torch.randn(B, S, D))[:: 1 - 2 * which]
    before = memory.clone()
    with pytest.raises(ValueError, match="out must not share memory with an input"):
        call(x, y, own)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shift", [1, D, -D])
def test_storages_that_overlap_are_memory_that_is_shared(call, shift):
    """Windows on one NumPy array have a storage each, and either may begin first."""
    memory = torch.randn(3 * B * S * D).numpy()
    given, own = (
        torch.from_numpy(memory[start : start + B * S * D]).view(B, S, D) for start in (B * S * D, B * S * D + shift)
    )
    with pytest.raises(ValueError, match="out must not share memory with an input"):
        call(given, torch.randn(B, S, D), own)
    call(given, torch.randn(B, S, D), torch.from_numpy(memory[2 * B * S * D :]).view(B, S, D))


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("rows", ["shift", "scale"])
def test_rows_that_are_read_after_the_sum_was_written_are_not_written_over(rows, over):
    x, y = torch.randn(2, B, S, D)
    kwargs = {"shift": None, "scale": None, rows: (x, y)[over]}
    with pytest.raises(ValueError, match="out must not share memory with an input"):
        gate_residual_norm_modulate(x, y, x[0, 0].clone(), **kwargs, out=((x, y)[over], torch.empty_like(x)))


@pytest.mark.parametrize("call", [norm_modulate, gate_residual])
def test_one_result_has_one_buffer(call):
    x, y, row = torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(D)
    args = (x, row, row) if call is norm_modulate else (x, y, row)
    with pytest.raises(TypeError, match="out must be a tensor of the shape of x; got tuple"):
        call(*args, out=(torch.empty_like(x),))


def test_two_results_have_two_buffers():
    x, memory = torch.randn(B, S, D), torch.empty(B * S * D + D)
    one, other = (memory.as_strided((B, S, D), (S * D, D, 1), start) for start in (0, D))
    for pair in ((one, other), (other, one), (one, one.view_as(one))):
        with pytest.raises(ValueError, match="out must not share memory with an input or another result"):
            gate_residual_norm_modulate(x, x, x[0, 0], None, None, out=pair)


@pytest.mark.parametrize("call", [norm, both, queries, keys])
def test_what_is_normalised_is_not_written_over(call):
    x, y = torch.randn(2, B, S, D)
    with pytest.raises(ValueError, match="out must not share memory"):
        call(x, y, x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("call", [gate, first])
def test_a_residual_is_added_in_place(call, dtype, impl, require):
    require("norm_modulate", impl)
    for width in (1, 7, 40):
        memory = torch.randn(2, B, S, width, dtype=dtype)
        expected = call(*memory, torch.empty(B, S, width, dtype=dtype), impl=impl)
        for over in (0, 1):
            x, y = memory.clone()
            assert torch.equal(call(x, y, (x, y)[over], impl=impl), expected)
        x = memory[0].clone()
        twice = call(x, x.clone(), torch.empty_like(x), impl=impl)
        assert torch.equal(call(x, x, x, impl=impl), twice)


@pytest.mark.parametrize("call", CALLS)
def test_windows_on_one_buffer_are_told_apart(call):
    """Between each other's rows, or beside: no element is shared."""
    x, y = torch.randn(2, B, S, D)
    expected = call(x, y, torch.empty(B, S, D))
    for memory, window in ((torch.randn(B, S, 3 * D), lambda m, i: m[:, :, i * D : (i + 1) * D]),
                           (torch.randn(B, 3 * S, D), lambda m, i: m[:, i::3]),
                           (torch.randn(3 * B, S, D), lambda m, i: m[i * B : (i + 1) * B])):  # fmt: skip
        for order in itertools.permutations(range(3)):
            a, b, out = (window(memory, i) for i in order)
            a.copy_(x), b.copy_(y)
            assert torch.equal(call(a, b, out), expected)


def test_overlap_is_decided_exactly():
    """Against the sets of bytes, for windows of two dtypes drawn at random on a small buffer."""
    rng, memory, seen = random.Random(0), torch.empty(512, dtype=torch.uint8), [0, 0]

    def window():
        dtype = rng.choice((torch.float32, torch.float16))
        size, stride = [rng.randint(1, 4) for _ in range(3)], [rng.choice((0, 1, 2, 3, 4, 8, 12)) for _ in range(3)]
        return memory.view(dtype).as_strided(size, stride, rng.randint(0, 40))

    def cells(t):
        starts = [t.storage_offset() + sum(i * s for i, s in zip(at, t.stride(), strict=True))
                  for at in itertools.product(*map(range, t.shape))]  # fmt: skip
        return {start * t.itemsize + byte for start in starts for byte in range(t.itemsize)}

    for _ in range(2000):
        a, b = window(), window()
        shared = bool(cells(a) & cells(b))
        assert _check._share(a, b) == shared, (a.shape, a.stride(), b.shape, b.stride())
        seen[shared] += 1
    assert min(seen) > 200
