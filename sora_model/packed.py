"""Clips of several sizes and lengths through the transformer as one sequence, without padding.

    velocities = packed(dit, [wide, tall], [t, t], text)         # [C, T, H, W] each, of sizes of their own
    clips = generate(sora, [{"prompt": "a red ball", "size": (48, 80)}, {"prompt": "a blue ring", "seconds": 1}])

They share every matrix product and see only themselves (`spacetime_attention(grids=)`). Inside of `parallel.over` each
rank has a share of the tokens of every clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_kernels import qk_norm_rope, spacetime_attention

from . import flow, machine
from .attention import AttentionMode, Grid
from .context import Context
from .dit import SoraDiT
from .frames import to_pixels
from .parallel import Share
from .pipeline import Clip, Progress, Sora
from .safety import filters


class Pack(Context):
    """Of one sequence: clips of `grids`, one after another, and the row of modulation of each token.

    shares  of each clip this rank's share, where the sequence has those tokens alone
    """

    def __init__(self, grids: Sequence[Grid], index: Tensor, shares: Sequence[Share] = ()) -> None:
        self.grids, self.index, self.shares = tuple(grids), index, shares
        self.sizes = [share.size for share in shares] or [math.prod(grid) for grid in grids]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Any, mode: AttentionMode, norms: Mapping[str, Any]
    ) -> Tensor:
        if not self.shares:
            return super().attention(q, k, v, grid, mode, norms)
        parts = zip(self.shares, *(t.split(self.sizes, 1) for t in (q, k, v)), self.grids, strict=True)
        return torch.cat([share.attention(*part, mode, norms) for share, *part in parts], 1)

    def joined(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Any, norms: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        parts = zip(q.split(self.sizes, 1), k.split(self.sizes, 1), self.grids, strict=True)
        turned = [qk_norm_rope(q, k, grid=grid, **norms) for q, k, grid in parts]
        q, k = (torch.cat(part, 1) for part in zip(*turned, strict=True))
        return q, k, v, self.grids

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, impl: str) -> Tensor:
        outs = []
        for i, part in enumerate(q.split(self.sizes, 1)):
            lens = None if kv_lens is None else kv_lens[i : i + 1]
            outs.append(spacetime_attention(part, k[i : i + 1], v[i : i + 1], kv_lens=lens, impl=impl))
        return torch.cat(outs, 1)


def packed(
    dit: SoraDiT,
    latents: Sequence[Tensor],
    timesteps: Sequence[Tensor],
    text: Tensor,
    text_lens: Tensor | None = None,
    *,
    attention: AttentionMode | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """The velocity of each clip, as `dit(clip[None], timesteps[None], text, ...)` gives it clip for clip.

    latents     n clips `[C, T, H, W]`, of any sizes that the patch divides
    timesteps   of each clip: one number `[]`, one for each frame of tokens `[T']` or one for each token `[S]`
    text        `[n, L, text_dim]`
    text_lens   `[n]`

    Equal to the clips one by one up to the rounding of the matrix products; the gradients too. Raises as
    `SoraDiT.forward`, and ValueError where the numbers of clips differ.
    """
    if not len(latents) == len(timesteps) == len(text) > 0:
        raise ValueError(
            f"latents, timesteps and text must be of as many clips, at least one; got {len(latents)}, "
            f"{len(timesteps)} and {len(text)}"
        )
    clips = [clip[None] for clip in latents]
    times = [t.reshape(1, -1) for t in timesteps]
    lens = [None if text_lens is None else text_lens[i : i + 1] for i in range(len(clips))]
    grids = [
        dit.grid_of(clip, t, text[i : i + 1], lens[i], None)
        for i, (clip, t) in enumerate(zip(clips, times, strict=True))
    ]
    rows, index = 0, []
    for grid, t in zip(grids, times, strict=True):
        tokens, own = math.prod(grid), t.shape[1]
        index.append(rows + torch.arange(own, device=text.device).repeat_interleave(tokens // own))
        rows += own
    mode, divided = attention or dit.config.attention, dit.parallel is not None
    shares = ()
    if divided:
        given = {"latents": clips, "timesteps": times}
        given = {f"{name} of clip {i}": t for name, several in given.items() for i, t in enumerate(several)}
        dit.parallel.agree(mode, given | {"text": text, "text_lens": text_lens})
        shares = dit.parallel.shares_of_pack(grids, mode)
        clips = [share.latents(clip, dit.config.patch) for share, clip in zip(shares, clips, strict=True)]
        index = [own[slice(*share.own)] for share, own in zip(shares, index, strict=True)]
    pack = Pack(grids, torch.cat(index)[None], shares)
    tokens = [dit.embed_patches(clip, impl) for clip in clips]
    if divided:
        tokens = [share.tokens(x) for share, x in zip(shares, tokens, strict=True)]
    x = torch.cat(tokens, 1)                                                                 # [1, S, D]
    time = dit.embed_times(torch.cat(times, 1)).to(x.dtype)                                  # [1, N, D]
    x = dit.through_blocks(x, time, text, text_lens, None, grids, mode, impl, lambda layer: pack)
    parts, rows = x.split(pack.sizes, 1), time.split([t.shape[1] for t in times], 1)
    if divided:
        strips = [dit.read_out(part, s.rows(t), s.strip, impl) for s, part, t in zip(shares, parts, rows, strict=True)]
        return [share.join(strip, dit.config.patch)[0] for share, strip in zip(shares, strips, strict=True)]
    return [dit.read_out(part, t, grid, impl)[0] for part, t, grid in zip(parts, rows, grids, strict=True)]


@torch.no_grad()
def generate(
    sora: Sora,
    requests: Sequence[Mapping[str, Any]],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    impl: str = "auto",
    progress: Progress | None = None,
) -> list[Clip]:
    """A clip of each request: `prompt`, and `seconds`, `size`, `fps` and `seed` as `Sora.generate` has them.

    All are drawn together, up to rounding as each would be alone. Raises as `Sora.generate`.
    """
    if not requests:
        raise ValueError("requests must be at least one")
    if sora.second is not None or sora.sees_frames:
        raise ValueError("clips are drawn together by checkpoints of one transformer, from text; draw these one by one")
    for i, request in enumerate(requests):
        if not isinstance(request, Mapping):
            raise TypeError(f"request {i} must be a dict, such as {{'prompt': 'a red ball'}}; got {request!r}")
        if unknown := request.keys() - {"prompt", "seconds", "size", "fps", "seed"}:
            raise TypeError(f"request {i} takes prompt, seconds, size, fps and seed; got {sorted(unknown)[0]!r}")
    common = {"steps": steps, "guidance": guidance, "long": "once", "impl": impl}
    plans = [sora._plan(**request, **common) for request in requests]
    free = machine.available(sora.device)
    needed = sum(sora._memory(sora._padded(plan.frames), *plan.size, impl, True, free)[1] for plan in plans)
    if needed > free:
        raise machine.TooLargeError(
            f"{len(plans)} clips together need about {machine.gib(needed)} and {machine.left(free)}; "
            "ask for fewer at a time"
        )
    with machine.own_dtypes(sora.device):
        latents = _draw(sora, plans, impl, progress)
        clips = []
        for plan, latent in zip(plans, latents, strict=True):
            plan.clock()
            sora.vae.impl = impl
            sora.turns(sora.vae)
            video = sora.vae.decode_stream([sora.vae.denormalize(latent[None])], clamp=False, tile=plan.tile)
            frames = np.concatenate([to_pixels(part, impl) for part in video])[: plan.frames]
            filters.check(frames, "what was made")
            clips.append(sora._clip(plan, frames))
            if progress is not None:
                progress("decode", len(clips), len(plans))
    return clips


def _draw(sora: Sora, plans: Sequence[Any], impl: str, progress: Progress | None) -> list[Tensor]:
    """Normalised latents of the plans."""
    dtype, count = sora.dit.patch_embedding.weight.dtype, len(plans)
    sora.turns(sora.text)
    text, lens = sora.text.encode([plan.prompt for plan in plans] + [""] * count)
    text = text.to(sora.device, dtype)
    lens = lens.to(sora.device) if sora.text.masks_padding else None
    prompt, null = ((text[half], None if lens is None else lens[half]) for half in (slice(count), slice(count, None)))
    noise = [
        flow.draw_noise(plan.latents, generator=torch.Generator().manual_seed(plan.seed), device=sora.device)
        for plan in plans
    ]

    def parts(row: Tensor) -> list[Tensor]:
        flat = row.split([part.numel() for part in noise])
        return [part.view_as(like) for part, like in zip(flat, noise, strict=True)]

    def model(x: Tensor, t: Tensor, text: Tensor, lens: Tensor | None) -> Tensor:
        clips = [part.to(dtype) for row in x for part in parts(row)]
        times = (flow.TIME_SCALE * t).float().repeat_interleave(count)
        plans[0].clock()
        v = packed(sora.dit, clips, times.unbind(), text, lens, impl=impl)
        return torch.cat([part.float().flatten() for part in v]).view_as(x)

    velocity = flow.guided(model, prompt, null, plans[0].guidance)
    told = None if progress is None else lambda done, total: progress("denoise", done, total)
    flat = torch.cat([part.flatten() for part in noise])[None]
    sora.turns(sora.dit)
    return parts(sora.solver(velocity, flat, steps=plans[0].steps, shift=plans[0].shift, progress=told)[0])
