"""The two transformers of Wan 2.2, its experts, each on half of the ranks: for the memory of one, not for time.

    sora = Sora.from_pretrained(folder, expert=experts.own())     # of the other the sizes, and no weights
    with parallel.sampling(sora):
        clip = sora.generate("a red ball moves up")               # on every rank

The ranks that hold the expert of a time compute the velocity and send it to the others: that of one clip, guided. All
integrate it, so that what a sampler remembers of earlier steps is there when the other expert takes over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .flow import Velocity
from .ranks import Ranks, squares

NAMES = ("high", "low")
"""Of much noise, and of little."""


def own() -> str:
    """The expert of this process: "high" in the first half of the run's, "low" in the second."""
    ranks = Ranks()
    if ranks.size % 2:
        fits = "start 2 under torchrun" if ranks.size == 1 else f"{ranks.size - 1} or {ranks.size + 1} would fit"
        raise ValueError(f"two experts apart need an even number of processes; there are {ranks.size}: {fits}")
    return NAMES[2 * ranks.rank // ranks.size]


def check_halves(expert: str | None) -> bool:
    """Whether the run's processes hold one expert each, or both; ValueError, on every one, where they do not fit."""
    held: list[Any] = [None] * Ranks().size
    dist.all_gather_object(held, expert)
    half = len(held) // 2
    if held not in ([None] * len(held), [NAMES[0]] * half + [NAMES[1]] * half):
        raise ValueError(
            "expert must be None on all processes, or 'high' on the first half of them and 'low' on the second "
            f"(experts.own() says which); it is {', '.join(map(repr, held))}"
        )
    return held[0] is not None


@dataclasses.dataclass(frozen=True)
class Experts:
    """Which expert, 0 or 1, this rank has, and a group of two ranks with one each, in that order."""

    group: Any
    own: int

    def shared(self, velocities: Sequence[Velocity], text: Tensor) -> list[Velocity]:
        """The velocities of both experts, on both ranks, of which each can compute its own.

        At first the ranks compare their latents and texts: another seed is an error on each and not a wrong clip.
        """
        compared = []

        def of(expert: int) -> Velocity:
            def velocity(x: Tensor, t: Tensor) -> Tensor:
                if not compared:
                    inputs = {"latents": x, "text": text}
                    facts = {f"the shape of {name}": list(value.shape) for name, value in inputs.items()}
                    facts |= {f"the values of {name}": squares(value) for name, value in inputs.items()}
                    Ranks().agree(facts)
                    compared.append(True)
                here = expert == self.own
                v = velocities[expert](x, t).contiguous() if here else torch.empty_like(x, dtype=torch.float32)
                dist.broadcast(v, dist.get_global_rank(self.group, expert), group=self.group)
                return v

            return velocity

        return [of(expert) for expert in range(len(velocities))]
