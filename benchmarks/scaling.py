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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from sora_model import estimate, tiling
from sora_model.attention import AttentionMode
from sora_model.checkpoint import unfilled
from sora_model.dit import SoraDiT
from sora_model.divided import reach
from sora_model.parallel import cut, frames_seen
from sora_model.presets import DIT, SHAPES
from sora_model.tiling import Window
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of the VAE and what it is given: frames, and a size of which it takes each element `up` times, or
    steps of `down`."""

    conv: nn.Conv3d
    frames: int
    size: tuple[int, int]
    up: int = 1
    down: int = 1

    def flops(self, rows: float) -> float:
        """Of so many rows that it is given."""
        return 2 * self.frames * rows * self.size[1] * self.up**2 / self.down**2 * self.conv.weight.numel()

    @property
    def reach(self) -> tuple[int, int]:
        return reach(self.conv.kernel_size[1], self.up, self.down)


def layers(vae: CausalVAE, kind: str, frames: int, size: Sequence[int], starts: bool) -> Iterator[Layer]:
    """Of a chunk of `frames` latent frames of `size`, which begins a clip or does not; those of shortcuts left out."""
    encode, (network, now) = kind == "encode", (vae.decoder, tuple(size))
    if encode:
        network, now = vae.encoder, tuple(n * vae.config.spatial_factor for n in size)
    mid = [conv for block in network.mid_block.resnets for conv in (block.conv1, block.conv2)]
    at_latents = [
        Layer(conv, frames, tuple(size)) for conv in ([*mid, network.conv_out] if encode else [network.conv_in, *mid])
    ]
    yield from () if encode else at_latents
    t = starts + (frames - starts) * (vae.config.temporal_factor if encode else 1)
    for stage in network.stages:
        (longer, up, _), (shorter, down, _) = stage.up, stage.down
        if stage.past is not None and longer > 1:
            yield Layer(stage.past, t - starts, now)
            t = starts + (t - starts) * longer
        for conv in stage.convs:
            yield Layer(conv, t, now, up, down)
        now = now[0] * up // down, now[1] * up // down
        if stage.past is not None and shorter > 1:
            t = starts + (t - starts) // shorter
            yield Layer(stage.past, t - starts, now)
    yield from at_latents if encode else ()


def gathered(vae: CausalVAE, kind: str, frames: int, size: Sequence[int], starts: bool) -> int:
    """Numbers of what a chunk comes to, of which each rank has a part and gets the rest."""
    if kind == "encode":
        return 2 * vae.config.z_dim * frames * math.prod(size)
    t = starts + (frames - starts) * vae.config.temporal_factor
    return vae.config.out_channels * t * math.prod(size) * vae.config.spatial_factor**2


def rows_sent(
    vae: CausalVAE, kind: str, frames: int, size: Sequence[int], rank: int, ranks: int, starts: bool
) -> tuple[int, int]:
    """Numbers that a rank sends of a chunk of one clip divided by rows, and how often it exchanges some."""
    sent = exchanges = 0
    for layer in layers(vae, kind, frames, size, starts):
        above, below = layer.reach
        rows = above * (rank + 1 < ranks) + below * (rank > 0)  # what its neighbours see of its band
        sent += layer.conv.in_channels * layer.frames * layer.size[1] * rows
        exchanges += any(layer.reach)
    start, stop = cut(0, size[0], ranks)[rank]
    network = vae.encoder if kind == "encode" else vae.decoder
    whole = 2 * network.mid_block.attention.proj.in_features * frames * math.prod(size)  # keys and values
    whole += gathered(vae, kind, frames, size, starts)
    return sent + whole * (stop - start) // size[0] * (ranks - 1), exchanges + 2


def tile_flops(vae: CausalVAE, window: Window, starts: bool) -> float:
    """Of the convolutions that make `window` of what a latent frame comes to."""
    flops, t, stages = 0.0, 1, vae.decoder.stages
    for stage, (rows, columns) in zip(stages, tiling.needed(stages, window), strict=False):
        area = rows.stop - rows.start, columns.stop - columns.start
        if stage.past is not None:
            flops += Layer(stage.past, t - starts, area).flops(area[0])
            t = starts + (t - starts) * stage.up[0]
        flops += sum(Layer(conv, t, area, stage.up[1], stage.down[1]).flops(area[0]) for conv in stage.convs)
    return flops


def band_flops(vae: CausalVAE, size: Sequence[int], rank: int, ranks: int, starts: bool) -> float:
    """The same of a rank's rows, with those that it fetches."""
    start, stop = cut(0, size[0], ranks)[rank]
    flops = 0.0
    for layer in layers(vae, "decode", 1, size, starts):
        above, below = layer.reach
        beside = above * (rank > 0) + below * (rank + 1 < ranks)
        flops += layer.flops(layer.size[0] * (stop - start) / size[0] + beside)
    return flops


def of_clip(frames: int, count: Callable[..., float], *args: Any) -> float:
    """What `count` says of each chunk of one latent frame."""
    return count(*args, True) + (frames - 1) * count(*args, False)


def decode(clip: str, ranks: int) -> tuple[str, ...]:
    """The VAE's decoder, a latent frame a chunk, over ranks in tiles and in rows: the most work and bytes of a rank."""
    with unfilled():
        vae = CausalVAE(VAEConfig())
    frames, *size = (n * p for n, p in zip(SHAPES[MODEL].clips[clip], DIT[MODEL].patch, strict=True))
    pixels, width = math.prod(size), vae.decoder.mid_block.attention.proj.in_features
    attention = (8 * width**2 + 4 * width * pixels) * pixels * frames
    whole = of_clip(frames, band_flops, vae, size, 0, 1) + attention
    tile = tiling.shared(None, size, ranks)
    grid = [window for row in tiling.windows(vae.decoder.stages, size, tile) for window in row]
    tiled = of_clip(frames, tile_flops, vae, tiling.windows(vae.decoder.stages, size, size)[0][0])
    in_tiles = whole - tiled + max(of_clip(frames, tile_flops, vae, window) for window in grid)
    largest = max(math.prod(span.stop - span.start for span in window) for window in grid)
    video = of_clip(frames, gathered, vae, "decode", 1, size)
    by_tiles = 4 * video * largest / (pixels * vae.config.spatial_factor**2) * (ranks - 1)
    in_rows = by_rows = 0.0
    for rank, (start, stop) in enumerate(cut(0, size[0], ranks)):
        work = of_clip(frames, band_flops, vae, size, rank, ranks) + attention * (stop - start) / size[0]
        numbers = of_clip(frames, lambda *args: rows_sent(*args)[0], vae, "decode", 1, size, rank, ranks)
        in_rows, by_rows = max(in_rows, work), max(by_rows, 4 * numbers)
    _, exchanges = rows_sent(vae, "decode", 1, size, 0, ranks, True)
    return (
        clip, str(ranks), f"{tile[0]}x{tile[1]}", f"{in_tiles / whole * ranks:.2f}", f"{by_tiles / 1e9:.2f}", "1",
        f"{in_rows / whole * ranks:.2f}", f"{by_rows / 1e9:.2f}", str(exchanges),
    )  # fmt: skip


def decodes() -> Iterator[tuple[str, ...]]:
    columns = "work", "sent, GB", "exchanges a chunk"
    yield "clip", "ranks", "tiles, latents", *columns, *(f"rows: {column}" for column in columns)
    for clip in SHAPES[MODEL].clips:
        yield from (decode(clip, ranks) for ranks in (2, 4, 8))


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
