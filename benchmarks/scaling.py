"""What ranks send each other, counted, and what that would make of a node of 8 GPUs: a prediction, never measured.

    python -m benchmarks.scaling            # the tables of docs/distributed.md

Bytes and products follow from the model and the layout alone; `sent` is held to what 2 and 4 processes do send
(tests/test_model_parallel.py). Seconds follow from them and from the rates of `Machine`, which are assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from sora_model import estimate, tiling
from sora_model.attention import AttentionMode
from sora_model.checkpoint import unfilled
from sora_model.dit import SoraDiT
from sora_model.parallel import cut, frames_seen
from sora_model.presets import DIT, SHAPES
from sora_model.tiling import Stage, Window
from sora_model.vae import CausalVAE, VAEConfig

MODEL, STEPS, BF16 = "wan2.1-14b", 50, 2
LAYOUTS = {  # clips, ring, ulysses
    "1": (1, 1, 1), "clips 2": (2, 1, 1), "clips 2, ulysses 4": (2, 1, 4), "clips 2, ring 4": (2, 4, 1),
    "clips 2, ring 2, ulysses 2": (2, 2, 2), "ulysses 8": (1, 1, 8), "ring 8": (1, 8, 1),
}  # fmt: skip
MODES = ("window=9x30x52", "window=9x30x52,sink=1", "causal=frame")
# a block's reads and writes of [tokens, width] outside of products and self-attention: norm_modulate 2,
# qk_norm_rope 4, gate_residual_norm_modulate 4 + 4, the norm of the cross-attention's queries 2, that attention 2,
# gate_residual 3; GELU adds two of the feed-forward's width
PASSES = 21


@dataclasses.dataclass(frozen=True)
class Machine:
    """What an H200 is assumed to reach: of 989 TFLOP/s in bf16, of 4.8 TB/s of HBM3e, and of the 450 GB/s that NVLink
    gives a GPU in each direction; seconds for an exchange to begin."""

    products: float = 400e12
    attention: float = 400e12
    memory: float = 3.6e12
    link: float = 350e9
    begin: float = 20e-6


def sent(tokens: int, width: int, itemsize: int, *, ring: int = 1, ulysses: int = 1, backward: bool = False) -> float:
    """Bytes that a rank sends in the self-attention of one layer and one clip, of shares that are equal."""
    own = tokens / (ring * ulysses) * width  # numbers of a rank's tokens; as many in its heads of its chunk
    swapped = 4 * own * itemsize * (ulysses - 1) / ulysses
    return swapped + (ring - 1) * 2 * own * (itemsize + 4 * backward)  # dk, dv come home in fp32


def fetched(frames: int, ranks: int, mode: AttentionMode) -> int:
    """Frames of keys and values that ranks along the ring fetch of others, all together."""
    return sum(
        len(set(range(*seen)) - set(range(start, stop)))
        for start, stop in cut(0, frames, ranks)
        for seen in frames_seen(frames, start, stop, mode)
    )


def weak_scaling(tokens: int = 4096) -> Iterator[tuple[str, ...]]:
    """Of as many tokens a rank, whatever their number."""
    width = DIT[MODEL].dim
    yield "ranks", "tokens", "ring, MB", "Ulysses, MB", "halo of a frame, MB", "attention, TFLOP"
    for ranks in (1, 2, 4, 8):
        ring, ulysses = (sent(ranks * tokens, width, BF16, **{how: ranks}) for how in ("ring", "ulysses"))
        halo = 2 * math.prod(SHAPES[MODEL].clips["480x832x81"][1:]) * width * BF16 * (ranks > 1)
        flops = 4 * ranks * tokens**2 * width
        yield str(ranks), str(ranks * tokens), *(f"{n / 1e6:.0f}" for n in (ring, ulysses, halo)), f"{flops / 1e12:.2f}"


def halos() -> Iterator[tuple[str, ...]]:
    frames = SHAPES[MODEL].clips["480x832x81"][0]
    yield "mode, 21 frames", *(f"{ranks} ranks" for ranks in (2, 4, 8))
    for mode in MODES:
        yield mode, *(str(fetched(frames, ranks, AttentionMode.parse(mode))) for ranks in (2, 4, 8))
    yield "full, by a ring", *(str(frames * (ranks - 1)) for ranks in (2, 4, 8))


@functools.cache
def flops(clip: str) -> int:
    """Of one evaluation, text left out."""
    config, grid = DIT[MODEL], SHAPES[MODEL].clips[clip]
    with unfilled():
        dit = SoraDiT(config)
    latents = config.in_channels, *(n * p for n, p in zip(grid, config.patch, strict=True))
    return estimate.denoise_flops(dit, latents, evaluations=1)


def step(clip: str, layout: Sequence[int], machine: Machine) -> tuple[float, float, float, float, float]:
    """Of a step under guidance: GB that a rank sends, and seconds of products, attention, memory and waiting."""
    config, (clips, ring, ulysses) = DIT[MODEL], layout
    tokens, share, evaluations = SHAPES[MODEL].tokens(clip), ring * ulysses, 2 / clips
    attention = 4 * tokens**2 * config.dim * config.layers * evaluations / share
    products = flops(clip) * evaluations / share - attention
    products += 4 * SHAPES[MODEL].text * config.dim**2 * config.layers * evaluations  # keys and values: on every rank
    passes = (PASSES * config.dim + 2 * config.ffn_dim) * BF16 + 3 * 4 * config.dim * (ring - 1)  # parts in fp32
    read = passes * config.layers * evaluations * tokens / share / machine.memory
    swapped = sent(tokens, config.dim, BF16, ulysses=ulysses) / ring * config.layers * evaluations
    rounds = sent(tokens, config.dim, BF16, ring=ring, ulysses=ulysses) * config.layers * evaluations - swapped
    velocity = tokens / share * config.out_channels * math.prod(config.patch) * BF16 * evaluations
    gathered = velocity * (clips * share - 1)
    computed = attention / machine.attention
    swaps = 0 if ulysses == 1 else 2 * config.layers * evaluations * machine.begin
    waiting = (swapped + gathered) / machine.link + swaps + max(0, rounds / machine.link - computed)
    return (swapped + rounds + gathered) / 1e9, products / machine.products, computed, read, waiting


def prediction(clip: str, machine: Machine) -> Iterator[tuple[str, ...]]:
    parts = "products, s", "attention, s", "memory, s", "waiting, s"
    yield clip, "GPUs", "sent a step, GB", *parts, f"{STEPS} steps, s", "times as fast"
    alone = sum(step(clip, LAYOUTS["1"], machine)[1:])
    for name, layout in LAYOUTS.items():
        gigabytes, *seconds = step(clip, layout, machine)
        total = sum(seconds)
        parts = (f"{part:.2f}" for part in seconds)
        yield name, str(math.prod(layout)), f"{gigabytes:.1f}", *parts, f"{STEPS * total:.0f}", f"{alone / total:.1f}"


def areas(stages: Sequence[Stage], window: Window) -> Iterator[tuple[Stage, Window]]:
    """What each stage is given for `window` of the result."""
    return zip(stages, tiling.needed(stages, window), strict=False)


def work(stages: Sequence[Stage], window: Window, frames: int) -> float:
    """Floating-point operations of the convolutions that make `window` of the result."""
    flops = 0.0
    for stage, (rows, columns) in areas(stages, window):
        frames = frames * stage.up[0] / stage.down[0]
        pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
        for axis in (1, 2):
            pixels = pixels * stage.up[axis] / stage.down[axis]
        flops += 2 * frames * pixels * sum(conv.weight.numel() for conv in stage.convs)
        past = 0 if stage.past is None else stage.past.weight.numel() / (stage.up[0] * stage.up[1] * stage.up[2])
        flops += 2 * frames * pixels * past
    return flops


def decode(clip: str, ranks: int = 8) -> tuple[str, ...]:
    """The VAE's decoder in tiles over ranks as it is, and what rows with a halo for each convolution would send."""
    with unfilled():
        vae = CausalVAE(VAEConfig())
    stages, mid = vae.decoder.stages, vae.decoder.mid_block
    frames, *size = (n * p for n, p in zip(SHAPES[MODEL].clips[clip], DIT[MODEL].patch, strict=True))
    whole = work(stages, tiling.windows(stages, size, size)[0][0], frames)
    tile = tiling.shared(None, size, ranks)
    shares = [work(stages, window, frames) for row in tiling.windows(stages, size, tile) for window in row]
    pixels = 3 * (1 + 4 * (frames - 1)) * math.prod(size) * vae.config.spatial_factor**2 * 4
    halo, exchanges, t, width = 0, 0, frames, size[1]
    for stage in stages:
        t *= stage.up[0]
        for conv in (conv for conv in stage.convs if conv.kernel_size[1] > 1):
            halo, exchanges = halo + 2 * conv.in_channels * t * width * 4, exchanges + 1
        width *= stage.up[2]
    everywhere = [vae.decoder.conv_in, *(conv for block in mid.resnets for conv in (block.conv1, block.conv2))]
    alone = 2 * frames * math.prod(size) * sum(conv.weight.numel() for conv in everywhere)
    rows = max(stop - start for start, stop in cut(0, size[0], ranks)) / size[0]
    return (
        clip, f"{len(shares)} of {tile[0]}x{tile[1]}", f"{max(shares) / whole * ranks:.2f}",
        f"{pixels * (ranks - 1) / ranks / 1e9:.2f}", f"{rows * ranks:.2f}", f"{halo / 1e9:.2f}", str(exchanges),
        f"{alone / whole * ranks:.2f}",
    )  # fmt: skip


def decodes() -> Iterator[tuple[str, ...]]:
    tiled, rows = ("tiles, latents", "their work", "sent, GB"), ("rows' work", "sent, GB", "exchanges a chunk")
    yield "clip", *tiled, *rows, "undivided"
    yield from map(decode, SHAPES[MODEL].clips)


def table(rows: Iterator[tuple[str, ...]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def tables() -> list[str]:
    """In the order of the page."""
    machine = Machine()
    predicted = [table(prediction(clip, machine)) for clip in SHAPES[MODEL].clips]
    return [table(weak_scaling()), table(halos()), table(decodes()), *predicted]


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0]).parse_args()
    print("\n\n".join(tables()))
