"""What is known of a clip beforehand: it keeps its latents and has timestep 0 while the rest is drawn from noise.

    known = place(latents.shape, {0: first, -1: last})      # from the first frame to the last one
    x = flow.sample(conditioned(velocity, known), known.hold(noise), steps=20)

Everything that is made from something else is this one mechanism: a clip goes on from its first frames, ends in given
ones, or both; lies between every n-th frame; keeps what lies outside of a region. The model is the same, is told by the
timestep of each token, and learns it from masks drawn by `draw_mask`. In latents; B clips of T'·H'·W' cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Known:
    """Latents `[B or 1, C, T', H', W']`, and which of their cells are known: bool `[B or 1, 1, T', H', W']`.

    What the latents hold where nothing is known has no effect, as long as it is finite.
    """

    latents: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        wanted = (self.latents.shape[0], 1, *self.latents.shape[2:])
        if self.latents.ndim != 5 or self.mask.shape != wanted or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool {list(wanted)} for latents {list(self.latents.shape)}; got {self.mask.dtype} "
                f"{list(self.mask.shape)}"
            )

    def hold(self, x: Tensor) -> Tensor:
        """x `[B, C, T', H', W']` with its known cells as they are known."""
        return torch.where(self.mask, self.latents.to(x), x)


def place(shape: Sequence[int], parts: Mapping[int, Tensor]) -> Known:
    """Parts `[1, C, t, H', W']` of a clip of latents of `shape` `[1, C, T', H', W']`, each from the frame at its key.

    A negative key counts from the end, as an index does: a part of t frames that ends the clip has the key -t.
    """
    latents = torch.zeros(tuple(shape))
    mask = torch.zeros((shape[0], 1, *shape[2:]), dtype=torch.bool)
    frames = shape[2]
    for key, part in parts.items():
        start = key + frames if key < 0 else key
        stop = start + part.shape[2]
        if not 0 <= start < stop <= frames:
            raise ValueError(f"parts: {part.shape[2]} frames from frame {key} on do not lie in a clip of {frames}")
        if mask[:, :, start:stop].any():
            raise ValueError(f"parts: frames {start} to {stop - 1} are given twice")
        latents[:, :, start:stop], mask[:, :, start:stop] = part.to(latents), True
    return Known(latents, mask)


def token_times(t: Tensor, mask: Tensor, patch: Grid) -> Tensor:
    """The times of tokens: t `[B]` or `[B, T']`, and 0 where they are known.

    `[B, t]`, one for each frame of tokens, where whole frames are known; else `[B, S]`, one for each token. A token is
    known when all its cells are; ValueError where it is known in part. mask `[B, 1, T', H', W']`, T' in latent frames.
    """
    cells = mask[:, 0]
    for axis, size in enumerate(patch, 1):
        cells = cells.unflatten(axis, (-1, size)).movedim(axis + 1, -1)
    cells = cells.flatten(4)  # [B, t, h, w, cells]
    tokens = cells.all(-1)  # [B, t, h, w]
    if not torch.equal(tokens, cells.any(-1)):
        raise ValueError(f"mask: each patch of {patch} cells must be known as a whole or not at all")
    t = t[:, None] if t.ndim == 1 else t[:, :: patch[0]]
    times = t[:, :, None, None] * ~tokens  # [B, t, h, w]
    whole = torch.equal(tokens, tokens[:, :, :1, :1].expand_as(tokens))
    return times[:, :, 0, 0] if whole else times.flatten(1)


def conditioned(velocity: Callable[[Tensor, Tensor], Tensor], known: Known, patch: Grid) -> Callable:
    """`velocity(x, t)` as `flow.sample` calls it, t `[B]`: what is known stands still, and its tokens are told so."""

    def held(x: Tensor, t: Tensor) -> Tensor:
        mask = known.mask.to(x.device).expand(len(x), -1, -1, -1, -1)
        return velocity(known.hold(x), token_times(t, mask, patch)).masked_fill(mask, 0)

    return held


def draw_mask(grid: Grid, *, generator: torch.Generator) -> Tensor:
    """What a training clip of `grid` = (t, h, w) tokens knows: bool `[t, h, w]`, never all of it.

    50 % nothing; 20 % the first frames, half of these the very first alone; 5 % the last ones; 9 % both; 6 % every
    second or fourth; 6 % any; 4 % what lies outside of a box, the same in all frames.
    """
    frames, height, width = grid

    def whole(least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        return int(torch.randint(least, max(most, least) + 1, (), generator=generator))

    mask = torch.zeros(grid, dtype=torch.bool)
    kind = torch.rand((), generator=generator).item()
    if kind < 0.2 and frames > 1:
        mask[: 1 if kind < 0.1 else whole(1, frames - 1)] = True
    elif kind < 0.25 and frames > 1:
        mask[frames - whole(1, frames // 2) :] = True
    elif kind < 0.34 and frames > 2:
        mask[: whole(1, (frames - 1) // 2)] = True
        mask[frames - whole(1, (frames - 1) // 2) :] = True
    elif kind < 0.4 and frames > 2:
        mask[:: 2 * whole(1, 2)] = True
    elif kind < 0.46 and frames > 1:
        mask[torch.randperm(frames, generator=generator)[: whole(1, frames - 1)]] = True
    elif kind < 0.5 and height > 1 and width > 1:
        mask[:] = True
        rows, columns = whole(1, height - 1), whole(1, width - 1)
        top, left = whole(0, height - rows), whole(0, width - columns)
        mask[:, top : top + rows, left : left + columns] = False
    return mask
