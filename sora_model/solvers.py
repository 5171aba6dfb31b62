"""The samplers that a checkpoint's scheduler_config.json names: classes of diffusers, called as `flow.sample` is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, extras, flow
from .checkpoint import CheckpointError

_SHIFTS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
_WANTED = {  # what makes a scheduler one of flow matching, without chance
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "stochastic_sampling": False,
    "use_dynamic_shifting": False, "invert_sigmas": False, "num_train_timesteps": 1000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hosted:
    """A scheduler of diffusers, made anew for each clip from `config`, its scheduler_config.json, and tried at once.

    Raises `CheckpointError` for one that is unknown here, does not predict velocities or draws noise of its own,
    `MissingExtra` where diffusers is not installed.
    """

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if (kind := self.config.get("_class_name")) not in tuple(_SHIFTS):  # of any kind, hashable or not
            raise CheckpointError(f"the scheduler is a {kind!r}; supported are {', '.join(_SHIFTS)}")
        self._check(self.config)  # what is given before it is used: a table of so many times is made at once
        self._check(self._made(self.shift).config)
        try:
            end = self(lambda x, t: x, torch.ones(1, 2), steps=3, shift=3.0)
        except Exception as error:  # of a damaged config, whatever the class makes of it
            raise CheckpointError(f"the scheduler cannot be run: {error}") from error
        if not torch.isfinite(end).all():
            raise CheckpointError("the scheduler gives NaN or infinite values: its config is damaged")

    def _check(self, config: Mapping[str, Any]) -> None:
        for name, value in _WANTED.items():
            if (found := config.get(name, value)) != value:
                raise CheckpointError(f"the scheduler has {name}={found!r}; flow matching needs {value!r}")
        try:
            checks.whole("the scheduler's solver_order", config.get("solver_order", 2), 1, 3)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    @property
    def shift(self) -> Any:
        """That of the config, unchecked."""
        return self.config.get(_SHIFTS[self.config["_class_name"]], 1.0)

    def __call__(
        self,
        velocity: flow.Velocity,
        noise: Tensor,
        *,
        steps: int,
        shift: float = 1.0,
        start: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """As `flow.sample`: from `noise`, or with `start` < 1 from a clip mixed with it, to a sample."""
        scheduler = self._made(shift)
        scheduler.set_timesteps(steps, device=noise.device)
        if start < 1:  # the config's own times below it; they are shifted once more on the way in
            times = [start, *(t for t in scheduler.sigmas.tolist() if 0 < t < start)]
            if not start:
                return noise
            sigmas = np.array([t / (shift - (shift - 1) * t) for t in times])
            scheduler.set_timesteps(sigmas=sigmas, device=noise.device)
        scheduler.set_begin_index(0)
        x = noise
        for index, time in enumerate(scheduler.timesteps):
            v = velocity(x, (time.double() / flow.TIME_SCALE).expand(len(x)))
            x = scheduler.step(v, time, x, return_dict=False)[0]
            if progress is not None:
                progress(index + 1, len(scheduler.timesteps))
        return x

    def _made(self, shift: float) -> Any:
        with extras.named("the sampler that the checkpoint names"):
            import diffusers

        kind = self.config["_class_name"]
        try:
            return getattr(diffusers, kind).from_config({**self.config, _SHIFTS[kind]: shift})
        except Exception as error:  # of a damaged config, whatever the class makes of it
            raise CheckpointError(f"no {kind} can be made of scheduler_config.json: {error}") from error
