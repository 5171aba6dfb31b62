"""Sizes that no test can run: launches recorded on the meta device, and offsets into memory that is hardly touched."""

from __future__ import annotations

import functools
import importlib
import mmap
import pathlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import compile_kernels

import sora_kernels
from sora_kernels import Unavailable, _triton

ROOT = pathlib.Path(sora_kernels.__file__).parent
MODULES = [
    _triton,
    *(
        importlib.import_module(f"sora_kernels.{path.parent.name}.{path.stem}")
        for path in sorted(ROOT.glob("*/kernels*.py"))
        if "@triton.jit" in path.read_text()
    ),
]
KERNELS = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
DENSE = dict(grid=None, grids=None, window=None, stride=1, dilation=1, causal=None, sink=0, text_len=0, text_at="end")


class Grids(compile_kernels.Recorder):
    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel.__name__, grid, args, kwargs))


def empty(*shape, dtype=torch.bfloat16, last=False):
    format = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)


def modulation(B, S, D, frames=1, index=False):
    from sora_kernels.modulation import kernels

    x, y, x_new, out, dx, dy = (empty(B, S, D) for _ in range(6))
    gate, shift, scale, *grads = (empty(B, frames, D) for _ in range(6))
    tables = [empty(D) for _ in range(6)]
    rows = gate, shift, scale, None, None, *tables[:3]
    rule = empty(B, S, dtype=torch.int64) if index else None, False, None, 1e-6
    kernels.gate_residual_norm_modulate_fwd(x, y, *rows, *rule, 0, x_new, out)
    kernels.gate_residual_norm_modulate_bwd(
        x, out, x_new, y, gate, scale, None, None, *tables[1:3], *rule, dx, dy, *grads, None, None, *tables[3:]
    )


def qknorm_rope(B, S, H, E):
    from sora_kernels.qknorm_rope import kernels

    q, out, dout, dq = (empty(B, S, H, E) for _ in range(4))
    none = q[:, :0]
    cos, sin, weight, dweight = empty(S, E // 2), empty(S, E // 2), empty(E), empty(E)
    settings = (None, cos, sin, None, None, 1, False, [], 1e4, 0, True, 1e-6, 0, 0)
    kernels.qk_norm_rope_fwd(q, none, weight, None, None, None, *settings, False, out, none)
    grads = dq, none, dweight, None, None, None, None
    kernels.qk_norm_rope_bwd(dout, none, q, none, weight, None, None, None, *settings, *grads)


def sums(B, S, H, E):
    from sora_kernels.qknorm_rope import kernels_stats

    q, dq, stats = empty(B, S, H, E), empty(B, S, H, E), empty(B, S, dtype=torch.float32)
    kernels_stats.qk_norm_stats_fwd(q, q[:, :0], stats)
    kernels_stats.qk_norm_stats_bwd(stats, q, q[:, :0], dq, None)


def patchify(B, C, grid, patch, D, frames=1):
    from sora_kernels.patchify import kernels, kernels_embed, kernels_final, kernels_uint8

    S, K = grid[0] * grid[1] * grid[2], C * patch[0] * patch[1] * patch[2]
    video, dvideo = (empty(B, C, *(n * p for n, p in zip(grid, patch, strict=True))) for _ in range(2))
    tokens, dtokens, features = empty(B, S, D), empty(B, S, D), empty(B, S, K)
    weight, dweight, bias, dbias, pos, dpos = (
        *(empty(D, C, *patch) for _ in range(2)),
        *(empty(D) for _ in range(2)),
        *(empty(B, S, D) for _ in range(2)),
    )
    kernels_embed.patch_embed3d_fwd(video, weight, bias, pos, tokens)
    kernels_embed.patch_embed3d_bwd(tokens, video, weight, bias, pos, dvideo, dweight, dbias, dpos)
    kernels.unpatchify3d_fwd(features, *grid, video)
    shift, scale, dshift, dscale = (empty(B, frames, D) for _ in range(4))
    weight, dweight, bias, dbias = *(empty(K, D) for _ in range(2)), *(empty(K) for _ in range(2))
    final = tokens, shift, scale, weight, bias, *grid, False, 1e-6
    kernels_final.final_layer_fwd(*final, video)
    kernels_final.final_layer_bwd(video, *final, dtokens, dshift, dscale, dweight, dbias)
    kernels_uint8.video_to_uint8_fwd(video, (1, 1, 1), empty(B, *video.shape[2:], C, dtype=torch.uint8))


def marks(B, T, H, W):
    from sora_kernels.watermark import kernels

    frames, out = (empty(B, T, H, W, 3, dtype=torch.uint8) for _ in range(2))
    kernels.embed_watermark_fwd(frames, empty(64, 64), out)


def norms(B, C, grid, groups, last):
    from sora_kernels.causal_conv import kernels_norm, kernels_passes

    x, out, dout, dx = (empty(B, C, *grid, last=last) for _ in range(4))
    weight, bias, dweight, dbias = (empty(C) for _ in range(4))
    kernels_norm.norm_silu_fwd(x, weight, bias, groups, 1e-6, out)
    kernels_norm.norm_silu_bwd(dout, x, weight, bias, groups, 1e-6, dx, dweight, dbias)
    h = empty(B, C, *grid, last=True)
    kernels_passes.epilogue(h, out, bias, None, None if groups else weight, 1e-6)
    kernels_passes.pack(h, None, (2, 1, 1), (1, 1))


def convolution(C, O, taps, grid, B=1):  # noqa: E741
    from sora_kernels.causal_conv import kernels_triton

    x, out = empty(B, C, *grid, last=True), empty(B, O, *grid, last=True)
    weight, dweight = (empty(O, C, *taps, last=True) for _ in range(2))
    kernels_triton.causal_conv3d_fwd(x, weight, None, None, None, None, (1, 1, 1), False, 1e-6, out, None)
    none = (None,) * 4
    kernels_triton.causal_conv3d_bwd(
        out, None, x, weight, None, None, None, (1, 1, 1), False, 1e-6, torch.empty_like(x), dweight, *none
    )


def attention(B, S, H, E, **rules):
    from sora_kernels.attention import kernels_backward, kernels_forward
    from sora_kernels.attention.mode import resolve

    q, k, v, out, dout, dq, dk, dv = (empty(B, S, H, E) for _ in range(8))
    lse = empty(B, H, S, dtype=torch.float32)
    mode = (None, *resolve("attention", S, S, *(DENSE | rules).values()), 0.1)
    kernels_forward.spacetime_attention_fwd(q, k, v, *mode, out, lse)
    kernels_backward.spacetime_attention_bwd(dout, None, q, k, v, out, lse, *mode, True, dq, dk, dv)


def gates(B, S, H, E):
    from sora_kernels.attention import kernels_gate

    x, out, dout, dx = (empty(B, S, H, E) for _ in range(4))
    gate, dgate = empty(B, S, H), empty(B, S, H)
    kernels_gate.gate_heads_fwd(x, gate, 2.0, out)
    kernels_gate.gate_heads_bwd(dout, x, gate, 2.0, dx, dgate)


CASES = {
    "many clips": [
        *(lambda index=index: modulation(70_000, 4, 64, 2, index) for index in (False, True)),
        lambda: qknorm_rope(70_000, 4, 2, 64),
        lambda: sums(70_000, 4, 2, 64),
        lambda: patchify(70_000, 4, (1, 2, 2), (1, 2, 2), 64),
        *(lambda g=g, last=last: norms(70_000, 32, (1, 4, 4), g, last) for g in (0, 4) for last in (False, True)),
        lambda: convolution(16, 16, (3, 3, 3), (1, 4, 4), B=70_000),
        lambda: attention(70_000, 4, 2, 64),
        lambda: gates(70_000, 4, 2, 64),
        lambda: marks(70_000, 2, 8, 8),
    ],
    "many channels": [  # of the VAE of Wan 2.2, of a hypothetical one beyond it, and features no model has
        lambda: convolution(640, 640, (3, 3, 3), (2, 44, 80)),
        lambda: convolution(1024, 1024, (3, 3, 3), (2, 22, 40)),
        lambda: patchify(1, 70_000, (1, 70, 2), (1, 2, 2), 70_000),
        lambda: norms(1, 60_000, (4, 60, 104), 4, False),
    ],
    "many pixels": [
        *(lambda index=index: modulation(1, 2**25, 128, 2**15, index) for index in (False, True)),
        lambda: qknorm_rope(1, 2**24, 8, 128),
        lambda: sums(1, 2**24, 8, 128),
        lambda: patchify(1, 16, (64, 256, 1024), (1, 2, 2), 256, frames=64),
        *(lambda g=g, last=last: norms(1, 32, (512, 1024, 1024), g, last) for g in (0, 4) for last in (False, True)),
        lambda: convolution(16, 16, (3, 3, 3), (64, 2048, 2048)),
        lambda: marks(1, 2**14, 2160, 3840),
        lambda: attention(1, 2**20, 24, 128),
        lambda: gates(1, 2**24, 8, 128),
        lambda: attention(1, 40 * 90 * 160, 24, 128, grid=(40, 90, 160), window=(5, 9, 11)),
    ],
    "one long line": [
        lambda: patchify(1, 3, (1, 1, 2**23), (1, 1, 2), 64),
        lambda: norms(1, 3, (1, 1, 2**23), 3, True),
        lambda: marks(1, 1, 1, 2**23),
    ],
}


def recorded(name):
    return [launch for call in CASES[name] for launch in compile_kernels.record(call, *MODULES, recorder=Grids)]


@pytest.mark.parametrize("name", CASES)
def test_grids_have_the_one_axis_that_may_be_long(name):
    """The second and third axis of a CUDA grid end at 65535, the first at 2^31 - 1."""
    for kernel, grid, *_ in recorded(name):
        assert len(grid) == 1 and 0 < grid[0] < 2**31, f"{kernel}: {grid}"


def test_every_kernel_was_launched():
    assert {kernel for name in CASES for kernel, *_ in recorded(name)} == KERNELS


def spread(t):
    """t with more than 2^31 elements between its clips and between their tokens or channels, none of them touched."""
    step = 2**31 + 64
    strides = list(t.stride())
    strides[0], strides[1] = step * t.shape[1], step
    count = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, count * t.element_size(), flags), dtype=t.dtype)
    return memory.as_strided(t.shape, strides).copy_(t)


