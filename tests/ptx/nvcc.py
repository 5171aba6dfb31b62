"""CUDA C++ launches on the executor: what nvcc makes of `csrc/cuda`, chosen and launched as its host code does."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import math
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from sora_kernels import _dispatch, _library
from sora_kernels.attention import config as attention_config
from sora_kernels.attention import kernels_cuda
from sora_kernels.causal_conv import config as conv_config
from sora_kernels.patchify import kernels_cuda as patchify_config

from . import device, parser
from .build import cache_directory, once
from .device import Box, Counters, Struct, unwritten

SOURCES = pathlib.Path(__file__).parents[2] / "csrc"
ARCHITECTURES = {80: "80", 90: "90a"}
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
MANGLED = {torch.float16: "6__half", torch.float32: "f", torch.bfloat16: "13__nv_bfloat16"}
PROCESSORS = 132  # of an H200
TRAITS = ((1, 16), (1, 32), (1, 48), (4, 24), (4, 48), (16, 32))  # warps of a row, elements of a thread
BACKWARD_WARPS = (1, 4, 12)
QK_PROGRAMS = 512  # kPrograms of qknorm_rope_backward.cu


def find() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def version() -> str:
    said = subprocess.run([find(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.rpartition(" V")[2].split()[0]


@functools.cache
def compiled(name: str, sm: int) -> str:
    """The PTX of csrc/cuda/{name}.cu, kept on disk beside the core of the executor."""
    source = SOURCES / "cuda" / f"{name}.cu"
    sources = [source, *sorted((SOURCES / "common").glob("*")), *sorted((SOURCES / "cuda").glob("*.cuh"))]
    key = hashlib.sha256("".join([version(), torch.__version__, *(p.read_text() for p in sources)]).encode())

    def compile_to(ptx: pathlib.Path) -> None:
        include = pathlib.Path(importlib.util.find_spec("torch").origin).parent / "include"
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-DUSE_CUDA", f"-I{SOURCES}"]
        target = f"-arch=compute_{ARCHITECTURES[sm]}"
        subprocess.run([find(), "-ptx", target, *flags, "-isystem", include, "-o", ptx, source], check=True)

    return once(cache_directory() / f"{name}-{ARCHITECTURES[sm]}-{key.hexdigest()[:16]}.ptx", compile_to).read_text()


def kernel_of(D: int, dtype: torch.dtype) -> tuple[str, int]:
    """What names the kernel of aligned rows of width D, and how many rows a block of it has."""
    fit = [(warps, elements) for warps, elements in TRAITS if D <= 32 * warps * elements]
    if D % 8 or not fit:
        return f"norm_modulate_loop_kernelI{MANGLED[dtype]}E", 1
    warps, elements = fit[0]
    return f"TraitsI{MANGLED[dtype]}Li{warps}ELi{elements}E", 4 if warps == 1 else 1


def norm_modulate(
    sm: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    shift_table: Tensor | None, scale_table: Tensor | None, rms: bool, eps: float, out: Tensor,
    again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of norm_modulate_fwd in modulation.cu; shift and scale [B, F, D]. again: the schedule of a second run,
    which must leave the same bits. options: of device.run."""
    B, S, D = x.shape
    fields, layout = [B, S, D, max([t.shape[1] for t in (shift, scale) if t is not None], default=1)], "<4q"
    for tensor in (x, out):
        fields += [tensor, *tensor.stride()[:2]]
        layout += "Qqq"
    for rows in (shift, scale):
        strides = (0, 0) if rows is None else (rows.stride(0), rows.stride(1) if rows.shape[1] > 1 else 0)
        fields += [0 if rows is None else rows, SCALAR_TYPES[x.dtype if rows is None else rows.dtype], *strides]
        layout += "Qb7xqq"
    for vector in (weight, bias, shift_table, scale_table):
        fields += [0 if vector is None else vector, SCALAR_TYPES[torch.float32 if vector is None else vector.dtype]]
        layout += "Qb7x"
    text, (form, rows_of_a_block) = compiled("modulation", sm), kernel_of(D, x.dtype)
    (name,) = (n for n in parser.kernels(text) if form in n)
    struct = Struct(layout + "?3xf", (*fields, rms, eps))
    launch = text, (-(-B * S // rows_of_a_block),), [struct]
    options |= dict(name=name, names=["p"])
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def modulation_bwd(
    sm: int, source: str, tokens: tuple, rows: tuple, vectors: tuple, gradients: tuple, totals: tuple, rms: bool,
    y_rms: bool | None, eps: float, again: int | None = None, **options,
) -> dict[str, Counters]:  # fmt: skip
    """The launches of modulation_backward.cuh by what csrc/cuda/{source}.cu defines. tokens: dout, dx_new, x, y, dx and
    dy; rows: gate and scale; vectors: weight, bias, gate_table and scale_table; gradients: of gate, shift and scale;
    totals: of their tables, of weight and of bias. The rest as of norm_modulate."""
    from sora_kernels.modulation import kernels  # whose bound of programs is kPrograms

    dout, y, like = tokens[0], tokens[3], next(t for t in tokens if t is not None)
    B, S, D = like.shape
    F = max([t.shape[1] for t in (*rows, *gradients) if t is not None and t.ndim == 3], default=1)
    by_columns = dout is None and y_rms is None
    warps, elements = 1, 12 if like.dtype == torch.float32 else 16
    warps = next(n for n in BACKWARD_WARPS if by_columns or D <= 32 * n * elements)
    of_block = 4 if warps == 1 and not by_columns else 1
    frames, tokens_of_row, programs = B * F, S // F, kernels.PROGRAMS * of_block
    chunk = -(-tokens_of_row // max(1, programs // frames))
    chunks = -(-tokens_of_row // chunk)
    split = chunks > 1
    span = 1 if split else -(-frames // programs)
    programs = -(-frames // span) * chunks

    fields: list = []
    for t in tokens:
        fields += [0, 0, 0] if t is None else [t, *t.stride()[:2]]
    for t in (*rows, *([None] * 3 if split else gradients)):
        fields += _rows_of(t)
    for t in vectors:
        fields += _rows_of(t)[:2]
    partials, sums = [], []  # of gradients where programs are chunks; else, and of weight and bias, of totals
    for k, (total, own) in enumerate(itertools.zip_longest(totals, gradients)):
        shared = split and k < 3
        partial = unwritten(programs, D) if total is not None or (shared and own is not None) else None
        partials.append((partial if shared else None, None if shared else partial))
        sums += [(partial, own, frames, F, chunks)] if shared and own is not None else []
        sums += [(partial, total, 1, 1, programs)] if total is not None else []
    fields += [0 if t is None else t for t, _ in partials[:3]] + [0 if t is None else t for _, t in partials]
    fields += [B * S, S, D, F, tokens_of_row, programs, chunks, chunk, span, rms, y_rms is not None, bool(y_rms), eps]
    text = compiled(source, sm)

    def run(form: str, grid: tuple[int, ...], argument: Struct, **how) -> Counters:
        (name,) = (n for n in parser.kernels(text) if form in n)
        launch, how = (text, grid, [argument]), options | dict(name=name, names=["p"]) | how
        return device.run(*launch, **how) if again is None else device.run_again(*launch, again, **how)

    p = Struct("<" + "Qqq" * 6 + "Qb7xqq" * 5 + "Qb7x" * 4 + "8Q9i???xf4x", tuple(fields))
    if by_columns:
        columns = -(-D // (32 * 16 // like.element_size()))
        form = f"gate_residual_bwd_kernelI{MANGLED[like.dtype]}E"
        found = {"gate_residual_bwd_kernel": run(form, (-(-programs * columns // 4),), p, block=(128,))}
    else:
        threads = 128 if warps == 1 else -(-D // (32 * elements)) * 32
        held = threads * elements * 4 * (1 if y is None else 2)
        form = f"TraitsI{MANGLED[like.dtype]}Li{warps}ELb{int(y is not None)}E"
        counted = run(form, (-(-programs // of_block),), p, block=(threads,), shared=held)
        found = {"modulation_bwd_kernel": counted}
    if sums:
        found["sum_partials_kernel"] = run("sum_partials_kernel", *_sums(sums, D))
    return found


def gate_residual(
    sm: int, x: Tensor, y: Tensor, rows: tuple, vectors: tuple, rms: bool, y_rms: bool | None, eps: float,
    x_new: Tensor, out: Tensor | None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of gate_residual_fwd, or with an out of gate_residual_norm_modulate_fwd, in modulation_gate.cu; rows:
    gate, shift and scale, vectors: weight, bias and their tables. The rest as of norm_modulate."""
    B, S, D = x.shape
    fields = [B, S, D, max([t.shape[1] for t in rows if t is not None and t.ndim == 3], default=1)]
    for tensor in (x, y, x_new, out):
        fields += [0, 0, 0] if tensor is None else [tensor, *tensor.stride()[:2]]
    fields += [field for t in rows for field in _rows_of(t)] + [field for t in vectors for field in _rows_of(t)[:2]]
    fields += [rms, y_rms is not None, bool(y_rms), eps]
    warps, elements = next(t for t in TRAITS if D <= 32 * t[0] * t[1])
    text = compiled("modulation_gate", sm)
    form = f"TraitsI{MANGLED[x.dtype]}Li{warps}ELi{elements}EEELb{int(out is not None)}E"
    (name,) = (n for n in parser.kernels(text) if form in n)
    layout = "<4q" + "Qqq" * 4 + "Qb7xqq" * 3 + "Qb7x" * 5 + "???xf"
    launch = text, (-(-B * S // (4 if warps == 1 else 1)),), [Struct(layout, tuple(fields))]
    options |= dict(name=name, names=["p"])
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def _sums(sums: list[tuple], D: int) -> tuple[tuple[int, int], Struct]:
    """The grid and the argument of sum_partials_kernel in common/partials.cuh: of each sum the partials, where it goes,
    its rows, those of a clip, and partials of a row."""
    fields = [field for partial, to, *counts in sums for field in (partial, *_rows_of(to), *counts)]
    absent = [field for _ in range(8 - len(sums)) for field in (0, *_rows_of(None), 0, 0, 0)]
    argument = Struct("<" + "QQb7xqq3i4x" * 8 + "2i", (*fields, *absent, len(sums), D))
    return (-(-D // 128) * max(count for _, _, count, *_ in sums), len(sums)), argument


def _rows_of(t: Tensor | None) -> list:
    """A Rows or a Vector: data, dtype, and the strides of clips and rows, 0 where a row serves all."""
    if t is None:
        return [0, SCALAR_TYPES[torch.float32], 0, 0]
    of_clip, of_row = t.stride(0) if t.ndim > 1 else 0, t.stride(1) if t.ndim == 3 and t.shape[1] > 1 else 0
    return [t, SCALAR_TYPES[t.dtype], of_clip, of_row]


def attention(
    sm: int, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor, blocks: int = PROCESSORS,
    kv_lens: Tensor | None = None,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of attention_fwd in attention.cu, on a GPU of so many processors; the rest as of norm_modulate.

    rewrite(ptx) gives what is executed in place of what was compiled.
    """
    B, Sq, H, E = q.shape
    columns, keys = 32 if E % 64 else 64, 176
    query_tiles = -(-Sq // 128)
    tiles = query_tiles * H * B
    text = compiled("attention", sm)
    (name,) = (n for n in parser.kernels(text) if f"AttentionTraitsI{MANGLED[q.dtype]}Li{E}ELb0E" in n)
    rows = ((q, 64), (k, keys), (v, keys), (out, 64))
    boxes = [Box(t.transpose(1, 2), (1, 1, n, columns), 3 if columns == 64 else 2) for t, n in rows]
    fields = _attention_fields(q, k, kv_lens, query_tiles, tiles, scale, out, lse)
    shared = 2 * E * (128 + 4 * keys) + 1024  # queries, two stages of keys and of values; barriers
    text = rewrite(text) if rewrite else text
    launch = text, (min(tiles, blocks),), [*boxes, Struct("<QQQi4x6i2f104x", fields)]
    options |= dict(name=name, names=["q", "k", "v", "out", "p"], block=(384,), shared=shared)
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def _attention_fields(q, k, kv_lens, query_tiles: int, tiles: int, scale: float, out, lse) -> tuple:
    (_, Sq, H, _), (Sk, Hk) = q.shape, k.shape[1:3]
    return lse, out, *_lengths(kv_lens), Sq, Sk, H, H // Hk, query_tiles, tiles, scale, scale * math.log2(math.e)


def _lengths(kv_lens: Tensor | None) -> tuple:
    return (0, 0) if kv_lens is None else (kv_lens, kv_lens.dtype == torch.int64)


def _plan_fields(own, heads, rows, tiles, reach, *boxes) -> tuple:
    """A PlanParams; own: a tensor of the side that owns tiles."""
    own_box, visit_box, own_size, visit_size, own_start, visit_start = boxes
    shapes, periods, bits = [], [], 0
    for box, size, start in ((own_box, own_size, own_start), (visit_box, visit_size, visit_start)):
        shapes += [*(side.bit_length() - 1 for side in reversed(box)), start, size[2], size[1]]
    for side in (*shapes[6:8], 7):
        bits = min(bits + side, 7)
        periods.append(0xFFFFFFFF // (2**2**bits - 1) if bits < 5 else 1)
    chosen = own.shape[2] if heads is None else heads.numel()
    return rows, tiles, reach, 0 if heads is None else heads, rows.shape[0], chosen, own.shape[1], *shapes, *periods


def _boxes(x: Tensor, start: int, size: Sequence[int], sides: Sequence[int]) -> Box:
    """Of a video that begins at token `start`."""
    B, _, heads, E = x.shape
    b, s = x.stride()[:2]
    shape, strides = (B, *size, heads * E), (b, size[1] * size[2] * s, size[2] * s, s, 1)
    view = x.as_strided(shape, strides, x.storage_offset() + start * s)
    return Box(view, (1, *sides, 32 if E % 64 else 64), 2 if E % 64 else 3)


def _runs(x: Tensor, tokens: int) -> Box:
    return _boxes(x, 0, (1, 1, x.shape[1]), (1, 1, tokens))


def _half(box: Sequence[int]) -> list[int]:
    """What a warp group owns of a box of 128 tokens."""
    half, split = list(box), next(i for i, side in enumerate(box) if side > 1)
    half[split] //= 2
    return half


def attention_plan(
    sm: int, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, heads: Tensor | None, rows: Tensor, tiles: Tensor,
    reach: Tensor, own_box: Sequence[int], visit_box: Sequence[int], own_size: Sequence[int], visit_size: Sequence[int],
    own_start: int, visit_start: int, scale: float, out: Tensor, lse: Tensor, blocks: int = PROCESSORS,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of attention_fwd in attention.cu over the tiles of a plan; the rest as of attention."""
    E = q.shape[3]
    maps = [_boxes(q, own_start, own_size, _half(own_box))]
    maps += [_boxes(x, visit_start, visit_size, visit_box) for x in (k, v)]
    maps += [_runs(q, 64), _runs(k, 128), _runs(v, 128)]
    boxes = own_box, visit_box, own_size, visit_size, own_start, visit_start
    plan = _plan_fields(q, heads, rows, tiles, reach, *boxes)
    count = rows.shape[0] * plan[5] * q.shape[0]
    fields = *_attention_fields(q, k, kv_lens, -(-q.shape[1] // 128), count, scale, out, lse), *plan
    text = compiled("attention", sm)
    (name,) = (n for n in parser.kernels(text) if f"AttentionTraitsI{MANGLED[q.dtype]}Li{E}ELb1E" in n)
    text = rewrite(text) if rewrite else text
    launch = text, (min(count, blocks),), [*maps, Struct("<QQQi4x6i2f4Q15i3I", fields)]
    shared = 2 * E * (128 + 2 * 3 * 128) + 1024  # queries, three stages of keys and of values; barriers
    names = ["q", "k", "v", "q runs", "k runs", "v runs", "p"]
    options |= dict(name=name, names=names, block=(384,), shared=shared)
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def attention_bwd_rows(
    sm: int, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, numbers: Tensor,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of attention_bwd_rows in attention_backward.cu; the rest as of attention."""
    B, Sq, H, E = out.shape
    padded = numbers.shape[3]
    device.unwrite(numbers)
    fields = out, dout, *out.stride()[:3], *dout.stride()[:3], lse, 0 if dlse is None else dlse, *numbers
    text = compiled("attention_backward", sm)
    (name,) = (n for n in parser.kernels(text) if f"attention_bwd_rows_kernelI{MANGLED[out.dtype]}E" in n)
    p = Struct("<QQ6qQQQQ5i4x", (*fields, padded, Sq, H, E, padded // 16))
    launch = rewrite(text) if rewrite else text, (B * H * padded // 16,), [p]
    options |= dict(name=name, names=["p"], block=(128,))
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def attention_bwd(
    sm: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, kv_lens: Tensor | None,
    heads: Tensor | None, rows: Tensor | None, tiles: Tensor | None, reach: Tensor | None, own_box: Sequence[int],
    visit_box: Sequence[int], own_size: Sequence[int], visit_size: Sequence[int], own_start: int, visit_start: int,
    scale: float, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of attention_bwd in attention_backward.cu, of queries or of keys; the rest as of attention."""
    (B, Sq, H, E), (Sk, Hk), of_keys, planned = q.shape, k.shape[1:3], dq is None, rows is not None
    (own, seen), to = (((k, v), (q, dout)) if of_keys else ((q, dout), (k, v))), (dk, dv) if of_keys else (dq, None)
    visited = 64 if planned or of_keys and E > 64 else 96
    owners, own_heads = -(-own[0].shape[1] // 128), own[0].shape[2]
    wide = planned and of_keys and next(t for t in to if t is not None).dtype == torch.float32
    fields = *numbers, *_lengths(kv_lens), *(0 if t is None else t for t in to), numbers.shape[3], Sq, Sk, H
    fields += *((1, H // Hk) if wide else (H // Hk, 1)), wide, owners, own_heads, scale, scale * math.log2(math.e)
    if planned:
        boxes = own_box, visit_box, own_size, visit_size, own_start, visit_start
        plan = _plan_fields(own[0], heads, rows, tiles, reach, *boxes)
        p, blocks = Struct("<QQQi4xQQ9i2f4x4Q15i3I", (*fields, *plan)), plan[4] * plan[5] * B
        maps = [_boxes(t, own_start, own_size, _half(own_box)) for t in own]
        maps += [_boxes(t, visit_start, visit_size, visit_box) for t in seen]
        maps += [*(_runs(t, 64) for t in (*own, *seen)), p]
        names = ["own_x", "own_y", "x", "y", "own_x runs", "own_y runs", "x runs", "y runs", "p"]
    else:
        columns, gradient = 32 if E % 64 else 64, next(t for t in to if t is not None)
        some = [(t, 64) for t in own] + [(t, visited) for t in seen] + [(gradient if t is None else t, 64) for t in to]
        maps = [Box(t.transpose(1, 2), (1, 1, n, columns), 3 if columns == 64 else 2) for t, n in some]
        p, blocks = Struct("<QQQi4xQQ9i2f108x", fields), owners * own_heads * B
        names, maps = ["own_x", "own_y", "x", "y", "dx", "dy", "p"], [*maps, p]
    text = compiled("attention_backward", sm)
    form = f"BackwardTraitsI{MANGLED[q.dtype]}Li{E}ELb{of_keys:d}ELb{planned:d}E"
    (name,) = (n for n in parser.kernels(text) if form in n)
    launch = rewrite(text) if rewrite else text, (blocks,), maps
    shared = 512 * E + 3 * (4 * visited * E + 8 * visited) + 1024  # own, three stages of visited, numbers; barriers
    options |= dict(name=name, names=names, block=(384,), shared=shared)
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def conv_columns(N: int, most: int) -> int:
    """Output channels of a tile."""
    return min((n for n in (192, 128, 96, 64, 32) if n <= most), key=lambda columns: -(-N // columns) * (columns + 32))


def causal_conv3d(
    sm: int, x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, residual: Tensor | None,
    norm_weight: Tensor | None, bordered: bool, eps: float, out: Tensor, raw: Tensor | None, blocks: int = PROCESSORS,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of causal_conv3d_fwd in causal_conv.cu; the rest as of attention."""
    epilogue = residual, norm_weight, eps, raw
    return _convolve(sm, x, weight, bias, cache, epilogue, bordered, (1, 1, 1), out, blocks, rewrite, again, **options)


def upsample_conv3d(
    sm: int, x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, factor: tuple[int, int, int],
    out: Tensor, blocks: int = PROCESSORS, rewrite: Callable[[str], str] | None = None, again: int | None = None,
    **options,
) -> Counters:  # fmt: skip
    """The launch of upsample_conv3d_fwd in causal_conv.cu; weight as kernels_cuda.phases gives it."""
    epilogue = None, None, 0.0, None
    return _convolve(sm, x, weight, bias, cache, epilogue, False, factor, out, blocks, rewrite, again, **options)


def _convolve(sm, x, weight, bias, cache, epilogue, bordered, factor, out, blocks, rewrite, again, **options):
    residual, norm_weight, eps, raw = epilogue
    (C, kt, kh, kw), (B, N) = weight.shape[1:], out.shape[:2]
    frames, H, W = (n // f for n, f in zip(out.shape[2:], factor, strict=True))
    most = 192 if residual is norm_weight is None else 128
    columns, (box_h, box_w) = conv_columns(N, most), conv_box(kh, H, W)
    tiles_h, tiles_w, n_blocks = -(-H // box_h), -(-W // box_w), -(-N // columns)
    tiles = B * frames * tiles_h * tiles_w * n_blocks * math.prod(factor)
    text, before = compiled("causal_conv", sm), x if cache is None or kt == 1 else cache
    (name,) = (n for n in parser.kernels(text) if f"ConvTraitsI{MANGLED[x.dtype]}Li{columns}E" in n)
    boxes = [Box(channels_last(t), (1, 1, box_h + kh - 1, box_w, 64), 3) for t in (x, before)]
    boxes.append(Box(channels_last(weight), (columns, 1, 1, 1, 64), 3))
    out_columns = 32 if columns % 64 else 64
    side, swizzle = (1, 1, 64 // box_w, box_w, out_columns), 2 if columns % 64 else 3
    for t in (residual, raw):
        boxes.append(Box(channels_last(out if t is None else t), side, swizzle))
    (ft, fh, fw), places = factor, itertools.product(*map(range, factor))
    phases = [out[:, :, t::ft, h::fh, w::fw] for t, h, w in places]
    boxes.append(tuple(Box(channels_last(t), side, swizzle) for t in phases))
    reach = [0 if bordered else (k - 1) * f // 2 + f - 1 for k, f in zip((kh, kw), factor[1:], strict=True)]
    past = 0 if cache is None else kt - 1
    fields = *(0 if t is None else t for t in (bias, norm_weight)), eps, residual is not None, raw is not None
    fields += C, N, kt, kh, kw, len(phases), *factor[1:], 1 - kt, past, *reach, box_h, box_w
    fields += n_blocks, tiles_w, tiles_h, frames, tiles
    # two boxes of the video, a ring of taps, four boxes of the results; barriers
    shared = 2 * 320 * 128 + min(8, 768 // columns) * columns * 128 + 4 * 64 * out_columns * 2 + 1024
    text = rewrite(text) if rewrite else text
    launch = text, (min(tiles, blocks),), [*boxes, Struct("<QQf??2x19i4x", fields)]
    names = ["x", "cache", "weight", "residual", "raw", "out", "p"]
    options |= dict(name=name, names=names, block=(384,), shared=shared)
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def channels_last(video: Tensor) -> Tensor:
    """[B, T, H, W, C]; axes of one element get a stride that a descriptor takes, as on the host."""
    t = video.permute(0, 2, 3, 4, 1)
    strides = [t.shape[4] if n == 1 else s for n, s in zip(t.shape[:4], t.stride()[:4], strict=True)]
    return t.as_strided(t.shape, (*strides, 1))


def conv_box(kh: int, H: int, W: int) -> tuple[int, int]:
    """Rows and columns of the pixels of a tile."""
    sides = [(256 // w, w) for w in (16, 8, 32) if 256 + (kh - 1) * w <= 320]
    return min(sides, key=lambda side: -(-H // side[0]) * -(-W // side[1]) * 1024 + (kh - 1) * side[1])


def patch_embed3d(
    sm: int, video: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: int = PROCESSORS,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of patch_embed3d_fwd in patchify_embed.cu; the rest as of attention."""
    (D, _, *patch), K, size = weight.shape, weight[0].numel(), video.shape[2:]
    grid, rows = [n // p for n, p in zip(size, patch, strict=True)], out.view(-1, D)
    even = all(s % 2 == 0 for s in video.stride()[:4]) and video.stride(4) == 1 and patch[2] % 2 == 0
    pairs, boxes, tiles = even and video.storage_offset() % 2 == 0, -(-K // 64), -(-rows.shape[0] // 64)
    parts = 2 if D > 128 and boxes <= 3 else 1
    items = tiles * -(-D // (128 * parts))
    of_weight, of_stage, fixed = boxes * parts * 128 * 128, boxes * 64 * 128, embed_memory(parts)
    stages = min(((227 << 10) - fixed - of_weight) // of_stage, 8)
    text = compiled("patchify_embed", sm)
    (name,) = (n for n in parser.kernels(text) if f"EmbedTraitsI{MANGLED[video.dtype]}Li{parts}E" in n)
    maps = [Box(weight.view(D, K), (128 * parts, 64), 3), Box(rows, (16, 64), 3)]
    fields = video, 0 if bias is None else bias, 0 if bias is None else SCALAR_TYPES[bias.dtype], pairs
    fields += *video.stride(), K, *patch, *grid, rows.shape[0], D, boxes, stages, tiles, items
    shared = fixed + of_weight + stages * of_stage
    text = rewrite(text) if rewrite else text
    launch = text, (min(items, blocks),), [*maps, Struct("<QQb?6x5q13i4x", fields)]
    options |= dict(name=name, names=["weight", "out", "p"], block=(384,), shared=shared)
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def embed_memory(parts: int) -> int:
    """Bytes of shared memory whatever the features: boxes of out; bias, offsets of features, barriers."""
    return (32 << 10) + 4 * 128 * parts + 4 * 384 + 8 * 18


def norm_silu_tile(x: Tensor) -> tuple[int, int, int, bool]:
    """Elements of a pixel that a thread has, 0 channels first; lanes side by side in memory; warps; whole pixels."""
    C, pixels, vec = x.shape[1], x.shape[2:].numel(), 16 // x.element_size()
    if x.is_contiguous() and pixels > 1:
        lanes = 8 if C <= 16 * 4 * (64 // vec) else 4
        return 0, lanes, -(-C // (32 // lanes * (64 // vec))), True
    vecs = C // vec
    least = min(4, vecs & -vecs)
    for n in (32, 24, 16, 8):
        if C % n == 0 and (lanes := C // n) & (lanes - 1) == 0 and least <= lanes <= 32:
            return n, lanes, 4, True
    return 32, 1 << (-(-C // 32) - 1).bit_length(), 4, False


def norm_silu(
    sm: int, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, out: Tensor,
    processors: int | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of norm_silu_fwd in causal_conv_norm.cu; processors: of the GPU; the rest as of norm_modulate."""
    assert groups == 0, "the kernel is of RMS norms"
    (B, C), pixels, vec = x.shape[:2], x.shape[2:].numel(), 16 // x.element_size()
    elements, lanes, warps, whole = norm_silu_tile(x)
    text = compiled("causal_conv_norm", sm)
    if elements:
        form, pixels, tiles = f"NormSiluTraitsI{MANGLED[x.dtype]}Li{elements}ELb{int(whole)}E", B * pixels, 0
        fit = 65536 // ((3 * elements + elements // vec * 4 + 36) * 128)
        grid = min(math.ceil(math.ceil(pixels / (32 // lanes)) / 4), (processors or PROCESSORS) * fit)
    else:
        form, tiles = f"norm_silu_first_kernelI{MANGLED[x.dtype]}Li{lanes}E", -(-pixels // (lanes * vec))
        grid = B * tiles
    (name,) = (n for n in parser.kernels(text) if form in n)
    fields = [x, out, *_rows_of(weight)[:2], *_rows_of(bias)[:2], pixels, C, lanes.bit_length() - 1, tiles, 1 / C, eps]
    launch = text, (grid,), [Struct("<QQQb7xQb7xqiiiff4x", tuple(fields))]
    options |= dict(name=name, names=["p"], block=(warps * 32,))
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def final_layer(
    sm: int, x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor | None,
    grid: tuple[int, int, int], rms: bool, eps: float, out: Tensor, blocks: int = PROCESSORS,
    rewrite: Callable[[str], str] | None = None, again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of final_layer_fwd in patchify_final.cu; the rest as of attention."""
    (B, S, D), N, (_, C, *size) = x.shape, weight.shape[0], out.shape
    patch = [n // g for n, g in zip(size, grid, strict=True)]
    F = max([t.shape[1] for t in (shift, scale) if t is not None and t.ndim == 3], default=1)
    room = next(n for n in (64, 128, 192) if N <= n)

    def tiles_of(parts: int) -> int:
        return B * F * -(-(S // F) // (128 * parts))

    costs = {parts: -(-tiles_of(parts) // blocks) * (128 * parts + 64) for parts in (1, 2)}
    parts = 2 if N <= 64 and costs[2] < costs[1] else 1
    tail = 256 * (room + 2) + 16 * room + 16 + 8 * 15 + 8 * D  # results, sums, places, barriers; both rows
    of_stage = 128 * (128 * parts + room)
    stages = min(((227 << 10) - tail) // of_stage, 6)
    text = compiled("patchify_final", sm)
    (name,) = (n for n in parser.kernels(text) if f"FinalTraitsI{MANGLED[x.dtype]}Li{room}ELi{parts}E" in n)
    strides = [x.stride(0) if B > 1 else D, D, x.stride(1) if S > 1 else D, 1]
    boxes = [Box(x.as_strided((B, 1, S, D), strides), (1, 1, 128 * parts, 64), 3), Box(weight, (room, 64), 3)]
    fields = [*_rows_of(shift), *_rows_of(scale), *_rows_of(bias)[:2], out, *out.stride()[:4], eps, 1 / D, rms]
    fields += [D, N, C, *patch, 2 - patch[2] % 2, S, *grid[1:], S // F, F, tiles_of(parts) // (B * F), tiles_of(parts)]
    text = rewrite(text) if rewrite else text
    struct = Struct("<" + "Qb7xqq" * 2 + "Qb7xQ4qff?3x15i", (*fields, stages))
    launch = text, (min(tiles_of(parts), blocks),), [*boxes, struct]
    options |= dict(name=name, names=["x", "weight", "p"], block=(384,), shared=tail + stages * of_stage)
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def qk_norm_rope(
    sm: int, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None,
    k_bias: Tensor | None, stats: Tensor | None, cos: Tensor | None, sin: Tensor | None, k_cos: Tensor | None,
    k_sin: Tensor | None, norm: int, width: bool, axes: list[int] | None, theta: float, first: int, interleaved: bool,
    eps: float, q_channels: int, k_channels: int, host: bool, q_out: Tensor, k_out: Tensor,
    again: int | None = None, **options,
) -> Counters:  # fmt: skip
    """The launch of qk_norm_rope_fwd in qknorm_rope.cu; the rest as of norm_modulate."""
    (B, _, _, E), vec, most = q.shape, 16 // q.element_size(), max(q.shape[2], k.shape[2])
    lanes = 1 << (E // (2 * vec) - 1).bit_length()
    together = width or most <= 1
    warps = next(n for n in (1, 2, 4, 8) if lanes <= 32 * n and (not together or most * lanes <= 32 * n * (32 // vec)))
    groups = 32 * warps // lanes
    chunks = -(-most // (groups * (32 // vec)))
    turning = sum(axes[3:6]) if axes else 0 if cos is None else cos.shape[-1]
    tokens = math.prod(axes[:3]) if axes else 0
    start, stop = axes[9:] if axes and axes[9:] else (0, tokens)
    fields, layout = [], "<"
    for x, weight, bias, part, of, channels, out in (
        (q, q_weight, q_bias, 0, (cos, sin), q_channels, q_out),
        (k, k_weight, k_bias, q.shape[1], (cos, sin) if k_cos is None else (k_cos, k_sin), k_channels, k_out),
    ):
        S, H = x.shape[1:3]
        fields += [x, *x.stride()[:3], out, *out.stride()[:3]]
        for vector in (weight, bias):
            fields += [0 if vector is None else vector, SCALAR_TYPES[torch.float32 if vector is None else vector.dtype]]
        fields += [0, 0, 0] if stats is None else [stats[:, part:], *stats.stride()]
        fields += [0, 0, 0, 0, 0] if of[0] is None else [*of, *_steps_of(of[0])]
        turn = stop - start if of[0] is None else of[0].shape[-3 if of[0].ndim == 4 else 0]
        over = channels if stats is not None else H * E if width else E
        fields += [S if x.numel() else 0, H, -(-H // (groups * chunks)), turn, 1 / max(over, 1)]
        layout += "Q3qQ3qQb7xQb7xQ2qQQ3q4if4x"
    tokens = max(q.shape[1] if q.numel() else 0, k.shape[1] if k.numel() else 0)
    rows = B * tokens * chunks
    computed = turning if axes else 0
    split = axes[3:6] if axes else (0, 0, 0)
    fields += [*(axes[6:9] if axes else (0, 0, 0)), rows, tokens, chunks, E, turning, lanes, lanes.bit_length() - 1]
    fields += [computed, first, start, *(axes[1:3] if axes else (0, 0)), split[0], split[0] + split[1], norm]
    fields += [together, interleaved or not turning, host, eps, *_angle_steps(split, theta)]
    text = compiled("qknorm_rope", sm)
    (name,) = (n for n in parser.kernels(text) if f"TraitsI{MANGLED[q.dtype]}Li{warps}E" in n)
    launch = text, (-(-rows // (4 if warps == 1 else 1)),), [Struct(layout + "3q15i3?xf4x256Q", tuple(fields))]
    options |= dict(name=name, names=["p"])
    return device.run(*launch, **options) if again is None else device.run_again(*launch, again, **options)


def qk_norm_rope_bwd(
    sm: int, dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm: int, width: bool, axes: list[int] | None, theta: float, first: int,
    interleaved: bool, eps: float, dq: Tensor | None, dk: Tensor | None, dq_weight: Tensor | None,
    dk_weight: Tensor | None, again: int | None = None, **options,
) -> list[Counters]:  # fmt: skip
    """The launches of qk_norm_rope_bwd in qknorm_rope_backward.cu; the rest as of norm_modulate."""
    (B, _, _, E), most = q.shape, max(q.shape[2], k.shape[2])
    together, lanes = width or most <= 1, 1 << (E // 16 - 1).bit_length()
    warps = -(-most * lanes // 32)
    form = next(n for n in (4, 16) if warps <= n) if together else 1
    threads, of_block = (32 * warps, 1) if together else (128, 4)
    tokens = max(q.shape[1] if q.numel() else 0, k.shape[1] if k.numel() else 0)
    chunk = -(-B * tokens // (QK_PROGRAMS * of_block))
    programs = -(-B * tokens // chunk)
    turning = sum(axes[3:6]) if axes else 0 if cos is None else cos.shape[-1]
    start, stop = axes[9:] if axes and axes[9:] else (0, math.prod(axes[:3]) if axes else 0)
    turn = stop - start if cos is None else cos.shape[-3 if cos.ndim == 4 else 0]
    fields, sums = [], []
    for x, dout, dx, weight, to in ((q, dq_out, dq, q_weight, dq_weight), (k, dk_out, dk, k_weight, dk_weight)):
        S, H = x.shape[1:3]
        for t in (x, dout, dx):
            fields += [0, 0, 0, 0] if t is None else [t, *t.stride()[:3]]
        length = H * E if width else E
        partial = None if to is None else unwritten(programs, H * E if together else E)
        sums += [] if to is None else [(partial, to, length)]
        rounds = -(-H // (32 // min(lanes, 32)))
        fields += [*_rows_of(weight)[:2], 0 if partial is None else partial]
        fields += [S if x.numel() else 0, H, rounds, 1 / length]
    fields += [0, 0, 0, 0] if cos is None else [cos, sin, *_steps_of(cos)[:2]]
    fields += [*(axes[6:9] if axes else (0, 0, 0)), B * tokens, tokens, programs, chunk]
    fields += [E, turning, lanes, lanes.bit_length() - 1, turning if axes else 0, first, turn, start]
    split = axes[3:6] if axes else (0, 0, 0)
    fields += [*(axes[1:3] if axes else (0, 0)), split[0], split[0] + split[1]]
    fields += [norm != 0, interleaved or not turning, eps]
    side = "Q3q" * 3 + "Qb7xQ3if"
    p = Struct("<" + side * 2 + "QQ2q3q16i??2xf256Q", (*fields, *_angle_steps(split, theta)))
    text = compiled("qknorm_rope_backward", sm)

    def run(form: str, grid: tuple[int, ...], argument: Struct, **how) -> Counters:
        (name,) = (n for n in parser.kernels(text) if form in n)
        launch, how = (text, grid, [argument]), options | dict(name=name, names=["p"]) | how
        return device.run(*launch, **how) if again is None else device.run_again(*launch, again, **how)

    form = f"TraitsI{MANGLED[q.dtype]}Li{form}E"
    found = [run(form, (-(-programs // of_block),), p, block=(threads,), shared=128 * threads)]
    alike = len({length for *_, length in sums}) == 1
    for launch in [sums] if alike else [[one] for one in sums]:
        found.append(run("sum_partials_kernel", *_sums([(p, to, 1, 1, programs) for p, to, _ in launch], launch[0][2])))
    return found


def _angle_steps(split: Sequence[int], theta: float) -> list[int]:
    """Of the pairs of each axis, of 2^64 to a turn; as many as the kernels have room for."""
    steps = [int(math.ldexp(theta ** (-j / n) / (2 * math.pi) % 1, 64)) for n in split for j in range(n)]
    return [*steps, *[0] * (256 - len(steps))]


def _steps_of(table: Tensor) -> tuple[int, int, int]:
    """Strides of clips, tokens and heads of cos or sin: 0 where one row serves all."""
    table = table[:, None] if table.ndim == 2 else table
    table = table[None] if table.ndim == 3 else table
    of_clip, of_token, of_head = table.stride()[:3]
    return of_clip if table.shape[0] > 1 else 0, of_token, of_head if table.shape[2] > 1 else 0


Observer = Callable[[str, Counters], None]


@contextlib.contextmanager
def nvcc_on(sm: int, observe: Observer = lambda name, counters: None, **options) -> Iterator[None]:
    """Within it what csrc/cuda has takes CPU tensors under `impl="cuda"` and is executed as sm_N would.

    observe is called after each launch with the kernel's name and its counters. options: of device.run.
    """

    original_call, original_why_not = _library.call, _dispatch._why_not

    def modulate(x, shift, scale, weight, bias, shift_table, scale_table, index, rms, eps, host, out) -> None:
        assert host == 0 and index is None, "the kernel rounds once and takes no index"
        vectors = weight, bias, shift_table, scale_table
        counters = norm_modulate(sm, x, shift, scale, *vectors, rms, eps, out, **options)
        observe("norm_modulate_kernel", counters)

    def launch(source, index, *arguments) -> None:
        assert index is None, "the kernels take no index"
        for name, counters in modulation_bwd(sm, source, *arguments, **options).items():
            observe(name, counters)

    def modulate_back(dout, x, scale, weight, bias, scale_table, index, rms, eps, *gradients) -> None:
        dx, dshift, dscale, dweight, dbias, dshift_table, dscale_table = gradients
        tokens, totals = (dout, None, x, None, dx, None), (None, dshift_table, dscale_table, dweight, dbias)
        vectors, rows = (weight, bias, None, scale_table), (None, dshift, dscale)
        launch("modulation_backward", index, tokens, (None, scale), vectors, rows, totals, rms, None, eps)

    def gate_back(dout, y, gate, gate_table, index, y_rms, eps, dy, dgate, dgate_table) -> None:
        tokens, vectors = (None, dout, None, y, None, dy), (None, None, gate_table, None)
        rows, totals = (dgate, None, None), (dgate_table, None, None, None, None)
        launch("modulation_gate_backward", index, tokens, (gate, None), vectors, rows, totals, False, y_rms, eps)

    def gate_and_modulate_back(dx_new, dout, x, y, gate, scale, weight, bias, gate_t, scale_t, index, *rest) -> None:
        rms, y_rms, eps, dx, dy, dgate, dshift, dscale, dweight, dbias, dgate_t, dshift_t, dscale_t = rest
        rows, totals = (dgate, dshift, dscale), (dgate_t, dshift_t, dscale_t, dweight, dbias)
        if dout is None:
            for t in (*rows[1:], *totals[1:]):
                if t is not None:
                    t.zero_()
            x, scale, rows, totals = None, None, (dgate, None, None), (dgate_t, None, None, None, None)
        tokens, vectors = (dout, dx_new, x, y, dx, dy), (weight, bias, gate_t, scale_t)
        launch("modulation_gate_backward", index, tokens, (gate, scale), vectors, rows, totals, rms, y_rms, eps)

    def attend(q, k, v, kv_lens, heads, rows, *rest) -> None:
        if rows is None:
            name, counters = "fwd", attention(sm, q, k, v, *rest[-3:], kv_lens=kv_lens, **options)
        else:
            name, counters = "plan_fwd", attention_plan(sm, q, k, v, kv_lens, heads, rows, *rest, **options)
        observe(f"attention_{name}_kernel", counters)

    def attend_rows(*arguments) -> None:
        counters = attention_bwd_rows(sm, *arguments, **options)
        observe("attention_bwd_rows_kernel", counters)

    def attend_back(*arguments) -> None:
        counters = attention_bwd(sm, *arguments, **options)
        of, planned = "keys" if arguments[-3] is None else "queries", arguments[7] is not None
        observe(f"attention_{'plan_' * planned}bwd_{of}_kernel", counters)

    def gate_on(x, y, gate, gate_table, index, y_rms, eps, host, out) -> None:
        assert host == 0 and index is None, "the kernel rounds once and takes no index"
        vectors = None, None, gate_table, None, None
        counters = gate_residual(sm, x, y, (gate, None, None), vectors, False, y_rms, eps, out, None, **options)
        observe("gate_residual_kernel", counters)

    def gate_and_modulate(x, y, gate, shift, scale, weight, bias, gate_t, shift_t, scale_t, index, *rest) -> None:
        rms, y_rms, eps, host, x_new, out = rest
        assert host == 0 and index is None, "the kernel rounds once and takes no index"
        rows, vectors = (gate, shift, scale), (weight, bias, gate_t, shift_t, scale_t)
        counters = gate_residual(sm, x, y, rows, vectors, rms, y_rms, eps, x_new, out, **options)
        observe("gate_residual_kernel", counters)

    def convolve(x, weight, bias, cache, residual, norm_weight, stride, bordered, norm_eps, out, pre) -> None:
        assert tuple(stride) == (1, 1, 1), "the kernel takes stride 1"
        rest = residual, norm_weight, bordered, norm_eps, out, pre
        counters = causal_conv3d(sm, x, weight, bias, cache, *rest, **options)
        observe("causal_conv3d_fwd_kernel", counters)

    def convolve_upsampled(*arguments) -> None:
        counters = upsample_conv3d(sm, *arguments, **options)
        observe("causal_conv3d_fwd_kernel", counters)

    def normalise(*arguments) -> None:
        counters = norm_silu(sm, *arguments, **options)
        observe("norm_silu_kernel", counters)

    def turn(*arguments) -> None:
        counters = qk_norm_rope(sm, *arguments, **options)
        observe("qk_norm_rope_fwd_kernel", counters)

    def turn_back(dq_out, dk_out, q, k, q_weight, k_weight, q_bias, k_bias, stats, cos, sin, *rest) -> None:
        k_cos, k_sin, *rest = rest
        assert q_bias is k_bias is stats is k_cos is k_sin is None
        norm, width, axes, theta, first, interleaved, eps, _, _, dq, dk, dq_weight, dk_weight, *_ = rest
        given = q, k, q_weight, k_weight, cos, sin, norm, width, axes, theta, first, interleaved, eps
        launched = qk_norm_rope_bwd(sm, dq_out, dk_out, *given, dq, dk, dq_weight, dk_weight, **options)
        for name, counters in zip(("qk_norm_rope_bwd_kernel", *["sum_partials_kernel"] * 2), launched, strict=False):
            observe(name, counters)

    def embed(video, weight, bias, pos, out) -> None:
        assert pos is None, "the kernel adds no rows"
        counters = patch_embed3d(sm, video, weight, bias, out, **options)
        observe("patch_embed3d_fwd_kernel", counters)

    def finish(x, shift, scale, weight, bias, T, H, W, *rest) -> None:
        counters = final_layer(sm, x, shift, scale, weight, bias, (T, H, W), *rest, **options)
        observe("final_layer_fwd_kernel", counters)

    def call(op: str, impl: str):
        return kernels[op] if impl == "cuda" and op in kernels else original_call(op, impl)

    def why_not(op: str, impl: str, device: str, dtype: torch.dtype, grad: bool) -> str | None:
        if impl == "cuda" and f"{op}_{'bwd' if grad else 'fwd'}" in kernels:
            return None
        return original_why_not(op, impl, device, dtype, grad)

    kernels = {
        "norm_modulate_fwd": modulate, "norm_modulate_bwd": modulate_back,
        "spacetime_attention_fwd": kernels_cuda.spacetime_attention_fwd,
        "spacetime_attention_bwd": kernels_cuda.spacetime_attention_bwd,
        "qk_norm_rope_fwd": turn, "qk_norm_rope_bwd": turn_back,
        "causal_conv3d_fwd": convolve, "patch_embed3d_fwd": embed,
        "upsample_conv3d_fwd": convolve_upsampled, "norm_silu_fwd": normalise, "final_layer_fwd": finish,
        "gate_residual_fwd": gate_on, "gate_residual_norm_modulate_fwd": gate_and_modulate,
        "gate_residual_bwd": gate_back, "gate_residual_norm_modulate_bwd": gate_and_modulate_back,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (_library, "call", call), (_dispatch, "_why_not", why_not),
            (attention_config, "capability", lambda device: sm), (conv_config, "capability", lambda device: sm),
            (kernels_cuda, "launch", attend), (kernels_cuda, "launch_rows", attend_rows),
            (kernels_cuda, "launch_backward", attend_back), (patchify_config, "capability", lambda device: sm),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield
