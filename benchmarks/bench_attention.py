"""Self-attention of video transformers: every token, tile windows, exact and dilated windows, causal frames, space and
time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import attention_plan
from sora_kernels.attention import attention_backward, attention_forward, config, reference
from sora_kernels.attention.mode import resolve

from . import peers
from .shapes import Shape
from .suite import Benchmark, Inputs

MASK_BYTES = 1 << 28  # of the boolean mask that plain PyTorch is given at a time
_MASKS: dict[tuple, list[Tensor | None]] = {}  # of the last two sizes: a model makes them once and keeps them
STA_GRIDS = ((30, 48, 80), (36, 48, 48), (18, 48, 80))
CHECKED_TOKENS = 2048  # an fp64 oracle of all tokens of a real clip would take minutes


def _settings(variant: str, shape: Shape) -> dict[str, Any]:
    """Tiles of 6 x 8 x 8 and windows of 3 x 3 x 3 of them are those of arXiv 2502.04507; a small clip has smaller."""
    T, H, W = shape.grid
    tile = (6, 8, 8) if shape.tokens > 16384 else (2, 4, 4)
    modes: dict[str, dict[str, Any]] = {
        "": {},
        "tiles": {"window": tuple(3 * side for side in tile), "stride": tile},
        "window": {"window": tuple(n // 2 | 1 for n in shape.grid)},
        "dilated": {"window": (T, *(max(1, n // 4) for n in (H, W))), "dilation": (1, 2, 2)},
        "causal": {"causal": "frame"},
        "space": {"window": (1, H, W)},
        "time": {"window": (T, 1, 1)},
    }
    if not variant:
        return {}
    text = {"text_len": shape.model.text} if shape.model.joint else {}
    return modes[variant] | {"grid": shape.grid} | text


def _inputs(variant: str, shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    model = shape.model
    text = model.text if model.joint else 0
    size = (shape.batch, shape.tokens + text, model.heads, model.head_width)
    mode = _settings(variant, shape)
    inputs = {name: draw(*size) for name in "qkv"}
    while len(_MASKS) > 1:
        del _MASKS[next(iter(_MASKS))]
    _MASKS[size[1], tuple(mode.items())] = _masks(size[1], _rows(size[1], mode), mode, inputs["q"].device)
    return inputs | mode


def _checked(shape: Shape) -> Shape:
    """The clip cropped, alike on every axis, with two heads and little text."""
    if shape.tokens <= CHECKED_TOKENS:
        return shape
    factor = (CHECKED_TOKENS / shape.tokens) ** (1 / 3)
    grid = tuple(max(1, math.floor(n * factor)) for n in shape.grid)
    model = dataclasses.replace(shape.model, heads=2, text=min(shape.model.text, 77))
    return dataclasses.replace(shape, grid=grid, model=model, batch=1)


def _reference(q: Tensor, k: Tensor, v: Tensor, **mode: Any) -> Tensor:
    """Differentiable, for the checked sizes; the library's own reference has a backward of its own."""
    (mask,) = _masks(q.shape[1], q.shape[1], mode, q.device)
    scores = q.shape[-1] ** -0.5 * q.transpose(1, 2) @ k.transpose(1, 2).mT
    weights, _ = reference.softmax(scores, mask)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def _rows(tokens: int, mode: Mapping[str, Any]) -> int:
    """Queries whose mask is made at a time."""
    return max(1, MASK_BYTES // tokens) if mode else tokens


def _form(tokens: int, mode: Mapping[str, Any]) -> tuple:
    defaults = dict(grid=None, grids=None, stride=1, dilation=1, window=None, causal=None)
    return resolve("", tokens, tokens, **(defaults | dict(sink=0, text_len=0, text_at="end") | mode))


def _masks(tokens: int, rows: int, mode: Mapping[str, Any], device: torch.device) -> list[Tensor | None]:
    """What chunks of so many queries see, `[rows, tokens]`; None for everything."""
    if not mode:
        return [None]
    grids, window, stride, *rules, text, first = _form(tokens, mode)
    if not grids:  # the window is as large as the clip
        return [None] * math.ceil(tokens / rows)
    table = reference.token_table(tokens, [tuple(grids)], text, first, device)
    return [reference.visible(part, table, window or (), stride, *rules) for part in table.split(rows)]


def _eager(q: Tensor, k: Tensor, v: Tensor, **mode: Any) -> Tensor:
    """Scaled dot-product attention with a boolean mask: what PyTorch offers for any of these modes."""
    tokens = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = zip(q.split(_rows(tokens, mode), 2), _MASKS[tokens, tuple(mode.items())], strict=True)
    return torch.cat([F.scaled_dot_product_attention(part, k, v, mask) for part, mask in parts], 2).transpose(1, 2)


def _dense(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """Attention of all to all, which a window replaces: another result, and the time to beat."""
    return lambda q, k, v, **_: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _backend(name: str) -> Callable[[Mapping[str, Any], str], Callable[..., Tensor]]:
    """Dense attention by one of PyTorch's own kernels."""

    def load(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if inputs["q"].device.type != "cuda":
            raise peers.Missing(f"PyTorch's {name} attention is chosen by name on a CUDA device only")
        backend, dense = getattr(SDPBackend, name.upper()), _dense(inputs, mode)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return dense(q, k, v)

        return attention

    return load


def _mask_function(tokens: int, mode: Mapping[str, Any], device: torch.device) -> Callable[..., Tensor]:
    """What FlexAttention asks: does query i see key j?"""
    grids, *rules, text, first = _form(tokens, mode)
    table = reference.token_table(tokens, [tuple(grids)] if grids else [], text, first, device)
    lo, hi, kept = reference.reach(table, *rules)

    def seen(b, h, i, j):
        clip = table[j, 0] == table[i, 0]
        box = clip
        for axis in range(1, 4):
            box = box & (table[j, axis] >= lo[i, axis]) & (table[j, axis] < hi[i, axis])
            box = box & ((table[j, axis] - table[i, axis]) % rules[2][axis - 1] == 0)
        return box | (table[i, 0] < 0) | (table[j, 0] < 0) | (clip & (table[j, 1] < kept[i]))

    return seen


def _with_boxes() -> contextlib.ExitStack:
    """A context in which every tile asks for descriptors."""
    stack = contextlib.ExitStack()
    for name in ("forward", "backward_queries", "backward_keys"):
        tile = getattr(config, name)
        boxed = functools.partial(lambda tile, *a: dataclasses.replace(tile(*a), descriptors=True), tile)
        stack.enter_context(mock.patch.object(config, name, boxed))
    return stack


class _Boxed(torch.autograd.Function):
    """Our Triton kernels with visited tiles loaded through descriptors, in the backward too."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mode: dict[str, Any]) -> Tensor:
        with _with_boxes():
            out, lse = attention_forward(q, k, v, **mode, impl="triton")
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mode = mode
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        with _with_boxes():
            return *attention_backward(dout, *ctx.saved_tensors, **ctx.mode, impl="triton"), None


def _boxes(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """Beside the same kernels that load by address."""
    if inputs["q"].device.type != "cuda" or torch.cuda.get_device_capability(inputs["q"].device)[0] < 9:
        raise peers.Missing("descriptors need a GPU with a TMA: Hopper or later")
    return lambda q, k, v, **mode: _Boxed.apply(q, k, v, mode)


def _flex(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """FlexAttention with a block mask made once, compiled as its documentation says."""
    if inputs["q"].device.type != "cuda":
        raise peers.Missing("FlexAttention trains on a CUDA device only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, settings = inputs["q"].shape[1], {n: v for n, v in inputs.items() if n not in ("q", "k", "v")}
    seen = _mask_function(tokens, settings, inputs["q"].device)
    blocks = create_block_mask(seen, None, None, tokens, tokens, device=inputs["q"].device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2)

    return attention


def _flash4(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    module = peers._import("flash_attn.cute", "flash-attn-4")
    if inputs["q"].dtype not in (torch.bfloat16, torch.float16):
        raise peers.Missing("flash-attn-4 takes bf16 and fp16 only")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = module.flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attention


def _flashinfer(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    module = peers._import("flashinfer", "flashinfer-python")
    if mode == "bwd":
        raise peers.Missing("flashinfer serves models and has no backward")
    if inputs["q"].device.type != "cuda" or inputs["q"].dtype == torch.float32:
        raise peers.Missing("flashinfer takes bf16 and fp16 on a CUDA device only")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([module.single_prefill_with_kv_cache(*clip) for clip in zip(q, k, v, strict=True)])

    return attention


def _fastvideo(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """FastVideo's sliding tiles. Its tokens lie tile by tile: two permutations are a part of it, as in its models."""
    module = peers._import("fastvideo_kernel", "fastvideo-kernel")
    (T, H, W), (t, h, w) = inputs["grid"], inputs["stride"]
    if (t, h, w) != (6, 8, 8) or (T, H, W) not in STA_GRIDS:
        grids = ", ".join("x".join(map(str, grid)) for grid in STA_GRIDS)
        raise peers.Missing(f"fastvideo-kernel's tiles are of 6x8x8 tokens, in clips of {grids}")
    if mode == "bwd":
        raise peers.Missing("fastvideo-kernel's sliding tiles have no backward")
    text = inputs.get("text_len", 0)
    windows = [[side // n for side, n in zip(inputs["window"], (t, h, w), strict=True)]] * inputs["q"].shape[2]

    def tiled(x: Tensor) -> Tensor:
        video = x[:, : T * H * W].unflatten(1, (T // t, t, H // h, h, W // w, w)).permute(0, 1, 3, 5, 2, 4, 6, 7, 8)
        return torch.cat([video.flatten(1, 6), x[:, T * H * W :]], 1).transpose(1, 2).contiguous()

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        out = module.sliding_tile_attention(*map(tiled, (q, k, v)), windows, text, text > 0, f"{T}x{H}x{W}")
        out = out.transpose(1, 2)
        video = out[:, : T * H * W].unflatten(1, (T // t, H // h, W // w, t, h, w)).permute(0, 1, 4, 2, 5, 3, 6, 7, 8)
        return torch.cat([video.flatten(1, 6), out[:, T * H * W :]], 1)

    return attention


def _natten(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    module = peers._import("natten", "natten")
    if inputs.get("text_len") or "causal" in inputs:
        raise peers.Missing("natten's windows have no text tokens and no causal frames with whole rows")
    window = tuple(min(w, n) for w, n in zip(inputs["window"], inputs["grid"], strict=True))
    rules = dict(stride=inputs.get("stride", (1, 1, 1)), dilation=inputs.get("dilation", (1, 1, 1)))

    def attention(q: Tensor, k: Tensor, v: Tensor, *, grid, **_: Any) -> Tensor:
        q, k, v = (x.unflatten(1, grid) for x in (q, k, v))
        return module.na3d(q, k, v, kernel_size=window, **rules).flatten(1, 3)

    return attention


@functools.lru_cache(maxsize=64)
def _pairs(tokens: int, mode: tuple) -> int:
    """(query, key) pairs that are seen: the useful work."""
    if not mode:
        return tokens * tokens
    return int(attention_plan(tokens, **dict(mode), tile=4096, device="cpu").visible_pairs())


def _flops(variant: str, shape: Shape, mode: str) -> int:
    """Two products forward, five backward, of the pairs that are seen."""
    text = shape.model.text if shape.model.joint else 0
    pairs = _pairs(shape.tokens + text, tuple(_settings(variant, shape).items()))
    return 2 * {"fwd": 2, "bwd": 5}[mode] * shape.batch * shape.model.heads * shape.model.head_width * pairs


_BACKENDS = {"flash": "flash_attention", "efficient": "efficient_attention", "torch-cudnn": "cudnn_attention"}
_TORCH = {name: _backend(backend) for name, backend in _BACKENDS.items()}
_DENSE = {"boxes": _boxes} | _TORCH | {"flash-attn-4": _flash4, "flashinfer": _flashinfer}
_SPARSE = {"boxes": _boxes, "dense": _dense, "flex": _flex}
_TILES = _SPARSE | {"natten": _natten, "fastvideo": _fastvideo}
_PEERS = {"": _DENSE, "tiles": _TILES, "window": _SPARSE | {"natten": _natten}}
_PEERS["dilated"] = {"dense": _dense, "flex": _flex, "natten": _natten}

BENCHMARKS = [
    Benchmark(
        "spacetime_attention",
        variant=variant,
        inputs=functools.partial(_inputs, variant),
        reference=_reference,
        eager=_eager,
        peers=_PEERS.get(variant, _SPARSE),
        unchecked=("dense", "fastvideo"),  # fastvideo takes no clip as small as those that are checked
        checked=_checked,
        differentiable=("q", "k", "v"),
        backward_reads=("q", "k", "v"),
        backward_writes=("q", "k", "v"),
        flops=functools.partial(_flops, variant),
    )
    for variant in ("", "tiles", "window", "dilated", "causal", "space", "time")
]


def _gated(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    size = (shape.batch, shape.tokens, shape.model.heads)
    return {"x": draw(*size, shape.model.head_width), "gate": draw(*size)}


def _eager_gate(x: Tensor, gate: Tensor) -> Tensor:
    """As LTX-2 does in diffusers."""
    return x * (2.0 * torch.sigmoid(gate)).unsqueeze(-1)


def _gate_flops(shape: Shape, mode: str) -> int:
    return {"fwd": 1, "bwd": 3}[mode] * shape.batch * shape.tokens * shape.model.heads * shape.model.head_width


BENCHMARKS.append(
    Benchmark(
        "gate_heads",
        inputs=_gated,
        reference=reference.gate_heads,
        eager=_eager_gate,
        differentiable=("x", "gate"),
        backward_reads=("x", "gate"),
        backward_writes=("x", "gate"),
        flops=_gate_flops,
    )
)