TOKENS, HEADS = (2, 3, 24), (2, 3, 2, 16)
OFFSETS = {  # the function, the shapes of what lies spread, and of a weight
    "norm_modulate": (lambda x, s, **impl: sora_kernels.norm_modulate(x, s, s, **impl), [TOKENS] * 2),
    "gate_residual": (sora_kernels.gate_residual, [TOKENS] * 3),
    "qk_norm_rope": (lambda q, **impl: sora_kernels.qk_norm_rope(q, q, grid=(3, 1, 1), **impl)[0], [HEADS]),
    "qk_norm_stats": (sora_kernels.qk_norm_stats, [HEADS] * 2),
    "gate_heads": (sora_kernels.gate_heads, [HEADS, HEADS[:3]]),
    "spacetime_attention": (sora_kernels.spacetime_attention, [HEADS] * 3),
    "spacetime_attention in windows": (
        functools.partial(sora_kernels.spacetime_attention, grid=(3, 1, 1), window=(2, 1, 1)), [HEADS] * 3
    ),
    "patch_embed3d": (sora_kernels.patch_embed3d, [(2, 3, 1, 4, 6)], (24, 3, 1, 2, 2)),
    "unpatchify3d": (
        functools.partial(sora_kernels.unpatchify3d, grid=(1, 2, 3), patch=(1, 2, 2), channels=3), [(2, 6, 12)]
    ),
    "final_layer": (
        functools.partial(sora_kernels.final_layer, grid=(1, 2, 3), patch=(1, 2, 2)), [(2, 6, 24)] * 3, (12, 24)
    ),
    "video_to_uint8": (sora_kernels.video_to_uint8, [(2, 3, 2, 4, 6)]),
}  # fmt: skip


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_of_more_than_32_bits(name, impl, require):
    require(name.split()[0], impl)
    function, *shapes = OFFSETS[name]
    spread_out, weight = ([torch.randn(shape).half() for shape in group] for group in (shapes[0], shapes[1:]))
    call = lambda *tensors: function(*tensors, *weight, impl=impl)  # noqa: E731
    out = call(*spread_out)
    assert torch.equal(call(*map(spread, spread_out)), out)
    if not out.is_floating_point():
        return
    dout = torch.randn_like(out)
    grads, expected = (
        torch.autograd.grad(call(*(leaves := [place(t).requires_grad_() for t in spread_out])), leaves, place(dout))
        for place in (spread, torch.clone)
    )
    assert all(map(torch.equal, grads, expected))


def test_partial_sums_may_lie_beyond_32_bits():
    partial = spread(torch.randn(2, 3, 40))
    out = torch.empty(2, 40)
    _triton.sum_partials(partial, out)
    torch.testing.assert_close(out, partial.sum(1))


WIDE = 2**16 + 1
TOO_WIDE = {
    "norm_modulate": lambda x: sora_kernels.norm_modulate(x, x[0, 0], x[0, 0], impl="triton"),
    "gate_residual": lambda x: sora_kernels.gate_residual(x, x, x[0, 0], impl="triton"),
    "gate_residual_norm_modulate": lambda x: sora_kernels.gate_residual_norm_modulate(
        x, x, x[0, 0], x[0, 0], x[0, 0], impl="triton"
    ),
    "qk_norm_rope": lambda x: sora_kernels.qk_norm_rope(x[:, :, None], x[:, :, None], impl="triton"),
    "qk_norm_stats": lambda x: sora_kernels.qk_norm_stats(x[:, :, None], x[:, :, None], impl="triton"),
    "norm_silu": lambda x: sora_kernels.norm_silu(x.reshape(1, WIDE, 1, 1, 1), x[0, 0], impl="triton"),
    "causal_conv3d": lambda x: sora_kernels.causal_conv3d(
        x[..., :2].reshape(1, 2, 1, 1, 1), x.new_empty(WIDE, 2, 1, 1, 1), norm_weight=x[0, 0], impl="triton"
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", TOO_WIDE)
def test_rows_too_wide_for_registers_are_refused_with_the_limit(op, require):
    """The compiler would take minutes for them, or stop with an error of its own."""
    require(op, "triton")
    refusal = rf"{op}: impl='triton' cannot run: triton holds \w+ of up to \d+ values .* got {WIDE}"
    with pytest.raises(Unavailable, match=refusal):
        TOO_WIDE[op](torch.zeros(1, 1, WIDE))
