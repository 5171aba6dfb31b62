"""Compile the Triton kernels of every family for GPUs that need not be present, and print what came out as JSON lines.

The launchers are called with tensors on the meta device; in place of each kernel stands a recorder that keeps the
launch, so what is compiled is exactly what would be launched: tile sizes, warps and specialisation included.
Run in a process of its own, without TRITON_INTERPRET: python tests/compile_kernels.py sm_80,sm_90 [family ...]
With --into FILE the rows take the place of those of the same families in that file, instead. With --known FILE a row of
that file is printed in place of compiling again, where the compiler would be given the same: `given`, a hash of what
Triton makes of the source before its passes, of the options and the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import hazards
import pytest
import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
FORMATS = {"last": torch.channels_last_3d, "first": torch.contiguous_format}


def specialise(kernel: triton.JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The source and options that the JIT would compile for this launch of pointers aligned to 16 bytes."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "num_ctas", "maxnreg") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or isinstance(value, bool):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


class Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(call: Callable[[], None], *modules, recorder: type[Recorder] = Recorder) -> list:
    """The kernel launches that `call` makes from these modules."""
    launches: list = []
    patched = [(m, n, k) for m in modules for n, k in vars(m).items() if n.endswith("_kernel")]
    for module, name, kernel in patched:
        setattr(module, name, recorder(kernel, launches))
    try:
        call()
    finally:
        for module, name, kernel in patched:
            setattr(module, name, kernel)
    return launches


def distinct(launches: list) -> dict[str, tuple]:
    """One launch of each compiled kernel, by what it is compiled from: the phases of a convolution share theirs."""
    found = {}
    for kernel, args, kwargs in launches:
        source, options = specialise(kernel, args, dict(kwargs))
        key = repr((kernel.__name__, source.signature, source.constants, source.attrs, options))
        found.setdefault(key, (kernel, args, kwargs))
    return found


def compile_for(capability: int, source: ASTSource, options: dict) -> tuple:
    """The compiled kernel, and what ptxas said of it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled, said.getvalue()


class Given(Exception):
    """What a compiler was given, in place of what it would have made."""


def _refuse(*stages) -> tuple[str, str] | None:
    """Triton's hook, which may change its stages; without arguments it names the change for the cache."""
    if not stages:
        return "given", "given"

    def refuse(module, metadata):
        raise Given(module.str_nodebug())

    stages[1]["ttir"] = refuse


