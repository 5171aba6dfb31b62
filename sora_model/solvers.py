"""The samplers that a checkpoint's scheduler_config.json names: classes of diffusers, called as `flow.sample` is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from . import extras, flow
from .checkpoint import CheckpointError

_SHIFTS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
_WANTED = {  # what makes a scheduler one of flow matching, without chance
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "stochastic_sampling": False,
    "use_dynamic_shifting": False, "invert_sigmas": False, "num_train_timesteps": 1000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hosted:
    """A scheduler of diffusers, made anew for each clip from `config`, its scheduler_config.json.

    Raises `CheckpointError` for one that is unknown here, does not predict velocities or draws noise of its own,
    `MissingExtra` where diffusers is not installed.
    """

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if (kind := self.config.get("_class_name")) not in _SHIFTS:
            raise CheckpointError(f"the scheduler is a {kind!r}; supported are {', '.join(_SHIFTS)}")
        made = self._made(self.shift)
        for name, value in _WANTED.items():
            if (found := made.config.get(name, value)) != value:
                raise CheckpointError(f"the scheduler has {name}={found!r}; flow matching needs {value!r}")

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
