"""The other classifier of a checkpoint's own clips: a small 3D convolutional network, where `classifier` has numbers.

    mine = convnet.fit(made, others)                  # clips of a checkpoint, and others of the same kind
    mine.judge(frames).answer                         # of uint8 [T,H,W,3]: "likely", "unclear" or "unlikely"

It sees what a blur takes away of each colour, 8 frames at a time, in windows drawn from anywhere in a clip: nothing of
the scene but its finest detail. It learns what the numbers do not name, takes minutes instead of seconds, and cannot be
read. Its lines are drawn as those of `classifier` are; what is unlike everything has no answer of its own here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import check_shapes, read_tensors, write_tensors
from .classifier import SIDE, WINDOW, Judgement, answered, check_frames, fine_detail, kept_apart, lines

WINDOWS = 4  # of a clip that is judged, spread over it, at most

_WIDTHS = (3, 24, 48, 64)
_SCALE = 16.0  # detail of the size of a codec's noise comes to about 1


@dataclass(frozen=True)
class Network:
    """`score`, a network's mean over windows of a clip; "likely" from `high` on, "unlikely" below `low`."""

    net: nn.Module
    low: float
    high: float

    @torch.no_grad()
    def judge(self, frames: np.ndarray) -> Judgement:
        """Of uint8 `[T, H, W, 3]`."""
        return answered(_score(self.net, frames), self.low, self.high)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As safetensors."""
        write_tensors(path, self.net.state_dict() | {"lines": torch.tensor([self.low, self.high])})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Network:
        """What `save` wrote. Raises `CheckpointError` for anything else."""
        net, state = _built(), read_tensors(path)
        wanted = {name: value.shape for name, value in net.state_dict().items()} | {"lines": torch.Size([2])}
        check_shapes(wanted, {name: value.shape for name, value in state.items()}, os.fspath(path))
        low, high = state.pop("lines").tolist()
        net.load_state_dict(state)
        return cls(net.eval(), low, high)


def fit(
    made: Iterable[np.ndarray], others: Iterable[np.ndarray], *, held: float = 0.25, steps: int = 600, batch: int = 32,
    rate: float = 2e-3, seed: int = 0,
) -> Network:  # fmt: skip
    """The network between clips that a checkpoint made and others, which should have gone through the same codecs.

    Each step takes `batch` windows of 8 x 32 x 32, half of either kind, turned and mirrored at random; `rate` is
    AdamW's at the first step, and falls to none as a cosine. `held`: as `classifier.fit` has it.
    """
    kinds = [list(clips) for clips in (made, others)]
    taught, kept = zip(*kept_apart(*kinds, held), strict=True)
    for clip in itertools.chain(*kinds):
        check_frames(clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _built()
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-2)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    wanted = torch.tensor([1.0, 0.0]).repeat_interleave(batch // 2)
    for _ in range(steps):
        windows = [_window(clips[rng.integers(len(clips))], rng) for clips in taught for _ in range(batch // 2)]
        loss = F.binary_cross_entropy_with_logits(net(_seen(np.stack(windows))).flatten(), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
    net.eval()
    with torch.no_grad():
        scores = [np.array([_score(net, clip) for clip in clips]) for clips in kept]
    return Network(net, *lines(*scores))


def _built() -> nn.Sequential:
    """`[B, 3, 8, H, W]` to `[B, 1]`, of any size: 0.12 M weights."""
    layers: list[nn.Module] = []
    for i, (narrow, wide) in enumerate(zip(_WIDTHS, _WIDTHS[1:], strict=False)):
        stride = (1, 2, 2) if i == 0 else 2
        layers += [nn.Conv3d(narrow, wide, 3, stride, padding=1), nn.GroupNorm(4, wide), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], 1))


def _seen(windows: np.ndarray) -> Tensor:
    """uint8 `[B, 8, H, W, 3]` as the network sees it."""
    rgb = torch.from_numpy(np.ascontiguousarray(windows)).float() / 255
    planes = rgb.permute(0, 4, 1, 2, 3).flatten(0, 2)  # each colour of each frame by itself
    return _SCALE * fine_detail(planes).view(len(windows), 3, *windows.shape[1:4])


def _window(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    starts = [int(rng.integers(have - want + 1)) for have, want in zip(clip.shape, (WINDOW, SIDE, SIDE), strict=False)]
    t, y, x = (slice(at, at + size) for at, size in zip(starts, (WINDOW, SIDE, SIDE), strict=True))
    window = clip[t, y, x]
    if rng.random() < 0.5:
        window = window[:, :, ::-1]
    return window.swapaxes(1, 2) if rng.random() < 0.5 else window


def _score(net: nn.Module, frames: np.ndarray) -> float:
    check_frames(frames)
    starts = np.unique(np.linspace(0, len(frames) - WINDOW, WINDOWS).round().astype(int))
    return float(np.mean([net(_seen(frames[None, at : at + WINDOW])).item() for at in starts]))