def given(capability: int, source: ASTSource, options: dict) -> str:
    """A hash of what the compiler is given, places in the source aside."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = _refuse
        try:
            compile_for(capability, source, options)
        except Given as module:
            return hashlib.sha256(repr((capability, sorted(options.items()), str(module))).encode()).hexdigest()[:16]
    raise RuntimeError(f"{source.name} was taken from a cache")


def measure(kernel, args, kwargs, capability: int) -> dict:
    compiled, said = compile_for(capability, *specialise(kernel, args, dict(kwargs)))
    found, ptx = sass.resources(compiled.asm["cubin"]), compiled.asm["ptx"]
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    row = dict(
        kernel=kernel.__name__, **found, shared=shared, num_warps=warps,
        occupancy=sass.occupancy(capability, found["registers"], shared, warps),
        loads=ptx.count("ld.global"), vector_loads=len(re.findall(r"ld\.global\S*\.(?:v4\.[bu]32|v2\.b64)", ptx)),
        copies=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        vector_copies=len(re.findall(r"cp\.async\.c[ag]\.[^;]*\], 0x10,", ptx)),
        boxes=ptx.count("cp.async.bulk.tensor"), wgmma=ptx.count("wgmma.mma_async"), tcgen05=ptx.count("tcgen05.mma"),
    )  # fmt: skip
    if row["wgmma"]:
        row |= sass.wgmma(compiled.asm["cubin"])
        row |= dict(serialized="are serialized" in said, overwritten=hazards.overwritten(compiled.asm["ttgir"]))
    return row


def modulation() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """(case, launch, modules) for the widths of public models, in the row layouts that choose another tiling."""
    from sora_kernels import _triton
    from sora_kernels.modulation import kernels

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    for D in (64, 1152, 1536, 3072, 5120):
        for name, frames in (("per clip", 1), ("per token", 4096), ("by index", 3)):
            index = empty(1, 4096, dtype=torch.int64) if name == "by index" else None
            y_rms = True if name == "by index" else None
            if index is not None and D not in (64, 1536):
                continue
            x, y, x_new, out, dx, dy = (empty(1, 4096, D) for _ in range(6))
            gate, shift, scale, dgate, dshift, dscale = (empty(1, frames, D) for _ in range(6))
            tables = [empty(D, dtype=torch.float32) for _ in range(6)]

            rule = index, False, y_rms, 1e-6

            def forward(x=x, y=y, gate=gate, shift=shift, scale=scale, tables=tables, rule=rule, x_new=x_new, out=out):
                kernels.gate_residual_norm_modulate_fwd(
                    x, y, gate, shift, scale, None, None, *tables[:3], *rule, 0, x_new, out
                )

            def backward(
                dx_new=x, dout=out, x_new=x_new, y=y, gate=gate, scale=scale, tables=tables, rule=rule,
                grads=(dx, dy, dgate, dshift, dscale),
            ):  # fmt: skip
                kernels.gate_residual_norm_modulate_bwd(
                    dx_new, dout, x_new, y, gate, scale, None, None, tables[0], tables[2], *rule,
                    *grads, None, None, *tables[3:],
                )  # fmt: skip

            yield f"D={D} forward {name}", forward, (kernels, _triton)
            yield f"D={D} backward {name}", backward, (kernels, _triton)


def qknorm_rope() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """The heads of public models: across the width and per head, both pairings, partial rotation, given freqs."""
    from sora_kernels import _triton
    from sora_kernels.qknorm_rope import kernels, kernels_stats

    cases = [  # heads, E, rotary_dim, norm (a layer norm with a bias), across the width, interleaved, freqs
        (12, 128, 128, 1, True, True, None),
        (40, 128, 128, 1, True, True, None),
        (24, 128, 128, 1, False, True, None),
        (24, 128, 96, 1, False, False, None),
        (48, 64, 64, 2, False, True, None),
        (16, 72, 72, 1, False, True, None),
        (24, 96, 96, 1, False, False, None),
        (24, 112, 112, 1, False, True, None),
        (1, 2048, 2048, 1, False, True, "of a token"),
        (32, 128, 128, 1, True, False, "of a head"),
        (6, 128, 128, 1, True, True, "of all ranks"),
    ]
    for H, E, rotary, norm, width, interleaved, given in cases:
        q, dout, out, dq = (torch.empty(1, 4096, H, E, dtype=torch.bfloat16, device="meta") for _ in range(4))
        weight, dweight, bias, dbias = (torch.empty(H * E if width else E, device="meta") for _ in range(4))
        bias, dbias = (bias, dbias) if norm == 2 else (None, None)
        n = rotary // 2
        ranks = given == "of all ranks"  # sums of squares, and some of the tokens of a grid
        rows = (4096, H) if given == "of a head" else (4096,)
        tables = [torch.empty(*rows, n, device="meta") if given and not ranks else None for _ in range(2)]
        axes = [] if given and not ranks else [16, 16, 16, n - 2 * (n // 3), n // 3, n // 3, 0, 0, 0]
        axes = [32, *axes[1:], 4096, 8192] if ranks else axes
        stats, dstats = (torch.empty(1, 4096, device="meta") if ranks else None for _ in range(2))
        settings = (stats, *tables, None, None, norm, width, axes, 1e4, 0, interleaved, 1e-6, 2 * H * E, 2 * H * E)
        none = q[:, :0]  # k is launched like q: once is enough

        def forward(q=q, none=none, affine=(weight, None, bias, None), settings=settings, out=out):
            kernels.qk_norm_rope_fwd(q, none, *affine, *settings, False, out, none)

        def backward(
            dout=dout, q=q, none=none, affine=(weight, None, bias, None), settings=settings,
            grads=(dq, none, dweight, None, dbias, None, dstats),
        ):  # fmt: skip
            kernels.qk_norm_rope_bwd(dout, none, q, none, *affine, *settings, *grads)

        kind = " across" * width + " biased" * (norm == 2) + " ranks" * ranks
        name = f"{H}x{E}{kind} {rotary} turn {'pairs' if interleaved else 'halves'}"
        yield f"{name} forward", forward, (kernels, _triton)
        yield f"{name} backward", backward, (kernels, _triton)
        if ranks:
            sums = functools.partial(kernels_stats.qk_norm_stats_fwd, q, none, stats)
            back = functools.partial(kernels_stats.qk_norm_stats_bwd, dstats, q, none, dq, None)
            yield f"sums of {H}x{E} forward", sums, (kernels_stats,)
            yield f"sums of {H}x{E} backward", back, (kernels_stats,)


def patchify() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """Both ends of Wan 14B with a row per frame, Wan 5B with 48 channels and a row per token, Wan 1.3B; odd sizes.

    The last layer also with a row per frame of Wan 5B, of fp16 and of 4 channels.
    """
    from sora_kernels import _triton
    from sora_kernels.patchify import kernels, kernels_embed, kernels_final, kernels_uint8

    bf16, fp32 = torch.bfloat16, torch.float32
    modules = (kernels, kernels_embed, kernels_final, _triton)
    cases = [  # C, grid, patch, D, dtype of video and tokens, of parameters and rows, rows of modulation
        (16, (21, 45, 80), (1, 2, 2), 5120, bf16, bf16, 21),
        (48, (31, 22, 40), (1, 2, 2), 3072, bf16, bf16, 27280),
        (16, (21, 30, 52), (1, 2, 2), 1536, fp32, fp32, 1),
        (3, (3, 5, 7), (2, 3, 5), 33, bf16, fp32, 3),
    ]
    last = [
        (48, (31, 22, 40), (1, 2, 2), 3072, bf16, bf16, 31),
        (16, (21, 45, 80), (1, 2, 2), 5120, torch.float16, torch.float16, 21),
        (4, (16, 32, 32), (1, 2, 2), 1152, bf16, bf16, 1),
    ]
    for C, grid, patch, D, dtype, weight_dtype, frames in cases + last:
        S, K = grid[0] * grid[1] * grid[2], C * patch[0] * patch[1] * patch[2]

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        video, dvideo = (empty(1, C, *(n * p for n, p in zip(grid, patch, strict=True))) for _ in range(2))
        tokens, dtokens, features = empty(1, S, D), empty(1, S, D), empty(1, S, K)
        bias, dbias = (empty(D, dtype=weight_dtype) for _ in range(2))
        weight, dweight = (empty(D, C, *patch, dtype=weight_dtype) for _ in range(2))
        pos, dpos = (empty(1, S, D, dtype=weight_dtype) if C != 16 else None for _ in range(2))
        rows = [None if frames is None else empty(1, frames, D, dtype=weight_dtype) for _ in range(4)]
        out_weight, dout_weight = (empty(K, D, dtype=weight_dtype) for _ in range(2))
        out_bias, dout_bias = (empty(K, dtype=weight_dtype) for _ in range(2))
        final = (tokens, *rows[:2], out_weight, out_bias, *grid, False, 1e-6)
        calls = {
            "embed forward": lambda a=(video, weight, bias, pos, tokens): kernels_embed.patch_embed3d_fwd(*a),
            "embed backward": lambda a=(tokens, video, weight, bias, pos, dvideo, dweight, dbias, dpos): (
                kernels_embed.patch_embed3d_bwd(*a)
            ),
            "unpatchify forward": lambda a=(features, *grid, video): kernels.unpatchify3d_fwd(*a),
            "final forward": lambda a=(*final, video): kernels_final.final_layer_fwd(*a),
            "final backward": lambda a=(video, *final, dtokens, *rows[2:], dout_weight, dout_bias): (
                kernels_final.final_layer_bwd(*a)
            ),
        }
        only_last = (C, grid, patch, D, dtype, weight_dtype, frames) in last
        for name, call in calls.items():
            if not only_last:
                yield f"{name} C={C} D={D}", call, modules
            elif name.startswith("final"):
                yield f"{name} C={C} D={D} {str(dtype).removeprefix('torch.')} {frames} rows", call, modules
    frames = [  # of Wan 2.1's decoder at 480p and of Wan 2.2's at 704p
        ("pixels", 3, (4, 480, 832), (1, 1, 1)), ("patches", 12, (4, 352, 640), (1, 2, 2)),
    ]  # fmt: skip
    for (name, features, grid, patch), (where, order) in itertools.product(frames, FORMATS.items()):
        video = torch.empty(1, features, *grid, dtype=bf16, device="meta", memory_format=order)
        size = (n * p for n, p in zip(grid, patch, strict=True))
        out = torch.empty(1, *size, 3, dtype=torch.uint8, device="meta")
        call = functools.partial(kernels_uint8.video_to_uint8_fwd, video, patch, out)
        yield f"frames of {name} channels {where}", call, (kernels_uint8,)


def watermark() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """Chunks of Wan's frames at 480p and 704p, of a line that ends within a block and is not aligned, of one frame."""
    from sora_kernels.watermark import kernels

    for size in ((4, 480, 832), (4, 704, 1280), (3, 35, 61), (1, 64, 64)):
        frames, out = (torch.empty(1, *size, 3, dtype=torch.uint8, device="meta") for _ in range(2))
        tile = torch.empty(64, 64, device="meta")
        name = "x".join(map(str, size))
        yield f"mark {name}", functools.partial(kernels.embed_watermark_fwd, frames, tile, out), (kernels,)


