"""The calls whose compiled kernels `benchmarks.compiled` executes: the widths of public models, a few programs each.

Triton compiles them, or, where the name ends in nvcc, nvcc does: the CUDA C++ of the same call.

A reduction of a whole clip leaves a bounded number of fp32 partials. So that a small clip shows the share they have of
a large one, `bounds` cuts that number as far as the clip was cut: each program gathers as much as at full size.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import sora_kernels

BF16, FP32, LAST = torch.bfloat16, torch.float32, torch.channels_last_3d


@dataclass(frozen=True)
class Case:
    """One call, forward and, where an input wants a gradient, backward.

    call      takes the inputs by name and returns its results
    inputs    the tensors; those of floats want gradients, save `constant`
    products  bound by the tensor cores: its bytes are told and not judged
    bounds    module.NAME of a bound of programs, in sora_kernels or ptx -> what it is here
    impl      of `call`: "triton" or "cuda"
    sms       the GPUs that have it
    blocks    of CUDA C++ whose blocks are as many as a GPU has processors: fewer, as a clip is smaller
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...] | None]
    inputs: Callable[[], dict[str, Tensor]]
    constant: tuple[str, ...] = ()
    products: bool = False
    bounds: Mapping[str, int] = field(default_factory=dict)
    impl: str = "triton"
    sms: tuple[int, ...] = (80, 90)
    blocks: int | None = None

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for place, bound in self.bounds.items():
                module, name = (place if place.startswith("ptx.") else f"sora_kernels.{place}").rsplit(".", 1)
                stack.enter_context(mock.patch.object(importlib.import_module(module), name, bound))
            yield


def op(name: str, impl: str = "triton", **settings) -> Callable:
    return partial(getattr(sora_kernels, name), impl=impl, **settings)


ROWS = "gate", "shift", "scale"


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=FP32).to(dtype)


def video(*shape: int) -> Tensor:
    return draw(*shape).to(memory_format=LAST)


def modulation() -> Iterator[Case]:
    """Wan 1.3B (D=1536) and 14B (5120); 64 tokens a program of the backward, as of 32,760 over 512."""
    small = {"modulation.kernels.PROGRAMS": 4}

    def inputs(D, rows=1, dtype=BF16, tables=False):
        own = dict(shift_table=draw(D, dtype=FP32), scale_table=draw(D, dtype=FP32)) if tables else {}
        shift, scale = (draw(1, rows, D, dtype=dtype) for _ in range(2))
        return dict(x=draw(1, 256, D, dtype=dtype), shift=shift, scale=scale, **own)

    def gated(D, rows):
        return dict(x=draw(1, 256, D), y=draw(1, 256, D), **{name: draw(1, 1, D) for name in rows})

    for name, drawn in {
        "D=1536 per clip": partial(inputs, 1536), "D=1536 per clip fp32": partial(inputs, 1536, dtype=FP32),
        "D=5120 per clip": partial(inputs, 5120), "D=5120 per clip fp32": partial(inputs, 5120, dtype=FP32),
        "D=1536 tables": partial(inputs, 1536, tables=True), "D=3072 per token": partial(inputs, 3072, rows=256),
    }.items():  # fmt: skip
        name = f"norm_modulate {name}"
        yield Case(name, op("norm_modulate"), drawn, bounds=small)
        constant = ("x", "shift", "scale") if "5120 per clip fp32" in name else ()  # wider than its gradients are
        yield Case(f"{name}, nvcc", op("norm_modulate", "cuda"), drawn, constant, bounds=small, impl="cuda")
    yield Case(
        "norm_modulate D=1536 by index", op("norm_modulate"),
        lambda: inputs(1536, rows=3) | dict(index=torch.randint(3, (1, 256))), ("index",), bounds=small,
    )  # fmt: skip
    fused = "gate_residual_norm_modulate"
    for name, D, *rows in (("gate_residual", 1536, "gate"), (fused, 1536, *ROWS), (fused, 5120, *ROWS)):
        drawn = partial(gated, D, rows)
        yield Case(f"{name} D={D} per clip", op(name), drawn, bounds=small)
        yield Case(f"{name} D={D} per clip, nvcc", op(name, "cuda"), drawn, bounds=small, impl="cuda")


