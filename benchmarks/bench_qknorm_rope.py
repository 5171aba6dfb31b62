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
    if model.rope or not model.qk_norm:
        split = tuple(model.rope or reference.default_split(E))
        tables = reference.rotary_freqs(shape.grid, split, model.theta, (0, 0, 0), inputs["q"].device)
        _TABLES[shape.grid, split] = tuple(t.float() for t in tables)
        inputs |= {"grid": shape.grid, "split": split, "theta": model.theta, "text_len": size[1] - shape.tokens}
    return inputs


def _reference(*, text_len: int = 0, **inputs: Any) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rope(**inputs)


def _normed(x: Tensor, weight: Tensor | None, norm: str | None, across: str) -> Tensor:
    if norm is None:
        return x
    flat = x.flatten(2) if across == "width" else x
    width = flat.shape[-1:]
    flat = F.layer_norm(flat, width, weight, None, 1e-6) if norm == "layer" else F.rms_norm(flat, width, weight, 1e-6)
    return flat.view(x.shape)


def _eager(
    q, k, *, norm, across, q_weight=None, k_weight=None, grid=None, split=None, theta=None, text_len=0
) -> tuple[Tensor, Tensor]:
    """What Wan does in diffusers: a norm of the projection, then even and odd channels turn by tables in fp32."""
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = _normed(x, weight, norm, across)
        if grid is not None:
            cos, sin = (t[:, None] for t in _TABLES[grid, split])
            tokens = cos.shape[0]
            a, b = x[:, :tokens].unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)
            x = turned if tokens == x.shape[1] else torch.cat((turned, x[:, tokens:]), 1)
        results.append(x)
    return results[0], results[1]


def _diffusers(inputs: Mapping[str, Any], mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """HunyuanVideo's way: `apply_rotary_emb` of diffusers, in fp32 and rounded, over the tokens of the video."""
    module = peers._import("diffusers.models.embeddings", "diffusers")
    if "grid" not in inputs:
        raise peers.Missing("diffusers' apply_rotary_emb has nothing to do: this model has no rotation of this kind")
    freqs = tuple(t.repeat_interleave(2, 1) for t in _TABLES[inputs["grid"], inputs["split"]])

    def qk_norm_rope(q, k, *, norm, across, q_weight=None, k_weight=None, text_len=0, **rotation):
        results = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            x = _normed(x, weight, norm, across)
            tokens = x.shape[1] - text_len
            turned = module.apply_rotary_emb(x[:, :tokens], freqs, sequence_dim=1)
            results.append(torch.cat((turned, x[:, tokens:]), 1) if text_len else turned)
        return tuple(results)

    return qk_norm_rope


def _flops(shape: Shape, mode: str) -> int:
    """Per element of q and k: a norm 4 forward and 9 backward, its weight 1 and 2, a rotation 3 and 3."""
    model, elements = shape.model, 2 * math.prod(_size(shape))
    norm = {"fwd": 5, "bwd": 11}[mode] if model.qk_norm else 0
    rotation = 3 if model.rope or not model.qk_norm else 0
    return elements * (norm + rotation)


BENCHMARKS = [
    Benchmark(
        "qk_norm_rope",
        inputs=_inputs,
        reference=_reference,
        eager=_eager,
        peers={"diffusers": _diffusers},
        differentiable=("q", "k", "q_weight", "k_weight"),
        backward_reads=("q", "k", "q_weight", "k_weight"),
        backward_writes=("q", "k", "q_weight", "k_weight"),
        flops=_flops,
    ),
]
