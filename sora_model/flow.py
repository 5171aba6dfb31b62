"""Rectified flow matching: the straight path from video to noise, its training target, and the way back.

    x_t = (1 - t) * x_0 + t * noise,    v = dx_t/dt = noise - x_0,    t in [0, 1]

A model predicts v from (x_t, t); sampling integrates v from t = 1 (noise) to t = 0. Time is shifted toward noise by
t' = s*t / (1 + (s - 1)*t), because large videos lose their information later than small ones (Esser et al. 2024,
arXiv:2403.03206). Conventions are Wan 2.1's: models see 1000*t, and a schedule of n steps is the shifted
linspace(1, 0, n + 1).

All random numbers come from a generator on the CPU, so that a seed means the same clip on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

TIME_SCALE = 1000.0

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [B] in [0, 1]) -> velocity, as x."""


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = shift*t / (1 + (shift - 1)*t); the identity for shift = 1, and 0 and 1 stay where they are."""
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float = 1.0) -> Tensor:
    """The times of a sampling run: fp64 `[steps + 1]`, falling from 1 to 0."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def sample_times(
    count: int,
    *,
    generator: torch.Generator,
    distribution: Literal["logit_normal", "uniform"] = "logit_normal",
    shift: float = 1.0,
) -> Tensor:
    """Draws training times in (0, 1): fp32 `[count]`. `logit_normal` is sigmoid of a standard normal."""
    if distribution == "logit_normal":
        t = torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float32))
    elif distribution == "uniform":
        t = torch.rand(count, generator=generator, dtype=torch.float32)
    else:
        raise ValueError(f"distribution must be 'logit_normal' or 'uniform', got {distribution!r}")
    return shift_time(t, shift)


def draw_noise(shape: tuple[int, ...], *, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal fp32 noise, drawn on the CPU and then moved."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t)*x_0 + t*noise; `t` `[B]`, the others `[B, ...]`; or `[B, T']`, the others `[B, C, T', H', W']`."""
    t = t[:, None, :, None, None] if t.ndim == 2 else t.reshape(-1, *[1] * (x0.dim() - 1))
    t = t.to(x0.dtype)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = noise - x_0, the derivative of the path, at every t."""
    return noise - x0


def pair(guidance: float | tuple[float, float]) -> tuple[float, float]:
    """Guidance of the two transformers that a model may have, of much noise and of little."""
    return guidance if isinstance(guidance, tuple) else (guidance, guidance)


def guided(
    model: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    prompt: tuple[Tensor, Tensor | None],
    null: tuple[Tensor, Tensor | None],
    guidance: float,
    *,
    batched: bool = True,
) -> Velocity:
    """Classifier-free guidance: v = v_null + guidance*(v_prompt - v_null) (Ho and Salimans 2022, arXiv:2207.12598).

    `model(x, t, text, lens)` predicts the velocity; `prompt` and `null` are pairs of text `[B, L, D]` and its lengths
    `[B]` (or None where padding is seen). `batched` runs both halves as one batch; otherwise one after the other, in
    half the memory. With guidance 1 the null half is not computed.
    """
    if guidance == 1:
        return lambda x, t: model(x, t, *prompt)
    text = torch.cat([prompt[0], null[0]])
    lens = None if prompt[1] is None or null[1] is None else torch.cat([prompt[1], null[1]])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if batched:
            toward, away = model(torch.cat([x, x]), torch.cat([t, t]), text, lens).chunk(2)
        else:
            toward, away = model(x, t, *prompt), model(x, t, *null)
        return torch.lerp(away, toward, guidance)

    return velocity


def sample(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    shift: float = 1.0,
    solver: Literal["euler", "heun"] = "euler",
    start: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrates `velocity` from `noise` at t = 1 to a sample at t = 0. Deterministic.

    With `start` < 1, from x_start given in the place of noise, by those steps of the schedule that are left then: what
    a clip mixed with noise becomes (SDEdit, Meng et al. 2022, arXiv:2108.01073). At 0 nothing is left to do.
    `euler` calls the model once a step, `heun` (second order) twice, save for the last step. `progress(done, steps)`
    is called after every step.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver must be 'euler' or 'heun', got {solver!r}")
    if not 0 <= start <= 1:
        raise ValueError(f"start must lie between 0 and 1, got {start}")
    times = [start, *(t for t in schedule(steps, shift).tolist() if t < start)]
    x = noise
    for index, (now, then) in enumerate(zip(times, times[1:], strict=False)):
        v = velocity(x, x.new_full((len(x),), now))
        ahead = x + (then - now) * v
        if solver == "heun" and then > 0:
            v = (v + velocity(ahead, x.new_full((len(x),), then))) / 2
            ahead = x + (then - now) * v
        x = ahead
        if progress is not None:
            progress(index + 1, len(times) - 1)
    return x
