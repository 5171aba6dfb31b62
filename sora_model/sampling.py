"""A prompt made into latents: all frames at once, or one chunk after another in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import flow
from .attention import AttentionMode
from .conditioning import Known, conditioned, place
from .dit import SoraDiT
from .experts import Experts
from .machine import Turns
from .memory import Memory
from .text import UMT5TextEncoder, WordTextEncoder


class Sampler:
    """A transformer that follows one prompt. Latents are normalised, fp32, on the transformer's device, of one clip.

    steps, guidance, shift  of the solver, as `Sora.generate` has them
    negative                what the guidance leads away from
    second, boundary        a transformer for times below the boundary, 0 to 1: Wan 2.2's expert of little noise
    experts                 where one of the two is on other ranks, and has no weights here
    solver                  integrates the velocity: `flow.sample`, or what is called like it
    attention               mode of self-attention; None: the model's own, and causal by frames in a stream
    turns                   called with each part before it is at work
    clock                   called before each evaluation; raises where the time is over
    """

    def __init__(
        self,
        dit: SoraDiT,
        text: WordTextEncoder | UMT5TextEncoder,
        prompt: str,
        *,
        steps: int,
        guidance: float | tuple[float, float],
        shift: float,
        negative: str = "",
        second: SoraDiT | None = None,
        boundary: float = 0.0,
        experts: Experts | None = None,
        solver: Callable[..., Tensor] = flow.sample,
        attention: AttentionMode | None = None,
        impl: str = "auto",
        turns: Turns | None = None,
        clock: Callable[[], None] = lambda: None,
    ) -> None:
        self.dit, self.steps, self.guidance, self.shift = dit, steps, flow.pair(guidance), shift
        self.second, self.boundary, self.solver = second, boundary, solver
        self.attention, self.impl, self.clock, self.experts = attention, impl, clock, experts
        if experts is None and any(part.head_table.is_meta for part in (dit, second) if part is not None):
            raise ValueError("this process has one of two experts: sample inside of parallel.sampling, on two or more")
        weight = dit.patch_embedding.weight
        self.turns = turns or Turns(weight.device)
        self.dtype, self.device = weight.dtype, self.turns.device
        self.turns(text)
        states, lens = text.encode([prompt, negative])
        states = states.to(self.device, self.dtype)
        lens = lens.to(self.device) if text.masks_padding else None
        self._texts = [(states[i : i + 1], None if lens is None else lens[i : i + 1]) for i in range(2)]

    @torch.no_grad()
    def draw(
        self,
        noise: Tensor,
        known: Known | None = None,
        *,
        clip: Tensor | None = None,
        strength: float = 1.0,
        frames: Tensor | None = None,
        image: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents `[1, C, T', H', W']` from noise of that shape.

        known     cells that keep their latents
        frames    `[1, C', T', H', W']`: further channels, for a transformer that sees given frames there
        image     `[1, I, image_dim]`: their tokens, for one that sees them beside the text
        clip      with it, what is left of these latents after noise of `strength` (0 to 1) is the beginning
        """
        x = noise if clip is None else flow.interpolate(clip, noise, noise.new_full((1,), strength))
        velocity = self.velocity(frames=frames, image=image)
        if known is not None:
            velocity, x = conditioned(velocity, known, self.dit.config.patch), known.hold(x)
        start = 1.0 if clip is None else strength
        return self.solver(velocity, x, steps=self.steps, shift=self.shift, start=start, progress=progress)

    @torch.no_grad()
    def stream(
        self,
        shape: tuple[int, int, int, int],
        *,
        generator: torch.Generator,
        begins: Tensor | None = None,
        chunk: int = 4,
        window: int = 16,
        sink: int = 1,
    ) -> Iterator[Tensor]:
        """Latents `[1, C, t, H', W']` of a clip of `shape` (C, T', H', W'), `chunk` frames at a time.

        Frames see the last `window` frames and the first `sink` ones. `begins` are latents that the clip goes on from:
        they count as its first frames and are not given back. Memory does not grow with T'.
        """
        channels, frames, *size = shape
        memory = Memory(window, sink)
        for part in () if begins is None else begins.split(chunk, 2):
            self._remember(part, memory)
        while memory.frames < frames:
            count = min(chunk, frames - memory.frames)
            noise = flow.draw_noise((1, channels, count, *size), generator=generator, device=self.device)
            x = self.solver(self.velocity(memory), noise, steps=self.steps, shift=self.shift)
            self._remember(x, memory)
            yield x

    @torch.no_grad()
    def pieces(
        self,
        shape: tuple[int, int, int, int],
        *,
        generator: torch.Generator,
        length: int,
        overlap: int,
        begins: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """As `stream`, `length` frames at a time of which the first `overlap` are the last of the piece before: known,
        and seen both ways. For latents that are frames."""
        channels, frames, *size = shape
        tail = torch.zeros((1, channels, 0, *size), device=self.device) if begins is None else begins[:, :, -overlap:]
        done = 0 if begins is None else begins.shape[2]
        while done < frames:
            held = tail.shape[2]
            count = min(length, held + frames - done)
            noise = flow.draw_noise((1, channels, count, *size), generator=generator, device=self.device)
            x = self.draw(noise, place(noise.shape, {0: tail}) if held else None)
            yield x[:, :, held:]
            done, tail = done + count - held, x[:, :, -overlap:]

    def _remember(self, x: Tensor, memory: Memory) -> None:
        times = x.new_zeros(1)
        self.velocity(memory, remember=True)(x, times)

    def velocity(
        self,
        memory: Memory | None = None,
        remember: bool = False,
        frames: Tensor | None = None,
        image: Tensor | None = None,
    ) -> flow.Velocity:
        """That of the prompt, guided: of latents that the memory goes before, and that are remembered in it or not."""
        image = None if image is None else image.to(self.device, self.dtype)

        def guided(dit: SoraDiT, guidance: float) -> flow.Velocity:
            def model(x: Tensor, t: Tensor, text: Tensor, lens: Tensor | None) -> Tensor:
                options = {"attention": self.attention, "memory": memory, "remember": remember, "impl": self.impl}
                if image is not None:
                    options["image"] = image.expand(len(x), -1, -1)
                if frames is not None:
                    x = torch.cat([x, frames.to(x).expand(len(x), -1, -1, -1, -1)], 1)
                self.clock()
                self.turns(dit)
                return dit(x.to(self.dtype), (flow.TIME_SCALE * t).float(), text, lens, **options).float()

            return flow.guided(model, *self._texts, guidance)

        noisy = guided(self.dit, self.guidance[0])
        if self.second is None:
            return noisy
        clean = guided(self.second, self.guidance[1])
        if self.experts is not None:
            noisy, clean = self.experts.shared((noisy, clean), torch.cat([text for text, _ in self._texts], 1))
        return lambda x, t: (noisy if t.max() >= self.boundary else clean)(x, t)
