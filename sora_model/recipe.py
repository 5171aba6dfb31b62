"""How a checkpoint is trained, as one file of settings: read from YAML, with KEY=VALUE over it.

recipe = load()                                          # that of a toy checkpoint
recipe = load("mine.yaml", ["dit.layers=4", "dit_fit.lr=5e-4"])
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import checks
from .checkpoint import CheckpointError, build
from .dit import DiTConfig
from .planning import Defaults
from .steps import Settings
from .text import check_prompt
from .vae import VAEConfig
from .world import SCENES
from .world.data import Bucket

TOY = Path(__file__).parent / "configs" / "toy.yaml"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that training depends on. ValueError names the field that does not fit.

    vae, dit, text     sizes of the parts; `text` those of a `WordTextEncoder`, without words and width
    vae_fit, dit_fit   of the two runs of training
    buckets, scenes    clips of the world: of one size and length each, and how often each scene is drawn
    draws              how often each clip of a batch is used, each time with other noise, times and known cells
    causal             share of steps whose frames see themselves and earlier ones only
    apart              share of clips whose frames have times of their own, instead of one for all
    shift              of the times toward noise
    defaults           what the checkpoint says of itself
    samples            prompts of the sheet that goes with every save
    """

    vae: VAEConfig
    dit: DiTConfig
    text: Mapping[str, int]
    buckets: tuple[Bucket, ...]
    vae_fit: Settings
    dit_fit: Settings
    defaults: Defaults
    scenes: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(SCENES, 1.0))
    draws: int = 1
    causal: float = 0.0
    apart: float = 0.0
    shift: float = 1.0
    samples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.whole("draws", self.draws, 1, 1024)
        checks.number("causal", self.causal, 0, 1)
        checks.number("apart", self.apart, 0, 1)
        checks.number("shift", self.shift, 1e-3, 1e3)
        for prompt in self.samples:
            check_prompt(prompt)
        if not (self.dit.in_channels == self.dit.out_channels == self.vae.z_dim):
            raise ValueError(
                f"dit.in_channels and dit.out_channels must be vae.z_dim={self.vae.z_dim}; got {self.dit.in_channels} "
                f"and {self.dit.out_channels}"
            )
        for bucket in self.buckets:
            grid = self.vae.latent_shape(bucket.frames, *bucket.size)[1:]
            if any(size % patch for size, patch in zip(grid, self.dit.patch, strict=True)):
                raise ValueError(
                    f"buckets: {bucket} has {grid} latents, which patches of {self.dit.patch} do not divide"
                )

    def only(self, *names: str) -> dict[str, Any]:
        """These fields, as JSON has them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name in names}


def load(source: str | os.PathLike[str] = TOY, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a YAML file, with `overrides` such as "dit.layers=4" over it; `CheckpointError` names what is
    wrong and where."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        given = OmegaConf.load(source)
        if not OmegaConf.is_dict(given):
            raise CheckpointError(f"{source} must hold settings by name; got a {type(given).__name__}")
        known = [field.name for field in dataclasses.fields(Recipe)]
        for change in overrides:
            key, equals, _ = change.partition("=")
            if not equals or key.split(".")[0] not in known:
                raise CheckpointError(f"{change!r} must be KEY=VALUE, KEY beginning with one of {', '.join(known)}")
        merged = OmegaConf.to_container(OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides))), resolve=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {source}") from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise CheckpointError(f"{source} cannot be read as YAML settings: {error}") from error
    return _recipe(merged, os.fspath(source))


_PARTS = {"vae": VAEConfig, "dit": DiTConfig, "vae_fit": Settings, "dit_fit": Settings, "defaults": Defaults}


def _recipe(values: dict[str, Any], where: str) -> Recipe:
    for name, kind in _PARTS.items():
        if not isinstance(values.get(name), Mapping):
            raise CheckpointError(f"{where}: {name} must hold settings by name; got {values.get(name)!r}")
        values[name] = build(kind, values[name], f"{where}: {name}")
    buckets = values.get("buckets")
    if not isinstance(buckets, list) or not buckets or not all(isinstance(bucket, Mapping) for bucket in buckets):
        raise CheckpointError(f"{where}: buckets must be a list of settings by name, at least one; got {buckets!r}")
    values["buckets"] = [build(Bucket, bucket, f"{where}: buckets") for bucket in buckets]
    return build(Recipe, values, where)