def norms(widths) -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """RMS norms of Wan 2.1's decoder at 480p, group norms of wider ones at 720p, in both memory formats; odd sizes."""
    from sora_kernels.causal_conv import kernels_norm

    cases = [  # C, grid, groups, dtype of the parameters
        *((C, (4, 480, 832), 0, torch.bfloat16) for C in (96, 192, 384)),
        *((C, (4, 720, 1280), 32, torch.float32) for C in (128, 256, 512)),
        (33, (3, 5, 7), 3, torch.float32),
    ]
    cases = [case for case in cases if case[0] in widths]
    for (C, grid, groups, dtype), (where, order) in itertools.product(cases, FORMATS.items()):
        videos = [torch.empty(1, C, *grid, dtype=torch.bfloat16, device="meta", memory_format=order) for _ in range(3)]
        weight, bias, dweight, dbias = (torch.empty(C, dtype=dtype, device="meta") for _ in range(4))

        def forward(x=videos[0], out=videos[1], weight=weight, bias=bias, groups=groups):
            kernels_norm.norm_silu_fwd(x, weight, bias, groups, 1e-6, out)

        def backward(videos=videos, weight=weight, bias=bias, groups=groups, dweight=dweight, dbias=dbias):
            dout, x, dx = videos
            kernels_norm.norm_silu_bwd(dout, x, weight, bias, groups, 1e-6, dx, dweight, dbias)

        name = f"{'group' if groups else 'rms'} C={C} channels {where}"
        yield f"{name} forward", forward, (kernels_norm,)
        yield f"{name} backward", backward, (kernels_norm,)