def reduction() -> Iterator[Case]:
    """The end of a reduction over 512 programs, as at full size."""

    def total(partials):
        from sora_kernels import _triton

        out = torch.empty(1, partials.shape[2], dtype=BF16)
        _triton.sum_partials(partials, out)
        return out

    partials = partial(draw, 1, 512, 1536, dtype=FP32)
    yield Case("sum of 512 partials D=1536", total, lambda: dict(partials=partials()), ("partials",))


def qknorm_rope() -> Iterator[Case]:
    """Wan 1.3B and 14B across the width, HunyuanVideo by head, Wan 1.3B on two ranks; 32 tokens a program of the
    backward."""
    for H, across, bound in ((12, "width", 4), (40, "width", 4), (24, "head", 12)):
        name, how = f"qk_norm_rope {H}x128 across the {across}", dict(across=across, grid=(2, 8, 8))

        def inputs(H=H, n=H * 128 if across == "width" else 128):
            return dict(q=draw(1, 128, H, 128), k=draw(1, 128, H, 128), q_weight=draw(n), k_weight=draw(n))

        yield Case(name, op("qk_norm_rope", **how), inputs, bounds={"qknorm_rope.kernels.PROGRAMS": bound})
        bounds = {"ptx.nvcc.QK_PROGRAMS": 2}
        yield Case(f"{name}, nvcc", op("qk_norm_rope", "cuda", **how), inputs, bounds=bounds, impl="cuda")
    q, k = (partial(draw, 1, 128, 6, 128) for _ in "qk")  # one of two ranks
    yield Case("qk_norm_stats 6x128", op("qk_norm_stats"), lambda: dict(q=q(), k=k()))
    yield Case(
        "qk_norm_rope 6x128 on a rank",
        op("qk_norm_rope", across="width", grid=(4, 8, 8), tokens=(128, 256), width=1536),
        lambda: dict(q=q(), k=k(), q_weight=draw(768), k_weight=draw(768),
                     stats=draw(1, 256, dtype=FP32).square() + 1500), bounds={"qknorm_rope.kernels.PROGRAMS": 4},
    )  # fmt: skip


def patchify() -> Iterator[Case]:
    """Both ends of Wan 1.3B, one frame of 480p, narrow ones in fp32; lines of the frames of the decoders of Wan 2.1 and
    of Wan 2.2."""
    grid, patch = (1, 30, 52), (1, 2, 2)

    def ends():
        return dict(video=draw(1, 16, 1, 60, 104), weight=draw(1536, 16, 1, 2, 2) / 8, bias=draw(1536))

    bounds = {"patchify.kernels_embed.PROGRAMS": 52, "patchify.kernels_embed.REDUCERS": 12}
    yield Case("patch_embed3d C=16 D=1536", op("patch_embed3d"), ends, bounds=bounds)
    every = ("video", "weight", "bias")
    yield Case(
        "patch_embed3d C=16 D=1536, nvcc", op("patch_embed3d", "cuda"), ends, every, impl="cuda", sms=(90,), blocks=6
    )
    yield Case(
        "unpatchify3d C=16", op("unpatchify3d", grid=grid, patch=patch, channels=16),
        lambda: dict(tokens=draw(1, 1560, 64)),
    )  # fmt: skip

    def last():
        rows = dict(shift=draw(1, 1, 1536), scale=draw(1, 1, 1536))
        return dict(x=draw(1, 1560, 1536), **rows, weight=draw(64, 1536) / 40, bias=draw(64))

    how, bounds = dict(grid=grid, patch=patch), {"patchify.kernels_final.PROGRAMS": 12}
    yield Case("final_layer C=16 D=1536", op("final_layer", **how), last, bounds=bounds)
    every = ("x", "shift", "scale", "weight", "bias")
    yield Case(
        "final_layer C=16 D=1536, nvcc", op("final_layer", "cuda", **how), last, every, impl="cuda", sms=(90,), blocks=7
    )
    yield Case(
        "final_layer C=16 D=1536 per token", op("final_layer", grid=grid, patch=patch),
        lambda: dict(x=draw(1, 1560, 1536), shift=draw(1, 1560, 1536), scale=draw(1, 1560, 1536),
                     weight=draw(64, 1536) / 40, bias=draw(64)), bounds={"patchify.kernels_final.PROGRAMS": 12},
    )  # fmt: skip
    # fp32 is multiplied in fp32, without tensor cores: bound by its products.
    whole = partial(draw, dtype=FP32)
    yield Case(
        "patch_embed3d C=16 D=512 fp32", op("patch_embed3d"),
        lambda: dict(video=whole(1, 16, 1, 32, 32), weight=whole(512, 16, 1, 2, 2) / 8, bias=whole(512)),
        products=True, bounds={"patchify.kernels_embed.PROGRAMS": 52, "patchify.kernels_embed.REDUCERS": 12},
    )  # fmt: skip
    yield Case(
        "final_layer C=16 D=512 fp32", op("final_layer", grid=(1, 16, 16), patch=patch),
        lambda: dict(x=whole(1, 256, 512), shift=whole(1, 1, 512), scale=whole(1, 1, 512), weight=whole(64, 512) / 20,
                     bias=whole(64)), products=True, bounds={"patchify.kernels_final.PROGRAMS": 12},
    )  # fmt: skip
    pixels = op("video_to_uint8")
    yield Case("video_to_uint8 C=3 channels last", pixels, lambda: dict(video=video(1, 3, 2, 16, 832)), ("video",))
    yield Case("video_to_uint8 C=3 channels first", pixels, lambda: dict(video=draw(1, 3, 2, 16, 832)), ("video",))
    yield Case(
        "video_to_uint8 C=12 patches channels last", op("video_to_uint8", patch=(1, 2, 2)),
        lambda: dict(video=video(1, 12, 1, 16, 640)), ("video",),
    )  # fmt: skip


def watermark() -> Iterator[Case]:
    """Bands of 832 pixels, of which the last program of a line has half of its own."""
    frames = torch.arange(2 * 16 * 832 * 3).remainder(251).to(torch.uint8)
    yield Case(
        "embed_watermark 832 wide", op("embed_watermark"),
        lambda: dict(frames=frames.view(1, 2, 16, 832, 3), tile=draw(16, 64, dtype=FP32)),
        ("frames", "tile"),
    )  # fmt: skip


def norms() -> Iterator[Case]:
    """RMS norms of Wan 2.1's decoder, group norms of HunyuanVideo's; 1,560 pixels a program of the backward."""
    for C, groups in ((96, 0), (192, 0), (128, 32)):
        for order, make in (("last", video), ("first", draw)):
            kind = dict(norm="group", groups=groups) if groups else dict(norm="rms")
            name = f"norm_silu {kind['norm']} C={C} channels {order}"

            def inputs(C=C, make=make):
                return dict(x=make(1, C, 2, 30, 104), weight=draw(C), bias=draw(C))

            yield Case(name, op("norm_silu", **kind), inputs, bounds={"causal_conv.kernels_norm.PROGRAMS": 4})
            if not groups:
                few = {"ptx.nvcc.PROCESSORS": 4}  # a warp takes pixels one after the other, as at full size
                every = ("x", "weight", "bias")
                yield Case(f"{name}, nvcc", op("norm_silu", "cuda"), inputs, every, bounds=few, impl="cuda")


