"""QK-norm and 3D rotary embedding in plain PyTorch: the specification of `qk_norm_rope` and `qk_norm_stats`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_freqs(
    grid: Sequence[int], split: Sequence[int], theta: float, origin: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, `[T*H*W, sum(split)]` in fp64, of `(x + origin) * theta ** (-j / n)` for pair j of an axis' n."""
    tables = []
    for axis, (size, pairs) in enumerate(zip(grid, split, strict=True)):
        position = torch.arange(size, dtype=torch.float64, device=device) + origin[axis]
        exponent = torch.arange(pairs, dtype=torch.float64, device=device) / max(pairs, 1)
        angle = torch.outer(position, theta**-exponent)
        shape = [2, 1, 1, 1, pairs]
        shape[1 + axis] = size
        tables.append(torch.stack((angle.cos(), angle.sin())).view(shape).expand(2, *grid, pairs))
    cos, sin = torch.cat(tables, dim=-1).flatten(1, 3)
    return cos, sin


def qk_norm_stats(q: Tensor, k: Tensor) -> Tensor:
    """`[B, Sq + Sk]`: of each token of q, then of k, the sum of squares over its heads."""
    return torch.cat([wide(x).square().sum((-2, -1)) for x in (q, k)], dim=1)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str | None, across: str, eps: float,
    stats: Tensor | None = None, width: int = 0,
) -> Tensor:  # fmt: skip
    """Norm of `x [B,S,H,E]` over E (`across="head"`) or over H*E (`across="width"`); of an RMS norm the sums of squares
    over `width` channels, of which x has some, may be given: `stats [B,S]`."""
    if norm is None:
        return x
    dims = (-1,) if across == "head" else (-2, -1)
    if norm == "layer":
        x = x - x.mean(dims, keepdim=True)
        x = x - x.mean(dims, keepdim=True)  # of values far from zero rounding leaves more of the mean than their spread
    squares = x.square().mean(dims, keepdim=True) if stats is None else (stats / width)[..., None, None]
    x = x * torch.rsqrt(squares + eps)
    weight, bias = (t if t is None or across == "head" else t.view(x.shape[-2:]) for t in (weight, bias))
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first: int = 0) -> Tensor:
    """Rotates the tokens of x from `first` on that cos `[tokens, pairs]`, `[tokens, H, pairs]` or `[B, tokens, H,
    pairs]` has rows for, where B and H may be 1. Of each head, its first `2 * pairs` channels.
    """
    cos, sin = (t[:, None].to(x.dtype) if t.ndim == 2 else t.to(x.dtype) for t in (cos, sin))
    tokens, _, pairs = cos.shape[-3:]
    before, x, after = x[:, :first], x[:, first : first + tokens], x[:, first + tokens :]
    turned = x[..., : 2 * pairs]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    turned = torch.cat((turned, x[..., 2 * pairs :]), dim=-1)
    return torch.cat((before, turned, after), dim=1)


def default_split(rotary_dim: int) -> tuple[int, int, int]:
    """Rotary pairs of (t, h, w) in Wan's convention: 22, 21, 21 for a head width of 128."""
    side = rotary_dim // 6
    return rotary_dim // 2 - 2 * side, side, side


def widths(width: int, q_heads: int, k_heads: int) -> tuple[int, int]:
    """The channels of all ranks: of q, and of k, in the proportion of the heads that are here."""
    return width, width if q_heads == k_heads else width * k_heads // max(q_heads, 1)


def qk_norm_rope(
    q, k, *, q_weight=None, k_weight=None, q_bias=None, k_bias=None, norm="rms", across="head", stats=None, width=None,
    grid=None, tokens=None, freqs=None, k_freqs=None, split=None, theta=1e4, interleaved=True, rotary_dim=None,
    origin=(0, 0, 0), text_len=0, text_at="end", eps=1e-6, rounding="once",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """At the end, `text_len` is implied: the tokens that `grid` or `freqs` do not cover are not rotated."""
    if grid is not None:
        split = split or default_split(rotary_dim or q.shape[-1])
        freqs = rotary_freqs(grid, split, theta, origin, q.device)
        freqs = freqs if tokens is None else tuple(t[slice(*tokens)] for t in freqs)
    of_q, of_k = (None, None) if stats is None else stats.split((q.shape[1], k.shape[1]), dim=1)
    q_width, k_width = widths(width or 0, q.shape[2], k.shape[2])
    first = text_len if text_at == "start" else 0
    results = []
    for x, weight, bias, turn, *whole in (
        (q, q_weight, q_bias, freqs, of_q, q_width), (k, k_weight, k_bias, k_freqs or freqs, of_k, k_width)
    ):  # fmt: skip
        y = normalise(wide(x), weight, bias, norm, across, eps, *whole)
        y = y.to(x.dtype).to(y.dtype) if rounding == "host" else y
        y = y if turn is None else rotate(y, *turn, interleaved, first)
        results.append(y.to(x.dtype))
    return results[0], results[1]