WINDOW_AND_TEXT = dict(grid=(30, 48, 80), window=(18, 24, 24), stride=(6, 8, 8), text_len=256)


def attention(
    cases=((128, torch.bfloat16, WINDOW_AND_TEXT), (128, torch.bfloat16, {})), boxes: bool = False
) -> Iterator[tuple]:
    """Hunyuan's clip, dense and in a window with text (every mask there is), with the tiles of each GPU.

    boxes: with visited tiles loaded through descriptors.
    """
    from sora_kernels.attention import config, kernels_backward, kernels_forward
    from sora_kernels.attention.mode import resolve

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    places = dict(grid=None, grids=None, window=None, stride=1, dilation=1, causal=None)
    rules = places | dict(sink=0, text_len=0, text_at="end")
    for (E, dtype, rule), sm in itertools.product(cases, SUPPORTED):
        S = 30 * 48 * 80 + rule.get("text_len", 0)
        q, k, v, out, dout, dq, dk, dv = (empty(1, S, 24, E, dtype=dtype) for _ in range(8))
        lse = empty(1, 24, S, dtype=torch.float32)
        mode = (None, *resolve("attention", S, S, *(rules | rule).values()), 0.1)

        def on_this_gpu(launch, *args, sm=sm):
            tiles = ("forward", "backward_queries", "backward_keys")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(config, "capability", lambda device: sm)
                for name in tiles if boxes else ():
                    tile = getattr(config, name)
                    patch.setattr(config, name, lambda *a, f=tile: dataclasses.replace(f(*a), descriptors=True))
                launch(*args)

        forward = functools.partial(on_this_gpu, kernels_forward.spacetime_attention_fwd, q, k, v, *mode, out, lse)
        backward = functools.partial(
            on_this_gpu,
            kernels_backward.spacetime_attention_bwd,
            dout,
            None,
            q,
            k,
            v,
            out,
            lse,
            *mode,
            True,
            dq,
            dk,
            dv,
        )
        kind = "time alone" if rule.get("window") == (30, 1, 1) else "window" if rule else "dense"
        kind += " and text" if "text_len" in rule else ""
        name = f"E={E} {str(dtype).removeprefix('torch.')} {kind}"
        yield f"{name} forward", forward, (kernels_forward,), (sm,)
        yield f"{name} backward", backward, (kernels_backward,), (sm,)


