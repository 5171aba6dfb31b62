"""What is measured of the model beside the operations: whole decodes, a transformer block, whole transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import dit, suite, vae_decode

CHUNK = 2  # latent frames that ours decodes at once


@dataclass(frozen=True)
class ModelBenchmark:
    """cases: by the name of a shape; default: the names for a device; memory: bytes that a case may need."""

    name: str
    family: str
    modes: Mapping[str, str]  # what "fwd" and "bwd" mean to it
    cases: Mapping[str, Any]
    default: Mapping[str, tuple[str, ...]]
    dims: Callable[[Any], dict[str, object]]
    memory: Callable[[Any], int]
    run: Callable[..., Iterator[suite.Result]]

    def measure(self, shape: str, modes: tuple[str, ...], **how: Any) -> Iterator[suite.Result]:
        own = tuple(self.modes[mode] for mode in modes if mode in self.modes)
        return self.run(self.cases[shape], modes=own, **how) if own else iter(())


def _decode(
    case: vae_decode.Case, *, modes: tuple[str, ...], dtype: torch.dtype, device: torch.device, budget_s: float,
    compiled: bool, seed: int,
) -> Iterator[suite.Result]:  # fmt: skip
    return iter(vae_decode.measure(case, dtype, device, CHUNK, budget_s))


def _frames_memory(case: vae_decode.Case) -> int:
    """Of a decoder that holds the whole clip at the width of its last layers, as diffusers' does."""
    sizes = case.describe()
    return 4 * 4 * case.frames * sizes["height"] * sizes["width"] * case.config.base_dim


MODELS = {
    "vae_decode": ModelBenchmark(
        "vae_decode", "vae", {"fwd": "fwd"}, vae_decode.CASES, vae_decode.DEFAULT,
        lambda case: case.describe() | {"chunk": CHUNK}, _frames_memory, _decode,
    ),
    **{
        op: ModelBenchmark(
            op, "dit", {"fwd": "fwd", "bwd": "fwd+bwd"}, dit.CASES, {d: of[op] for d, of in dit.DEFAULT.items()},
            partial(dit.Case.dims, op=op), partial(dit.memory, op), partial(dit.measure, op),
        )
        for op in dit.OPS
    },
}  # fmt: skip
