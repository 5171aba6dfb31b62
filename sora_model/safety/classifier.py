"""Was a clip made by a model of ours? Judged by its looks alone, where no record and no mark is left.

    mine = classifier.fit(made, others)               # clips of a checkpoint, and others of the same kind
    mine.judge(frames).answer                         # of uint8 [T,H,W,3]: "likely", "unclear" or "unlikely"

A logistic regression on 33 numbers of what a codec and a VAE leave of a clip's finest detail, in space (the spectrum of
what a blur takes away, Durall et al. 2020, arXiv:2003.01826) and in time (first and second differences of frames, as in
D3, arXiv:2508.00701). It knows clips of the checkpoint it was fitted to, and those that look alike; its answer is a
hint, and never "real". None is shipped: `python -m benchmarks.fit_classifier` fits one and measures it, and
docs/safety.md has what it found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import files
from .watermark import LUMA

ANSWERS = LIKELY, UNCLEAR, UNLIKELY = "likely", "unclear", "unlikely"
FRAMES, WINDOW, SIDE = 33, 8, 32  # frames looked at; at least so many; at least so many pixels a side
NUMBERS = 33

_RINGS = 16
_LEAST = 1e-8


@dataclass(frozen=True)
class Judgement:
    """`answer`, and the `score` behind it: the logarithm of the odds that the clip was made, before any prior."""

    answer: str
    score: float


@dataclass(frozen=True)
class Classifier:
    """`score = weights · z + bias` of z = (features - mean) / std; "likely" from `high` on, "unlikely" below `low`.

    `z · inverse · z` is how far a clip lies from those that it was fitted to, of which none lay beyond `far`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    low: float
    high: float
    inverse: tuple[tuple[float, ...], ...]
    far: float

    def judge(self, frames: np.ndarray) -> Judgement:
        """Of uint8 `[T, H, W, 3]`."""
        return self.judge_features(features(frames))

    def judge_features(self, found: np.ndarray) -> Judgement:
        """Of what `features` gave; twice as far from the clips of the fit as any of them is "unclear"."""
        z = (found - np.array(self.mean)) / np.array(self.std)
        score = float(z @ np.array(self.weights) + self.bias)
        far = z @ np.array(self.inverse) @ z > 2 * self.far
        return Judgement(UNCLEAR, score) if far else answered(score, self.low, self.high)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON."""
        files.write_bytes(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """What `save` wrote. Raises ValueError for anything else."""
        try:
            values = json.loads(Path(path).read_text("utf-8"))
            inverse = tuple(map(tuple, values.pop("inverse")))
            read = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, inverse=inverse)
            held = [np.asarray(column, float).shape for column in (read.mean, read.std, read.weights, read.inverse)]
            numbers = [*read.mean, *read.std, *read.weights, *sum(read.inverse, ()), read.bias, read.low, read.high]
            if held != 3 * [(NUMBERS,)] + [(NUMBERS, NUMBERS)] or not np.isfinite([*numbers, read.far]).all():
                raise ValueError(f"it must hold {NUMBERS} finite numbers of each kind")
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is no classifier that `save` wrote: {error}") from error
        return read


def check_frames(frames: np.ndarray) -> None:
    """Raises ValueError for what is no uint8 `[T, H, W, 3]` of at least 8 x 32 x 32."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3]; got {frames.dtype} {list(frames.shape)}")
    if len(frames) < WINDOW or min(frames.shape[1:3]) < SIDE:
        raise ValueError(
            f"frames must be at least {WINDOW} of {SIDE}x{SIDE} to be judged by their looks; got {len(frames)} of "
            f"{frames.shape[2]}x{frames.shape[1]}"
        )


def kept_apart(made: Sequence, others: Sequence, held: float) -> list[tuple[Any, Any]]:
    """(to fit, to draw the lines by) of both kinds, of which `held` is the second's share."""
    if min(len(made), len(others)) < 8:
        raise ValueError(f"a classifier takes at least 8 clips of both kinds; got {len(made)} and {len(others)}")
    cuts = (round(len(clips) * (1 - held)) for clips in (made, others))
    return [(clips[:cut], clips[cut:]) for clips, cut in zip((made, others), cuts, strict=True)]


