"""A mark in the noise that a clip is drawn from: no pixel is changed for it; it is read by running the flow backwards.

    clip = sora.generate("a red ball", shade=True)
    found = shading.detect(sora, clip.frames)            # a `watermark.Detection`

Gaussian Shading (Yang et al., 2024, arXiv:2404.04956): each number of the noise is drawn from that half of the normal
distribution which a bit chooses, x = Phi^-1((u + b) / 2), u uniform. b is one of the 32 bits of an identity, each
repeated through the whole noise, added to the stream of a secret key and of a nonce of the clip's own, drawn with its
noise: without the key the noise is what it would be, and no two clips share their signs. To read it, the frames are
encoded and the flow is followed from them to the noise, without prompt or guidance, which nobody knows of a clip that
was found; every nonce is tried. For the right one, the numbers of a bit add up, each by the stream's sign.

Over keys, what an unmarked clip gives is 32 sums of independent signs: their squares, over their variances, are
chi-square of 32 degrees of freedom, and p bounds the chance of the largest over all nonces. What is left of the signs
is little where a flow contracts or the VAE loses much, and z grows with the root of the number of latents: of the toy
checkpoint's clips it can be read in some only (docs/safety.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import flow, machine
from ..frames import covering, to_video
from ..sampling import Sampler
from .watermark import BITS, Detection, secret

if TYPE_CHECKING:
    from ..pipeline import Sora

NONCES = 4096
STEPS = 20  # of the way back


def draw(
    shape: tuple[int, ...], identity: int | None, *, generator: torch.Generator, key: bytes | None = None
) -> Tensor:
    """Standard normal fp32 noise `[1, C, T, H, W]` with the mark of `identity`, 0 to 2^32 - 1, on the CPU; of
    None, `flow.draw_noise`. The nonce is the first number that the generator gives."""
    if identity is None:
        return flow.draw_noise(shape, generator=generator)
    nonce = int(torch.randint(NONCES, (), generator=generator))
    count = math.prod(shape)
    bits = torch.tensor([identity >> bit & 1 for bit in range(BITS)], dtype=torch.bool)
    b = _stream(secret() if key is None else key, nonce, count) ^ bits.repeat(-(-count // BITS))[:count]
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    noise = torch.special.ndtri(((u + b) / 2).clamp(1e-9, 1 - 1e-9)).float()
    _, channels, frames, height, width = shape
    return noise.view(1, frames, height, width, channels).permute(0, 4, 1, 2, 3).contiguous()  # a beginning is marked


def read(noise: Tensor, *, key: bytes | None = None) -> Detection:
    """Looks for the mark in noise `[1, C, T, H, W]`, of whatever scale. `Detection.z` is the normal deviate of the
    energy (Wilson and Hilferty, 1931)."""
    x = noise.permute(0, 2, 3, 4, 1).flatten().float().cpu()
    most = 2 * x.square().mean().sqrt()
    x = torch.cat([x.clamp(-most, most), x.new_zeros(-len(x) % BITS)]).view(-1, BITS)
    deviation = x.square().sum(0).sqrt().clamp(min=1e-12)
    key, energy, bits = secret() if key is None else key, -1.0, x[0]
    for nonce in range(NONCES):
        sums = torch.where(_stream(key, nonce, x.numel()).view_as(x), x, -x).sum(0) / deviation
        if (found := float(sums.square().sum())) > energy:
            energy, bits = found, -sums  # of a bit of 1 the signs are turned
    spread = 2 / (9 * BITS)
    z = ((energy / BITS) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    half = max(energy / 2, 1e-300)
    tail = sum(math.exp(i * math.log(half) - half - math.lgamma(i + 1)) for i in range(BITS // 2))
    return Detection(z, min(1.0, NONCES * tail), 1.0, False, tuple(bits.tolist()))


def detect(sora: Sora, frames: Iterable[np.ndarray], *, key: bytes | None = None, impl: str = "auto") -> Detection:
    """`read`, of the noise from which `sora` would have drawn these frames, uint8 `[H, W, 3]`: of as many as it was
    trained on, at most, scaled to its size."""
    return read(invert(sora, frames, impl=impl), key=key)


@torch.no_grad()
def invert(sora: Sora, frames: Iterable[np.ndarray], *, steps: int = STEPS, impl: str = "auto") -> Tensor:
    """The noise `[1, C, T', H', W']` that the flow leads to from frames, by Euler's steps backwards without a prompt:
    x_s = x_t + (s - t) v(x_t, s) from each time t to the next, s."""
    kept = [frame for frame, _ in zip(frames, range(sora.defaults.frames), strict=False)]
    if not kept:
        raise ValueError("there are no frames to look for a mark in; give at least one")
    video = to_video(sora._padded_frames(covering(np.stack(kept), sora.defaults.size))[None])
    x = sora._coded(video, impl)
    sampler = Sampler(
        sora.dit, sora.text, "", steps=steps, guidance=1.0, shift=sora.defaults.shift, second=sora.second,
        boundary=sora.boundary, experts=sora.experts, impl=impl, turns=sora.turns,
    )  # fmt: skip
    velocity = sampler.velocity()
    times = flow.schedule(steps, sora.defaults.shift).flip(0).tolist()
    with machine.own_dtypes(sora.device):
        for now, then in zip(times, times[1:], strict=False):
            x = x + (then - now) * velocity(x, x.new_full((1,), then))
    return x


def _stream(key: bytes, nonce: int, count: int) -> Tensor:
    """`count` bits; those of fewer are their beginning."""
    drawn = hashlib.shake_256(b"sora noise 1" + key + nonce.to_bytes(2, "big")).digest(-(-count // 8))
    return torch.from_numpy(np.unpackbits(np.frombuffer(drawn, np.uint8))[:count].astype(bool))
