"""QK-norm and rotary embedding of a self-attention's queries and keys, as public models have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.qknorm_rope import reference

from . import peers
from .shapes import Shape
from .suite import Benchmark, Inputs

# cos and sin `[tokens, E/2]` in fp32 by (grid, split): a model computes them once per clip and keeps them.
_TABLES: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Tensor, Tensor]] = {}


def _size(shape: Shape) -> tuple[int, int, int, int]:
    """`[B, S, H, E]`: text that joins the self-attention is normalised with the video, and not rotated."""
    text = shape.model.text if shape.model.joint else 0
    return shape.batch, shape.tokens + text, shape.model.heads, shape.model.head_width


def _inputs(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    """A model that has neither a norm nor a rotation of this kind (Latte) is measured with Wan's rotation."""
    model, size = shape.model, _size(shape)
    H, E = size[2:]
    inputs: Inputs = {"q": draw(*size), "k": draw(*size), "norm": model.qk_norm, "across": model.across}
    if model.qk_norm:
        width = H * E if model.across == "width" else E
        inputs |= {"q_weight": draw(width), "k_weight": draw(width)}
    if model.qk_norm == "layer":  # CogVideoX: an affine LayerNorm, and text that comes first
        inputs |= {"q_bias": draw(width), "k_bias": draw(width)}
    if model.rope or not model.qk_norm:
        split = tuple(model.rope or reference.default_split(E))
        tables = reference.rotary_freqs(shape.grid, split, model.theta, (0, 0, 0), inputs["q"].device)
        _TABLES[shape.grid, split] = tuple(t.float() for t in tables)
        inputs |= {"grid": shape.grid, "split": split, "theta": model.theta, "text_len": size[1] - shape.tokens}
        inputs["text_at"] = "start" if model.qk_norm == "layer" else "end"
    elif E % 2 == 0:  # LTX-2, Mochi: angles of each head, as LTX-2 keeps them: [B, H, S, E/2]
        angle = draw(size[0], H, shape.tokens, E // 2).float().transpose(1, 2)
        inputs |= {"freqs": (angle.cos(), angle.sin()), "text_len": size[1] - shape.tokens, "interleaved": False}
    return inputs


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str | None, across: str) -> Tensor:
    if norm is None:
        return x
    flat = x.flatten(2) if across == "width" else x
    width = flat.shape[-1:]
    flat = F.layer_norm(flat, width, weight, bias, 1e-6) if norm == "layer" else F.rms_norm(flat, width, weight, 1e-6)
    return flat.view(x.shape)


def _eager(
    q, k, *, norm, across, q_weight=None, k_weight=None, q_bias=None, k_bias=None, grid=None, split=None, theta=None,
    freqs=None, interleaved=True, text_len=0, text_at="end",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What Wan does in diffusers: a norm of the projection, then even and odd channels turn by tables in fp32; and
    LTX-2: the halves of each head by tables of its own."""
    results = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        x = _normed(x, weight, bias, norm, across)
        if grid is not None or freqs is not None:
            cos, sin = freqs or (t[:, None] for t in _TABLES[grid, split])
            before, x, after = _apart(x, text_len, text_at)
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
            pair = a * cos - b * sin, a * sin + b * cos
            turned = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).type_as(x)
            x = torch.cat((before, turned, after), 1) if text_len else turned
        results.append(x)
    return results[0], results[1]


def _apart(x: Tensor, text_len: int, text_at: str) -> tuple[Tensor, Tensor, Tensor]:
    """The text before the video, the video, the text after it."""
    sizes = (text_len, x.shape[1] - text_len, 0) if text_at == "start" else (0, x.shape[1] - text_len, text_len)
    return x.split(sizes, 1)


def _diffusers(inputs: Mapping[str, Any], mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """HunyuanVideo's way: `apply_rotary_emb` of diffusers, in fp32 and rounded, over the tokens of the video."""
    module = peers._import("diffusers.models.embeddings", "diffusers")
    if "grid" not in inputs:
        raise peers.Missing("diffusers' apply_rotary_emb has nothing to do: this model has no rotation of this kind")
    freqs = tuple(t.repeat_interleave(2, 1) for t in _TABLES[inputs["grid"], inputs["split"]])

    def qk_norm_rope(
        q, k, *, norm, across, q_weight=None, k_weight=None, q_bias=None, k_bias=None, text_len=0, text_at="end", **_
    ):
        results = []
        for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
            before, video, after = _apart(_normed(x, weight, bias, norm, across), text_len, text_at)
            turned = module.apply_rotary_emb(video, freqs, sequence_dim=1)
            results.append(torch.cat((before, turned, after), 1) if text_len else turned)
        return tuple(results)

    return qk_norm_rope


def _eager_sums(q: Tensor, k: Tensor) -> Tensor:
    """As a norm over tensor-parallel ranks begins: squares in the dtype, added up in fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.cat([x.square().sum((2, 3), dtype=wide) for x in (q, k)], 1)


def _flops(shape: Shape, mode: str) -> int:
    """Per element of q and k: a norm 4 forward and 9 backward, its weight 1 and 2, a bias 1, a rotation 3."""
    model, elements = shape.model, 2 * math.prod(_size(shape))
    norm = ({"fwd": 5, "bwd": 11}[mode] if model.qk_norm else 0) + (model.qk_norm == "layer")
    rotation = 3 if model.rope or not model.qk_norm or model.head_width % 2 == 0 else 0
    return elements * (norm + rotation)


BENCHMARKS = [
    Benchmark(
        "qk_norm_rope",
        inputs=_inputs,
        reference=reference.qk_norm_rope,
        eager=_eager,
        peers={"diffusers": _diffusers},
        differentiable=("q", "k", "q_weight", "k_weight", "q_bias", "k_bias"),
        backward_reads=("q", "k", "q_weight", "k_weight"),
        backward_writes=("q", "k", "q_weight", "k_weight", "q_bias", "k_bias"),
        flops=_flops,
        outputs=2,
    ),
    Benchmark(
        "qk_norm_stats",
        inputs=lambda shape, dtype, draw: {name: draw(*_size(shape)) for name in "qk"},
        reference=reference.qk_norm_stats,
        eager=_eager_sums,
        differentiable=("q", "k"),
        backward_reads=("q", "k"),
        backward_writes=("q", "k"),
        flops=lambda shape, mode: {"fwd": 2, "bwd": 1}[mode] * 2 * math.prod(_size(shape)),
        terms=lambda inputs: math.prod(inputs["q"].shape[2:]),
    ),
]