def passes() -> Iterator[Case]:
    """What stands around cuDNN's convolution."""
    from sora_kernels.causal_conv import kernels_passes

    def packed(x, cache):
        return kernels_passes.pack(x, cache, (2, 0, 0))

    def finished(h, bias, residual, norm_weight):
        out, raw = torch.empty_like(h), torch.empty_like(h)
        kernels_passes.epilogue(h, out, bias, residual, norm_weight, 1e-6, raw)
        return out, raw

    yield Case(
        "pack C=96 after a cache", packed, lambda: dict(x=video(1, 96, 4, 8, 104), cache=video(1, 96, 2, 8, 104)),
        ("x", "cache"),
    )  # fmt: skip
    yield Case(
        "epilogue C=96 residual and norm", finished,
        lambda: dict(h=video(1, 96, 2, 16, 104), bias=draw(96), residual=video(1, 96, 2, 16, 104),
                     norm_weight=draw(96)), ("h", "bias", "residual", "norm_weight"),
    )  # fmt: skip


def convolutions() -> Iterator[Case]:
    """Layers of Wan 2.1's decoder and encoder, a corner of a frame each."""
    bounds = {"causal_conv.kernels_dweight.PROGRAMS": 27}

    def layer(C, O, *taps):  # noqa: E741
        weight = video(O, C, *taps) / (C * 9) ** 0.5
        return dict(weight=weight.to(memory_format=LAST), bias=draw(O))

    def block():
        x, residual = video(1, 96, 2, 16, 32), video(1, 96, 2, 16, 32)
        return dict(x=x, **layer(96, 96, 3, 3, 3), residual=residual, norm_weight=draw(96))

    yield Case("causal_conv3d 96 to 96", op("causal_conv3d"), block, products=True, bounds=bounds)
    yield Case(  # the raw result too, which the other keeps for its backward
        "causal_conv3d 96 to 96, nvcc", op("causal_conv3d", "cuda", return_raw=True), block,
        ("x", "weight", "bias", "residual", "norm_weight"), products=True, impl="cuda", sms=(90,),
    )  # fmt: skip
    def upsampled():
        return dict(x=video(1, 384, 1, 8, 16), **layer(384, 192, 1, 3, 3))

    yield Case("upsample_conv3d 384 to 192", op("upsample_conv3d"), upsampled, products=True, bounds=bounds)
    yield Case(
        "upsample_conv3d 384 to 192, nvcc", op("upsample_conv3d", "cuda"), upsampled, ("x", "weight", "bias"),
        products=True, impl="cuda", sms=(90,),
    )  # fmt: skip
    yield Case(
        "downsample_conv3d 192 to 192", op("downsample_conv3d"),
        lambda: dict(x=video(1, 192, 1, 16, 32), **layer(192, 192, 1, 3, 3)), products=True, bounds=bounds,
    )  # fmt: skip


def attention() -> Iterator[Case]:
    """Heads of 128: dense, and in tiles of a window with text."""

    def heads(tokens, count):
        return lambda: {name: draw(1, tokens, count, 128) for name in "qkv"}

    yield Case("spacetime_attention dense", op("spacetime_attention"), heads(512, 2), products=True)
    yield Case(
        "spacetime_attention dense, nvcc", op("spacetime_attention", "cuda"), heads(512, 2), products=True,
        impl="cuda", sms=(90,),
    )  # fmt: skip
    yield Case(
        "spacetime_attention window and text",
        op("spacetime_attention", grid=(4, 8, 16), window=(2, 8, 8), stride=(2, 4, 8), text_len=32),
        heads(544, 1), products=True,
    )  # fmt: skip
    yield Case(
        "spacetime_attention window and text, nvcc",
        op("spacetime_attention", "cuda", grid=(4, 8, 16), window=(2, 8, 8), stride=(2, 4, 8), text_len=32),
        heads(544, 1), products=True, impl="cuda", sms=(90,),
    )  # fmt: skip
    yield Case(
        "gate_heads 32x128", op("gate_heads"), lambda: dict(x=draw(1, 256, 32, 128), gate=draw(1, 256, 32))
    )  # fmt: skip


def cases() -> list[Case]:
    families = modulation, reduction, qknorm_rope, patchify, watermark, norms, passes, convolutions, attention
    return [case for family in families for case in family()]
