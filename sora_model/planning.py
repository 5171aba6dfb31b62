"""A request made into a plan before any work: every argument checked, its size against the memory, its time guessed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist

from . import checks, estimate, flow, fp8, machine
from .attention import AttentionMode
from .checkpoint import unfilled
from .dit import DiTConfig, SoraDiT
from .machine import TooLargeError, gib
from .ranks import Ranks
from .safety import limits
from .safety.policy import hash_text
from .text import WordTextEncoder, check_prompt
from .vae import CausalVAE, VAEConfig

LONG = ("once", "stream", "pieces")
CHUNK = 4  # frames that a stream makes at once
MAX_SIDE, MAX_STEPS, MAX_FRAMES = 8192, 10_000, 10_000_000


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a checkpoint was trained for, and how it is best sampled. `size` is (height, width).

    guidance  one number, or two: of the transformer for much noise, and of that for little
    """

    frames: int
    size: tuple[int, int]
    fps: float
    steps: int
    guidance: float | tuple[float, float]
    shift: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checks.several("size", self.size))
        if len(self.size) != 2:
            raise ValueError(f"size must be two numbers, the height and the width; got {self.size}")
        for side in self.size:
            checks.whole("size", side, 1, MAX_SIDE)
        checks.whole("frames", self.frames, 1, MAX_FRAMES)
        checks.whole("steps", self.steps, 1, MAX_STEPS)
        checks.number("fps", self.fps, 0.1, 1000)
        pair = flow.pair(self.guidance)
        if len(pair) != 2:
            raise ValueError(f"guidance must be one number, or two for two transformers; got {pair}")
        for guidance in pair:
            checks.number("guidance", guidance, -100, 100)
        checks.number("shift", self.shift, 1e-3, 1e3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request with nothing left open."""

    prompt: str
    frames: int
    size: tuple[int, int]
    fps: float
    seed: int
    steps: int
    guidance: float | tuple[float, float]
    negative: str
    shift: float
    attention: AttentionMode | None
    long: str
    latents: tuple[int, int, int, int]
    tile: tuple[int, int]
    # for the record of the result: what was given, and what else was asked for
    inputs: list[Any] = dataclasses.field(default_factory=list)
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    shade: bool = False
    clock: limits.Clock = dataclasses.field(default_factory=limits.Clock, compare=False)

    def told(self, usual: Defaults) -> dict[str, Any]:
        """What a record says of it but the prompt and what was given: all that two clips may differ by."""
        (height, width), attention = self.size, self.attention and str(self.attention)
        made = dict(seed=self.seed, steps=self.steps, guidance=self.guidance, size=f"{width}x{height}", fps=self.fps)
        negative = hash_text(self.negative) if self.negative else None
        rare = {
            "negative_sha256": negative, "shift": self.shift if self.shift != usual.shift else None,
            "attention": attention, "long": self.long if self.long != "once" else None, "shade": self.shade or None,
        }  # fmt: skip
        return made | self.asked | {name: value for name, value in rare.items() if value is not None}


ASKED = [field.name for field in dataclasses.fields(Plan) if field.name not in ("tile", "inputs", "asked", "clock")]


class Planning:
    """The methods of `Sora` that make plans."""

    together: bool = False
    """Whether all processes make one plan, inside of `parallel.sampling`."""

    def _plan(
        self,
        prompt: Any,
        *,
        seconds: Any = None,
        size: Any = None,
        fps: Any = None,
        seed: Any = 0,
        steps: Any = None,
        guidance: Any = None,
        negative: Any = "",
        shift: Any = None,
        attention: Any = None,
        long: Any = None,
        impl: str = "auto",
        held: bool = True,
        shade: Any = False,
    ) -> Plan:
        defaults, vae, most = self.defaults, self.vae.config, limits.current()
        check_prompt(prompt)
        machine.check_impl(impl)
        fps = number("fps", defaults.fps if fps is None else fps, 0.1, 1000)
        own = min(defaults.frames / fps, most.seconds)
        seconds = number("seconds", own if seconds is None else seconds, 0, most.seconds)
        if not (frames := round(seconds * fps)):
            raise ValueError(
                f"seconds={seconds:g} at {fps:g} frames per second is less than one frame; "
                f"ask for at least {1 / fps:.3g}"
            )
        steps = whole("steps", defaults.steps if steps is None else steps, 1, most.steps)
        seed = whole("seed", seed, 0, 2**63 - 1)
        guidance = defaults.guidance if guidance is None else guidance
        if self.second is not None and isinstance(guidance, tuple | list) and len(guidance) == 2:
            guidance = tuple(number("guidance", part, -100, 100) for part in guidance)
        elif self.second is None and isinstance(guidance, tuple | list):
            raise ValueError(f"guidance must be one number, as this checkpoint has one transformer; got {guidance}")
        else:
            guidance = number("guidance", guidance, -100, 100)
        shift = number("shift", defaults.shift if shift is None else shift, 1e-3, 1e3)
        if negative != "":
            check_prompt(negative, "negative")
        attention = AttentionMode.parse(attention) if isinstance(attention, str) else attention
        if not isinstance(attention, AttentionMode | None):
            raise TypeError(f"attention must be an AttentionMode, text or None; got {type(attention).__name__}")
        height, width = self._check_size(defaults.size if size is None else size)
        long = self._long(long, frames, attention)
        checks.flag("shade", shade)
        if shade and long != "once":
            raise ValueError(f"shade marks the noise of a clip that is made long='once'; this one is made {long!r}")
        if isinstance(self.text, WordTextEncoder):
            self.text.tokenize([prompt, negative])
        at_once = None if long == "once" else min(self._padded(frames), defaults.frames)
        tile = self._fit(frames, (height, width), impl, held=held, at_once=at_once)
        latents = vae.latent_shape(self._padded(frames), height, width)
        for remark in self._remarks(prompt, frames, (height, width), latents, steps, guidance, at_once):
            warnings.warn(remark, stacklevel=3)
        size = height, width
        plan = Plan(
            prompt, frames, size, fps, seed, steps, guidance, negative, shift, attention, long, latents, tile,
            shade=shade,
        )  # fmt: skip
        return self._alike(plan) if self.together else plan

    def _alike(self, plan: Plan) -> Plan:
        """The plan of all processes, of the smallest tile that one of them chose by its free memory. Raises ValueError,
        on every one, where two were asked for something else: they would wait for each other."""
        Ranks().agree({name: getattr(plan, name) for name in ASKED})
        return dataclasses.replace(plan, tile=self._smallest(plan.tile))

    def _smallest(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Of the tiles that processes which work together chose by their free memory."""
        if not self.together:
            return tile
        tiles: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(tiles, tile)
        return min(tiles, key=lambda tile: (math.prod(tile), tile))

    def _fit(
        self, frames: int, size: tuple[int, int], impl: str, *, held: bool = True, at_once: int | None = None
    ) -> tuple[int, int]:
        """The tile to decode with. Raises `TooLargeError` for a clip of which `at_once` frames, by default all, are
        drawn together, where there is not the memory for it."""
        self.turns.leave()
        free, padded = machine.available(self.device) - self.turns.largest, self._padded(frames)
        tile, needed = self._memory(padded, *size, impl, held, free, at_once)
        if needed > free:
            raise TooLargeError(
                f"{size[1]}x{size[0]} with {frames} frames needs about {gib(needed)} and {machine.left(free)}; "
                + self._would_fit(padded, *size, impl, held, free)
            )
        return tile

    def _long(self, long: Any, frames: int, attention: AttentionMode | None) -> str:
        if long not in (None, *LONG):
            raise ValueError(f"long must be one of {', '.join(LONG)} or None; got {long!r}")
        able = self.vae.config.temporal_factor == self.dit.config.patch[0] == 1 and self.defaults.frames > CHUNK
        if long is None:
            return "stream" if able and attention is None and frames > self.defaults.frames else "once"
        if long != "once" and not able:
            raise ValueError(
                f"long={long!r} needs a checkpoint whose latents and tokens are single frames; this one has once only"
            )
        return long

    def _remarks(
        self,
        prompt: str,
        frames: int,
        size: tuple[int, int],
        latents: Sequence[int],
        steps: int,
        guidance: float | tuple[float, float],
        seen: int | None,
    ) -> Iterator[str]:
        """What is worth knowing before the work begins."""
        own, defaults = isinstance(self.text, WordTextEncoder), self.defaults
        if own and (size != tuple(defaults.size) or frames > defaults.frames):
            made_for = f"{defaults.size[1]}x{defaults.size[0]} and up to {defaults.frames} frames"
            yield f"this checkpoint was trained on {made_for}; others may look wrong"
        if unknown := self.text.unknown(prompt):
            yield f"this checkpoint does not know: {', '.join(unknown)}. It knows: {', '.join(self.text.words)}"
        how = {"steps": steps, "guidance": max(flow.pair(guidance)), "seen": seen}
        duration = estimate.seconds(self.dit, self.vae, latents, **how)
        if duration > estimate.LONG:
            yield f"this takes {estimate.in_words(duration)} on this machine, guessed from its rate of multiplication"

    def _padded(self, frames: int) -> int:
        """As many frames or a few more: those of latents that patches divide."""
        factor, patch = self.vae.config.temporal_factor, self.dit.config.patch[0]
        latents = math.ceil((frames - 1) / factor) + 1
        return (math.ceil(latents / patch) * patch - 1) * factor + 1

    def _check_size(self, size: Any) -> tuple[int, int]:
        try:
            height, width = size
        except (TypeError, ValueError):
            raise ValueError(f"size must be (height, width), got {size!r}") from None
        for name, side, patch in (
            ("height", height, self.dit.config.patch[1]),
            ("width", width, self.dit.config.patch[2]),
        ):
            unit, most = self.vae.config.spatial_factor * patch, limits.current().side
            whole = isinstance(side, Integral) and not isinstance(side, bool)
            if not whole or not unit <= side <= most:
                raise ValueError(f"size: the {name} must be a whole number from {unit} to {most}, got {side!r}")
            if side % unit:
                below = side // unit * unit
                raise ValueError(
                    f"size: the {name} must be a multiple of {unit}, got {side}; {below} or {below + unit} would fit"
                )
        return int(height), int(width)

    def _memory(
        self, frames: int, height: int, width: int, impl: str, held: bool, free: int, at_once: int | None = None
    ) -> tuple[tuple[int, int], int]:
        """The tile to decode with, and about the bytes that a clip needs beyond the weights.

        Those of the larger of its two stages, the first of `at_once` frames, by default all, and, where the clip is
        `held`, of its frames.
        """
        dit, vae = self.dit.config, self.vae.config
        cells = math.prod(vae.latent_shape(at_once or frames, height, width)[1:])
        tokens = 2 * cells // math.prod(dit.patch)
        wide = self.dit.patch_embedding.weight.element_size()
        denoise = tokens * (10 * dit.dim + 2 * dit.ffn_dim) * wide + 8 * cells * vae.z_dim * 4
        denoise += fp8.room([weight.shape for weight in fp8.kept(self.dit)])
        if impl == "reference":
            denoise += 3 * dit.heads * tokens * tokens * 2
        clip = 2 * frames * height * width * 3 if held else 0
        tile, decode = self.vae.fit_tile("decode", height, width, free - clip, impl=impl)
        return tile, max(denoise, decode) + clip

    def _would_fit(self, frames: int, height: int, width: int, impl: str, held: bool, free: int) -> str:
        def fits(frames: int, height: int, width: int) -> bool:
            return self._memory(self._padded(frames), height, width, impl, held, free)[1] <= free

        factor = self.vae.config.temporal_factor
        shorter = next((n for n in _halving(frames - 1, factor) if fits(n + 1, height, width)), None)
        units = [self.vae.config.spatial_factor * patch for patch in self.dit.config.patch[1:]]
        smaller = next(
            (
                (h, w)
                for h, w in ((_down(height >> k, units[0]), _down(width >> k, units[1])) for k in range(1, 14))
                if fits(frames, h, w)
            ),
            None,
        )
        offers = []
        if smaller:
            offers.append(f"{smaller[1]}x{smaller[0]} with as many frames")
        if shorter is not None:
            offers.append(f"{shorter + 1} frames at this size")
        return f"{' or '.join(offers)} would fit" if offers else "ask for a smaller and shorter clip"


class Sizes(Planning):
    """A model of which nothing but the sizes is there: what clips would take."""

    def __init__(self, dit: DiTConfig, vae: VAEConfig, dtype: torch.dtype) -> None:
        with unfilled():
            self.dit, self.vae = SoraDiT(dit).to_dtype(dtype), CausalVAE(vae)

    def clip(self, frames: int, height: int, width: int, free: int) -> tuple[int, str]:
        """About the bytes that a clip written to a file takes beyond the weights, and what fits where they are more
        than are free."""
        frames = self._padded(frames)
        needed = self._memory(frames, height, width, "auto", False, free)[1]
        return needed, "" if needed <= free else self._would_fit(frames, height, width, "auto", False, free)


def number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {value}")
    return float(value)


def whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {value}")
    return int(value)


def _halving(n: int, unit: int) -> Iterator[int]:
    while n > 0:
        n = _down(n // 2, unit) if n >= 2 * unit else 0
        yield n


def _down(n: int, unit: int) -> int:
    return max(unit, n // unit * unit)