def lines(made: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """(low, high) of scores of clips that were kept apart: 1 % of the others reach `high`, 5 % of those that were made
    lie below `low`; the same line for both where they cross."""
    passes, misses = float(np.quantile(others, 0.99)), float(np.quantile(made, 0.05))
    return min(passes, misses), max(passes, misses)


def answered(score: float, low: float, high: float) -> Judgement:
    return Judgement(LIKELY if score >= high else UNLIKELY if score < low else UNCLEAR, score)


@torch.no_grad()
def features(frames: np.ndarray) -> np.ndarray:
    """33 numbers of the first `FRAMES` frames of uint8 `[T, H, W, 3]`, of any size and length from 8 x 32 x 32 on."""
    check_frames(frames)
    rgb = torch.from_numpy(np.ascontiguousarray(frames[:FRAMES])).double() / 255
    luma = rgb @ torch.tensor(LUMA, dtype=torch.float64)
    chroma = rgb[..., ::2] - luma[..., None]  # red and blue
    detail = fine_detail(luma)
    found = [_radial(detail), _temporal(detail), _steadiness(detail)]
    for order in (1, 2):
        found.append(_moments(luma.diff(n=order, dim=0)))
    found.append((torch.stack([fine_detail(chroma[..., i]).square().mean() for i in (0, 1)]) + _LEAST).log())
    found.append((chroma.mean((1, 2)).std(0) + _LEAST).log())
    return torch.cat(found).numpy()


def fine_detail(x: Tensor) -> Tensor:
    """What a binomial blur takes away of `[T, H, W]`."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype) / 16
    padded = F.pad(x[:, None], (2, 2, 2, 2), mode="reflect")
    return x - F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[:, 0]


def _radial(detail: Tensor) -> Tensor:
    """log of the mean power in rings of equal width, up to half a cycle a pixel."""
    height, width = detail.shape[1:]
    window = torch.hann_window(height, dtype=detail.dtype)[:, None] * torch.hann_window(width, dtype=detail.dtype)
    power = (torch.fft.rfft2(detail * window).abs().square() / window.square().sum()).mean(0)
    fy, fx = torch.fft.fftfreq(height, dtype=detail.dtype), torch.fft.rfftfreq(width, dtype=detail.dtype)
    ring = (torch.hypot(fy[:, None], fx[None]) * 2 * _RINGS).long()
    sums = [power[ring == i].mean() for i in range(_RINGS)]
    return (torch.stack(sums) + _LEAST).log()


def _temporal(detail: Tensor) -> Tensor:
    """log of the power at 1 to 4 periods in 8 frames, over that of what stands still."""
    parts = detail.unfold(0, WINDOW, WINDOW // 2)
    power = torch.fft.rfft(parts, dim=-1).abs().square().mean((0, 1, 2)) + _LEAST
    return (power[1:] / power[0]).log()


def _steadiness(detail: Tensor) -> Tensor:
    """The mean correlation of a frame's detail with the next one's."""
    before, after = detail[:-1].flatten(1), detail[1:].flatten(1)
    norms = before.norm(dim=1) * after.norm(dim=1) + _LEAST
    return ((before * after).sum(1) / norms).mean()[None]


def _moments(change: Tensor) -> Tensor:
    """Of differences `[T, H, W]`: log of the mean size, the deviation and the kurtosis, and the spread over frames."""
    size, variance = change.abs().mean((1, 2)), change.square().mean() + _LEAST
    kurtosis = (change**4).mean() / variance.square() + _LEAST
    spread = size.std() / (size.mean() + _LEAST**0.5)
    return torch.stack([(size.mean() + _LEAST).log(), variance.log(), kurtosis.log(), spread])


def fit(
    made: Iterable[np.ndarray], others: Iterable[np.ndarray], *, held: float = 0.25, decay: float = 1e-3
) -> Classifier:
    """The classifier between clips that a checkpoint made and others, which should have gone through the same codecs.

    `held`, a share of both, is kept apart to draw the lines by: "likely" passes 1 % of the others, "unlikely" 5 % of
    what was made; what lies between is "unclear". `decay` weighs the squares of the weights. Both kinds weigh alike.
    """
    return fit_features(
        *(np.stack([features(clip) for clip in clips]) for clips in (made, others)), held=held, decay=decay
    )


def fit_features(made: np.ndarray, others: np.ndarray, *, held: float = 0.25, decay: float = 1e-3) -> Classifier:
    """`fit` on what `features` gave of the clips, `[clips, 33]` each."""
    parts = kept_apart(made, others, held)
    taught = np.concatenate([part[0] for part in parts])
    mean, std = taught.mean(0), taught.std(0) + 1e-3
    x = torch.from_numpy((taught - mean) / std)
    y = torch.cat([torch.full((len(part[0]),), kind, dtype=x.dtype) for kind, part in zip((1, 0), parts, strict=True)])
    share = torch.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    weights, bias = torch.zeros(x.shape[1], dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    both = [weights.requires_grad_(), bias.requires_grad_()]
    optimiser = torch.optim.LBFGS(both, max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        error = F.binary_cross_entropy_with_logits(x @ weights + bias, y, weight=share, reduction="sum")
        value = error + decay * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weights, bias = weights.detach().numpy(), bias.item()
    kept_made, kept_others = ((part[1] - mean) / std @ weights + bias for part in parts)
    low, high = lines(kept_made, kept_others)
    inverse = np.linalg.inv(np.cov(x.numpy(), rowvar=False) + 0.01 * np.eye(len(mean)))
    far = float(np.einsum("ni,ij,nj->n", x, inverse, x).max())
    columns = (tuple(map(float, column)) for column in (mean, std, weights))
    rows = tuple(tuple(map(float, row)) for row in inverse)
    return Classifier(*columns, bias, low, high, rows, far)