def attention_gates() -> Iterator[tuple]:
    """LTX-2's heads, and an odd width."""
    from sora_kernels.attention import kernels_gate

    for H, E in ((32, 128), (12, 72)):
        x, dout, out, dx = (torch.empty(1, 4096, H, E, dtype=torch.bfloat16, device="meta") for _ in range(4))
        gate, dgate = (torch.empty(1, 4096, H, dtype=torch.bfloat16, device="meta") for _ in range(2))
        forward = functools.partial(kernels_gate.gate_heads_fwd, x, gate, 2.0, out)
        backward = functools.partial(kernels_gate.gate_heads_bwd, dout, x, gate, 2.0, dx, dgate)
        yield f"gates of {H}x{E} forward", forward, (kernels_gate,)
        yield f"gates of {H}x{E} backward", backward, (kernels_gate,)


def attention_widths() -> Iterator[tuple]:
    """Every width and dtype that has tiles of its own: minutes."""
    half = [(E, torch.bfloat16, WINDOW_AND_TEXT) for E in (64, 72, 80, 96, 112, 256)]
    rest = [(E, torch.float32, WINDOW_AND_TEXT) for E in (64, 128, 256)] + [(128, torch.float16, WINDOW_AND_TEXT)]
    halved = [(72, torch.bfloat16, dict(grid=(30, 48, 80), window=(30, 1, 1), text_len=256))]
    yield from attention((*half, *rest, *halved))


def attention_boxes(names=("window", "dense")) -> Iterator[tuple]:
    """A clip that boxes hold, on the GPUs that load them."""
    rules = dict(window={name: value for name, value in WINDOW_AND_TEXT.items() if name != "text_len"}, dense={})
    for case, call, modules, only in attention([(128, torch.bfloat16, rules[name]) for name in names], boxes=True):
        if only[0] in (90, 100):
            yield f"boxes {case}", call, modules, only


# name -> C, O, taps, pixels of out (frames, height, width), op, norm in the epilogue
CONVOLUTIONS = {
    "Wan 96": (96, 96, (3, 3, 3), (4, 480, 832), "causal_conv3d", True),
    "Wan 192": (192, 192, (3, 3, 3), (4, 240, 416), "causal_conv3d", True),
    "Wan 384": (384, 384, (3, 3, 3), (2, 120, 208), "causal_conv3d", False),
    "Wan in": (16, 384, (3, 3, 3), (1, 60, 104), "causal_conv3d", False),
    "Wan out": (96, 3, (3, 3, 3), (4, 480, 832), "causal_conv3d", False),
    "Wan up": (384, 192, (1, 3, 3), (2, 240, 416), "upsample_conv3d", False),
    "Wan down": (192, 192, (1, 3, 3), (4, 120, 208), "downsample_conv3d", False),
    "Wan time": (384, 768, (3, 1, 1), (1, 60, 104), "causal_conv3d", False),
    "Hunyuan 128": (128, 128, (3, 3, 3), (4, 720, 1280), "causal_conv3d", False),
    "Hunyuan 256": (256, 256, (3, 3, 3), (4, 360, 640), "causal_conv3d", False),
    "Hunyuan 512": (512, 512, (3, 3, 3), (2, 180, 320), "causal_conv3d", False),
    "fp32 96": (96, 96, (3, 3, 3), (4, 480, 832), "causal_conv3d", True),
    "odd 33": (3, 33, (1, 3, 5), (3, 37, 41), "causal_conv3d", True),
}


