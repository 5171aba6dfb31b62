"""Batches of clips for training: buckets of size, aspect and duration, each batch of one bucket.

data = WorldData(batch=16, buckets=[Bucket(17, (64, 64)), Bucket(33, (48, 80), weight=0.5)])
video, captions, clips = data.at(step)        # the same for the same (seed, step), in any process
for video, captions, clips in loader(data, first=1200, workers=2): ...    # resumed: nothing to restore
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import SCENES, SPLITS, Sample, sample
from .base import Dice


@dataclass(frozen=True)
class Bucket:
    """Clips of ``frames`` of ``size`` = (H, W) at ``fps``. ``weight``: how often, beside the others'. ``batch``: clips
    in a batch, that of the dataset when None."""

    frames: int = 17
    size: tuple[int, int] = (64, 64)
    fps: float = 8.0
    weight: float = 1.0
    batch: int | None = None


@dataclass(frozen=True)
class WorldData(Dataset):
    """Batch number ``step``: (uint8 tensor [B,T,H,W,3], captions, samples), a pure function of the fields and the step.

    scenes: how often each is drawn, all alike by default. wordings: each time a clip is drawn it bears one of so many
    of its captions. Different seeds, and different steps, share no clip.
    """

    batch: int = 16
    buckets: Sequence[Bucket] = (Bucket(),)
    scenes: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(SCENES, 1.0))
    seed: int = 0
    split: str = "train"
    wordings: int = 16
    steps: int = 1 << 30
    prompt_spec: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.buckets or not all(isinstance(b, Bucket) and b.weight >= 0 for b in self.buckets):
            raise ValueError(f"buckets must be Buckets of weight >= 0, at least one, got {self.buckets!r}")
        if unknown := [name for name in self.scenes if name not in SCENES]:
            raise ValueError(f"scenes holds {unknown[0]!r}; there are {', '.join(SCENES)}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        for name, weights in (("scenes", self.scenes.values()), ("buckets", [b.weight for b in self.buckets])):
            if sum(weights) <= 0 or min(weights) < 0:
                raise ValueError(f"{name} must have weights >= 0, not all of them 0, got {list(weights)}")
        for name in ("batch", "wordings", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 16:
            raise ValueError(f"seed must be a whole number from 0 to 65535, got {self.seed!r}")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, list[str], list[Sample]]:
        return self.at(step)

    def bucket(self, step: int) -> Bucket:
        """The bucket of a batch."""
        return _drawn(Dice(self._first(step)), {b: b.weight for b in self.buckets})

    def at(self, step: int) -> tuple[torch.Tensor, list[str], list[Sample]]:
        """Batch number ``step``."""
        bucket = self.bucket(step)
        clips, captions = [], []
        for seed, dice, scene in self.drawn(step, bucket.batch or self.batch):
            clip = sample(
                seed, scene=scene, frames=bucket.frames, size=bucket.size, fps=bucket.fps,
                split=self.split, prompt_spec=self.prompt_spec,
            )  # fmt: skip
            clips.append(clip)
            captions.append(clip.wording(int(dice.uniform(0, self.wordings)))[0])
        video = torch.from_numpy(np.stack([clip.video for clip in clips]))
        return video, captions, [replace(clip) for clip in clips]  # without their own copies of the video

    def drawn(self, step: int, count: int) -> Iterator[tuple[int, Dice, str]]:
        """Of so many clips of a batch: the seed, the dice for whatever else is drawn of it, and the scene."""
        first = self._first(step) + 1
        for seed in range(first, first + count):
            dice = Dice(seed)
            yield seed, dice, _drawn(dice, self.scenes)

    def _first(self, step: int) -> int:
        if not 0 <= step < self.steps:
            raise IndexError(f"step must be from 0 to {self.steps - 1}, got {step}")
        return (self.seed << 44) + (step << 12)


def loader(data: WorldData, *, first: int = 0, workers: int = 0) -> Iterator[tuple]:
    """The batches from step ``first`` on, in order, made by ``workers`` processes ahead of time."""
    options = dict(persistent_workers=True, prefetch_factor=4) if workers else {}
    steps = range(first, len(data))
    return iter(DataLoader(data, batch_size=None, sampler=steps, num_workers=workers, **options))


def _drawn(dice: Dice, weights: Mapping):
    rest = dice.uniform(0, sum(weights.values()))
    for item, weight in weights.items():
        rest -= weight
        if rest < 0:
            return item
    return next(item for item in reversed(list(weights)) if weights[item] > 0)