COMMON = ("Wan 96", "Wan up")


def convolutions(names) -> Iterator[tuple[str, Callable[[], None], tuple, tuple]]:
    """Layers of VAEs, a chunk of a stream each, with the tiles of each GPU."""
    from sora_kernels import _triton
    from sora_kernels.causal_conv import config, kernels_conv, kernels_dweight, kernels_triton

    for name, sm in itertools.product(names, SUPPORTED):
        C, O, taps, size, op, norm = CONVOLUTIONS[name]  # noqa: E741
        dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
        factor = {"upsample_conv3d": (1, 2, 2), "downsample_conv3d": (1, 2, 2)}.get(op, (1, 1, 1))

        def video(channels, size, dtype=dtype):
            return torch.empty(1, channels, *size, dtype=dtype, device="meta").to(memory_format=torch.channels_last_3d)

        scale = (lambda n, f: n // f) if op == "upsample_conv3d" else (lambda n, f: n * f)
        x, dx = (video(C, [scale(n, f) for n, f in zip(size, factor, strict=True)]) for _ in range(2))
        out, raw, residual = (video(O, size) for _ in range(3))
        weight, dweight = (
            torch.empty(O, C, *taps, dtype=dtype, device="meta").to(memory_format=torch.channels_last_3d)
            for _ in range(2)
        )
        cache = video(C, (taps[0] - 1, *x.shape[3:])) if taps[0] > 1 else None
        bias, norm_weight = (torch.empty(O, dtype=dtype, device="meta") for _ in range(2))
        norm_weight, raw = (norm_weight, raw) if norm else (None, None)
        if op == "causal_conv3d":
            run = functools.partial(
                kernels_triton.causal_conv3d_fwd, x, weight, bias, cache, residual, norm_weight,
                factor, False, 1e-6, out, raw,
            )
            back = functools.partial(
                kernels_triton.causal_conv3d_bwd, out, None, x, weight, cache, None, None, factor, False, 1e-6,
                dx, dweight, None, None, None, None,
            )  # fmt: skip
        else:
            run = functools.partial(getattr(kernels_triton, f"{op}_fwd"), x, weight, bias, cache, factor, out)
            back = functools.partial(
                getattr(kernels_triton, f"{op}_bwd"), out, x, weight, cache, factor, dx, dweight, None, None
            )

        def on_this_gpu(launch, sm=sm):
            original, config.capability = config.capability, lambda device: sm
            try:
                launch()
            finally:
                config.capability = original

        modules = (kernels_conv, kernels_dweight, _triton)
        yield f"{name} forward", functools.partial(on_this_gpu, run), modules, (sm,)
        yield f"{name} backward", functools.partial(on_this_gpu, back), modules, (sm,)


def passes() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """Before and after cuDNN, a chunk of a stream: after a cache, before a stride; a residual and a norm, a bias."""
    from sora_kernels.causal_conv import kernels_passes

    for C, grid, dtype in ((96, (4, 480, 832), torch.bfloat16), (384, (2, 120, 208), torch.float32)):

        def video(frames, C=C, grid=grid, dtype=dtype):
            last = torch.channels_last_3d
            return torch.empty(1, C, frames, *grid[1:], dtype=dtype, device="meta", memory_format=last)

        x, h, residual, out, raw = (video(grid[0]) for _ in range(5))
        cache = video(2)
        bias, norm_weight = (torch.empty(C, dtype=dtype, device="meta") for _ in range(2))
        calls = {
            "pack past": lambda a=(x, cache, (2, 0, 0)): kernels_passes.pack(*a),
            "pack below": lambda a=(x, None, (0, 0, 0), (1, 1)): kernels_passes.pack(*a),
            "epilogue norm": lambda a=(h, out, bias, residual, norm_weight, 1e-6, raw): kernels_passes.epilogue(*a),
            "epilogue bias": lambda a=(h, out, bias): kernels_passes.epilogue(*a),
        }
        for name, call in calls.items():
            yield f"{name} C={C}", call, (kernels_passes,)


def causal_conv() -> Iterator[tuple]:
    yield from norms((33, 96, 128))
    yield from passes()
    yield from convolutions(COMMON)


def causal_conv_layers() -> Iterator[tuple]:
    """The other layers of Wan's and HunyuanVideo's VAEs, fp32 and odd channels: minutes."""
    yield from convolutions([name for name in CONVOLUTIONS if name not in COMMON])


def sparingly(cases: Callable[[], Iterator[tuple]], *everywhere: str) -> Callable[[], Iterator[tuple]]:
    """The cases with these words in their names for every GPU, the others for Hopper: what tests compile by default."""

    def fewer() -> Iterator[tuple]:
        for case, call, modules, *only in cases():
            found, gpus = any(words in case for words in everywhere), only[0] if only else SUPPORTED
            yield case, call, modules, gpus if found else [sm for sm in gpus if sm == 90]

    return fewer


SUPPORTED = (80, 90, 100, 120)
ALL = {
    "modulation": modulation, "qknorm_rope": qknorm_rope, "patchify": patchify, "causal_conv": causal_conv,
    "watermark": watermark,
    "attention": lambda: itertools.chain(attention(), attention_boxes(), attention_gates()),
}  # fmt: skip
FAMILIES = {
    "modulation": sparingly(modulation, "D=64 ", "D=5120"),
    "qknorm_rope": sparingly(qknorm_rope, "40x128", "24x128 96", "48x64"),
    "patchify": sparingly(patchify, "C=16 D=5120"),
    "causal_conv": sparingly(causal_conv, "Wan 96", "rms C=96"),
    "watermark": sparingly(watermark, "4x480x832"),
    "attention": sparingly(
        lambda: itertools.chain(attention(), attention_boxes(["window"]), attention_gates()),
        "window and text", "boxes", "gates of 32x128",
    ),
}
SLOW = {f"{name}_everywhere": cases for name, cases in ALL.items()} | {
    "attention_widths": attention_widths, "causal_conv_layers": causal_conv_layers,
    "causal_conv_norms": functools.partial(norms, (192, 256, 384, 512)),
}  # fmt: skip


def rows(capabilities: list[int], name: str, known: dict[str, dict]) -> Iterator[dict]:
    """known: rows by what was given."""
    family, measured = name.removesuffix("_everywhere"), {}  # cases share kernels, above all those that add partials
    for case, call, modules, *only in (FAMILIES | SLOW)[name]():
        targets = [c for c in capabilities if not only or c in only[0]]
        launches = distinct(record(call, *modules)) if targets else {}
        for (source, launch), capability in itertools.product(launches.items(), targets):
            if (source, capability) not in measured:
                kernel, args, kwargs = launch
                hashed = given(capability, *specialise(kernel, args, dict(kwargs)))
                measured[source, capability] = known.get(hashed) or dict(measure(*launch, capability), given=hashed)
            row = dict(family=family, case=case, sm=capability, triton=triton.__version__)
            yield row | {name: value for name, value in measured[source, capability].items() if name not in row}


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True  # a cached kernel says nothing
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", help="sm_80,sm_90,...")
    parser.add_argument("families", nargs="*", help=f"all of {', '.join(FAMILIES)} by default")
    parser.add_argument("--into", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--known", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    recorded = map(json.loads, args.known.read_text().splitlines()) if args.known else ()
    known = {row["given"]: row for row in recorded if row["triton"] == triton.__version__}
    capabilities = [int(sm.removeprefix("sm_")) for sm in args.targets.split(",")]
    names = args.families or list(FAMILIES)
    found: list[str] = []
    for row in itertools.chain.from_iterable(rows(capabilities, name, known) for name in names):
        found.append(json.dumps(row) + "\n")
        if not args.into:
            print(found[-1], end="", flush=True)
    if args.into:
        lines = args.into.read_text().splitlines(keepends=True) if args.into.exists() else []
        kept = [line for line in lines if json.loads(line)["family"] not in names]
        args.into.write_text("".join(sorted([*kept, *found], key=lambda line: json.loads(line)["family"])))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    main()
