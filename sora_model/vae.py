"""The causal video VAE of Wan: pixels to latents, 4x smaller in time, 8x8 in space (2.1) or 16x16 (2.2), and back.

Causal in time: frame t depends on frames up to t only, and the first frame of a clip is coded alone. So a clip of
4n+1 frames has n+1 latent frames, and both directions run chunk by chunk in constant memory: `encode_chunk` and
`decode_chunk` take what the layers remember of the past and return it anew; the modules themselves keep nothing.
Source: Wan, arXiv 2503.20314, section 4.1.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels import downsample_conv3d, norm_modulate, upsample_conv3d

from . import checks, tiling
from .divided import Sharers
from .stream import EPS, LAYOUT, Pass, VAECache, joined, regroup
from .tiling import Shortcut, Stage, Tile

# what one chunk holds at once, in tensors of its largest layer: of the resident set on a CPU, allocator's gaps included
_TENSORS = {"auto": 16, "reference": 52}


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `CausalVAE`; the defaults are Wan 2.1's. JSON: `VAEConfig(**json.loads(json.dumps(asdict(config))))`.

    base_dim             channels at full resolution; level i has base_dim * dim_mult[i]
    z_dim                channels of the latents
    num_res_blocks       residual blocks per level of the encoder; the decoder has one more
    temporal_downsample  for each step between two levels: halve the frames as well as height and width?
    decoder_base_dim     base_dim of the decoder where it differs
    patch                pixels of a side that are folded into channels before the first level, as Wan 2.2 does it
    residual             a shortcut without weights around each level, Wan 2.2's: neighbours averaged, or repeated
    latents_mean/_std    [z_dim] each, of the latents over the training set; None: zeros and ones
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    decoder_base_dim: int | None = None
    patch: int = 1
    residual: bool = False
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            if getattr(self, name) is not None or not name.startswith("latents"):
                object.__setattr__(self, name, checks.several(f"VAEConfig: {name}", getattr(self, name)))
        names = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels", "decoder_dim")
        for name, size in [*((name, getattr(self, name)) for name in names), *(("dim_mult", m) for m in self.dim_mult)]:
            checks.whole(f"VAEConfig: {name}", size, 1, 4096)
        checks.whole("VAEConfig: patch", self.patch, 1, 16)
        checks.flag("VAEConfig: residual", self.residual)
        if not 0 < len(self.dim_mult) <= 8:
            raise ValueError(f"VAEConfig: dim_mult must name 1 to 8 levels; got {self.dim_mult}")
        steps = self.temporal_downsample
        if len(steps) != len(self.dim_mult) - 1 or not all(isinstance(step, bool) for step in steps):
            raise ValueError(
                f"VAEConfig: temporal_downsample must be {len(self.dim_mult) - 1} booleans, one per step between the "
                f"levels of dim_mult={self.dim_mult}; got {steps}"
            )
        if self.parameters > 10**10:
            raise ValueError(f"VAEConfig: no VAE has {self.parameters:,} parameters; give smaller sizes")
        if self.residual:
            mults, near = self.dim_mult, [8 if step else 4 for step in steps]
            folded = zip((1, *mults), mults, [*near, 1], strict=False)
            repeated = zip(mults[::-1], (mults[-1], *mults[::-1]), near[::-1], strict=False)
            if any(mult * count % other for mult, other, count in [*folded, *repeated]):
                raise ValueError(
                    f"VAEConfig: residual: the channels of neighbouring levels must divide each other, so that a "
                    f"shortcut can average or repeat them; got dim_mult={mults}"
                )
        if not self.residual and any(self.decoder_dim * mult % 2 for mult in self.dim_mult[1:]):
            raise ValueError(
                f"VAEConfig: the decoder halves its channels at each step, so its base width {self.decoder_dim} times "
                f"each of dim_mult[1:]={self.dim_mult[1:]} must be even"
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.z_dim:
                raise ValueError(f"VAEConfig: {name} must be {self.z_dim} numbers (z_dim); got {len(values)}")
            for value in values or ():
                checks.number(f"VAEConfig: {name}", value, 1e-10 if name == "latents_std" else -1e10, 1e10)

    @property
    def decoder_dim(self) -> int:
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def parameters(self) -> int:
        """At least so many numbers the model holds: those of the second convolution of each residual block."""
        blocks = self.num_res_blocks
        return 27 * sum(
            blocks * (self.base_dim * mult) ** 2 + (blocks + 1) * (self.decoder_dim * mult) ** 2
            for mult in self.dim_mult
        )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first, which stands for one."""
        return 2 ** sum(self.temporal_downsample)

    def fitting(self, frames: int) -> int:
        """As many frames or a few more: those of whole latents."""
        return frames + (1 - frames) % self.temporal_factor

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[z_dim, T', H', W'] of a video's latents; ValueError names the sizes that would fit."""
        t, s = self.temporal_factor, self.spatial_factor
        if frames < 1 or (frames - 1) % t:
            below = max((frames - 1) // t * t + 1, 1)
            fits = f"{below} or {below + t}" if frames > 0 else "1"
            raise ValueError(f"a clip must have {t}n+1 frames; got {frames}; {fits} would fit")
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % s:
                below = max(size // s * s, 0)
                fits = f"{below} or {below + s}" if below else f"{s}"
                raise ValueError(f"the {name} of a video must be a multiple of {s}; got {size}; {fits} would fit")
        return self.z_dim, (frames - 1) // t + 1, height // s, width // s


class ResidualBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(dim_in))
        self.conv1 = nn.Conv3d(dim_in, dim_out, 3)
        self.norm2 = nn.Parameter(torch.ones(dim_out))
        self.conv2 = nn.Conv3d(dim_out, dim_out, 3)
        self.conv_shortcut = nn.Conv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, C, T, H, W]
        skip = x if self.conv_shortcut is None else run.conv(x, self.conv_shortcut)  # [B, C', T, H, W]
        h = run.norm_silu(x, self.norm1)                                             # [B, C, T, H, W]
        h = run.conv(h, self.conv1, norm_weight=self.norm2, norm_eps=EPS)            # [B, C', T, H, W]
        return run.conv(h, self.conv2, residual=skip)                                # [B, C', T, H, W]

    @property
    def stage(self) -> Stage:
        return Stage(self, (self.conv1, self.conv2))


def averaging(channels: int, down: tuple[int, int, int]) -> Shortcut:
    """Neighbouring frames, rows and columns as channels, of which each group is averaged into one of `channels`."""

    def average(x: Tensor, run: Pass) -> Tensor:                                     # [B, C, T, H, W]
        if down[0] > 1 and run.starts:  # the first frame has none beside it but zeros
            x = F.pad(x, (0, 0, 0, 0, down[0] - 1, 0))
        height, width = (n // factor * factor for n, factor in zip(x.shape[3:], down[1:], strict=True))
        x = x[..., :height, :width]
        for axis, factor in zip((4, 3, 2), reversed(down), strict=True):
            x = x.unflatten(axis, (-1, factor))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)                          # [B, C·ft·fh·fw, T', H', W']
        return x.unflatten(1, (channels, -1)).mean(2)                                # [B, C', T', H', W']

    return Shortcut(average, down=down)


def repeating(channels: int, up: tuple[int, int, int]) -> Shortcut:
    """The inverse order: channels, each as often as it takes, as neighbouring frames, rows and columns."""

    def repeat(x: Tensor, run: Pass) -> Tensor:                                      # [B, C, T, H, W]
        x = x.repeat_interleave(channels * math.prod(up) // x.shape[1], 1)           # [B, C'·ft·fh·fw, T, H, W]
        x = x.unflatten(1, (channels, *up)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)                              # [B, C', T', H', W']
        return x[:, :, up[0] - 1 :] if run.starts else x  # the first frame stays one

    return Shortcut(repeat, up=up)


class AttentionBlock(nn.Module):
    """Attention of one head among the pixels of each frame; frames do not see each other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, C, T, H, W]
        B, C, T, H, W = x.shape
        h = x.permute(0, 2, 3, 4, 1).reshape(B * T, H * W, C)                        # [BT, HW, C]
        h = norm_modulate(h, None, None, norm="rms", weight=self.norm, eps=EPS, impl=run.impl)
        q, k, v = self.to_qkv(h).unflatten(-1, (3, 1, C)).unbind(2)                  # 3 x [BT, HW, 1, C]
        h = run.attention(q, k, v).flatten(2)                                        # [BT, HW, C]
        h = self.proj(h).view(B, T, H, W, C).permute(0, 4, 1, 2, 3)                  # [B, C, T, H, W]
        return x + h


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attention = AttentionBlock(dim)

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, C, T, H, W]
        return self.resnets[1](self.attention(self.resnets[0](x, run), run), run)


class Downsample(nn.Module):
    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Conv3d(dim, dim, (1, 3, 3))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, C, T, H, W]
        x = run.conv(x, self.resample, downsample_conv3d, factor=(1, 2, 2))          # [B, C, T, H/2, W/2]
        if self.time_conv is None:
            return x
        # the first frame stays as it is; the others become one per pair, which sees the frame before it too
        if run.starts:
            first, x, before = x[:, :, :1], x[:, :, 1:], x[:, :, :1]
        else:
            first, before = x[:, :, :0], run.past.popleft()
        weight, bias = self.time_conv.weight, self.time_conv.bias
        x, last = downsample_conv3d(x, weight, bias, factor=(2, 1, 1), cache=before, impl=run.impl)
        if run.streaming:
            run.future.append(last)
        return joined(first, x)                                                      # [B, C, T', H/2, W/2]

    @property
    def stage(self) -> Stage:
        return Stage(self, (self.resample,), down=(2 if self.time_conv else 1, 2, 2), past=self.time_conv)


class Upsample(nn.Module):
    def __init__(self, dim: int, dim_out: int, temporal: bool):
        super().__init__()
        self.resample = nn.Conv3d(dim, dim_out, (1, 3, 3))
        self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, C, T, H, W]
        if self.time_conv is not None:
            # the first frame stays as it is, unseen by the others, each of which becomes two
            first, x = (x[:, :, :1], x[:, :, 1:]) if run.starts else (x[:, :, :0], x)
            x = run.conv(x, self.time_conv).unflatten(1, (2, -1))                    # [B, 2, C, T, H, W]
            x = x.permute(0, 3, 1, 4, 5, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)     # [B, C, 2T, H, W]
            x = joined(first, x.contiguous(memory_format=LAYOUT))                    # [B, C, T', H, W]
        return run.conv(x, self.resample, upsample_conv3d, factor=(1, 2, 2))         # [B, C', T', 2H, 2W]

    @property
    def stage(self) -> Stage:
        return Stage(self, (self.resample,), up=(2 if self.time_conv else 1, 2, 2), past=self.time_conv)


class DownBlock(nn.Module):
    """A level of Wan 2.2's encoder."""

    def __init__(self, dim_in: int, dim_out: int, blocks: int, downsampler: Downsample | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim_out if j else dim_in, dim_out) for j in range(blocks))
        self.downsampler = downsampler

    @property
    def stages(self) -> list[Stage]:
        layers = self.resnets if self.downsampler is None else [*self.resnets, self.downsampler]
        stages = [layer.stage for layer in layers]
        channels = self.resnets[-1].conv2.out_channels
        return tiling.bypassed(stages, averaging(channels, stages[-1].down))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.patch = config.patch
        self.conv_in = nn.Conv3d(config.in_channels * config.patch**2, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            temporal = config.temporal_downsample[i : i + 1]
            down = [Downsample(dim_out, *temporal)] if temporal else []
            if config.residual:
                self.down_blocks.append(DownBlock(dim_in, dim_out, config.num_res_blocks, *(down or [None])))
                continue
            for j in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim_out if j else dim_in, dim_out))
            self.down_blocks.extend(down)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = nn.Parameter(torch.ones(dims[-1]))
        self.conv_out = nn.Conv3d(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, 3, T, H, W]
        x = tiling.apply(self.stages, x, run)                                        # [B, C, T', H', W']
        x = self.mid_block(x, run)                                                   # [B, C, T', H', W']
        return run.conv(run.norm_silu(x, self.norm_out), self.conv_out)              # [B, 2Z, T', H', W']

    def fold(self, x: Tensor, run: Pass) -> Tensor:                                  # [B, 3, T, pH, pW]
        p = self.patch
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 6, 4, 2, 3, 5)  # [B, 3, p, p, T, H, W]
        return x.flatten(1, 3).contiguous(memory_format=LAYOUT)                      # [B, 3pp, T, H, W]

    def first(self, x: Tensor, run: Pass) -> Tensor:                                 # [B, 3pp, T, H, W]
        return run.conv(x, self.conv_in)                                             # [B, C, T, H, W]

    @property
    def stages(self) -> list[Stage]:
        """What comes before the first layer that sees a whole frame."""
        folding = [Stage(self.fold, (), down=(1, self.patch, self.patch))] if self.patch > 1 else []
        blocks = (b.stages if isinstance(b, DownBlock) else [b.stage] for b in self.down_blocks)
        return [*folding, Stage(self.first, (self.conv_in,)), *(stage for stages in blocks for stage in stages)]


class UpBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, blocks: int, upsampler: Upsample | None, residual: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim_out if j else dim_in, dim_out) for j in range(blocks))
        self.upsampler, self.residual = upsampler, residual

    @property
    def stages(self) -> list[Stage]:
        stages = [layer.stage for layer in self.resnets]
        if self.upsampler is None:
            return stages
        stages.append(self.upsampler.stage)
        channels = self.upsampler.resample.out_channels
        return tiling.bypassed(stages, repeating(channels, stages[-1].up)) if self.residual else stages


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.decoder_dim * mult for mult in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        self.conv_in = nn.Conv3d(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, dim in enumerate(dims):
            halved = 1 if config.residual else 2  # the channels, by an upsampler
            dim_in = dims[i - 1] // halved if i else dim
            upsampler = Upsample(dim, dim // halved, temporal[i]) if i < len(temporal) else None
            self.up_blocks.append(UpBlock(dim_in, dim, config.num_res_blocks + 1, upsampler, config.residual))
        self.norm_out = nn.Parameter(torch.ones(dims[-1]))
        self.patch = config.patch
        self.conv_out = nn.Conv3d(dims[-1], config.out_channels * config.patch**2, 3)

    def forward(self, x: Tensor, run: Pass) -> Tensor:                               # [B, Z, T', H', W']
        x = self.mid_block(run.conv(x, self.conv_in), run)                           # [B, C, T', H', W']
        return tiling.apply(self.stages, x, run)                                     # [B, 3, T, H, W]

    def last(self, x: Tensor, run: Pass) -> Tensor:                                  # [B, C, T, H, W]
        return run.conv(run.norm_silu(x, self.norm_out), self.conv_out)              # [B, 3pp, T, H, W]

    def unfold(self, x: Tensor, run: Pass) -> Tensor:                                # [B, 3pp, T, H, W]
        p = self.patch
        return x.unflatten(1, (-1, p, p)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)

    @property
    def stages(self) -> list[Stage]:
        """What comes after the last layer that sees a whole frame."""
        unfolding = [Stage(self.unfold, (), up=(1, self.patch, self.patch))] if self.patch > 1 else []
        blocks = (stage for block in self.up_blocks for stage in block.stages)
        return [*blocks, Stage(self.last, (self.conv_out,)), *unfolding]


class CausalVAE(nn.Module):
    """Wan's causal video VAE. Videos are [B, 3, T, H, W] in [-1, 1], T = 4n+1, H and W multiples of 8 (2.2's: 16).

    impl  which implementation of the ops to use, as everywhere in sora_kernels

    Every direction takes `tile`, pixels or (height, width), multiples of as many: the layers between pixels and latents
    then run over tiles no larger than that, which takes less memory at once and more arithmetic (each tile has a border
    of its own) and gives the same values up to rounding. The layers at the size of the latents, of which one sees whole
    frames, are not tiled.
    """

    def __init__(self, config: VAEConfig | None = None, *, impl: str = "auto"):
        super().__init__()
        self.config = config or VAEConfig()
        self._sizes = replace(self.config, latents_mean=None, latents_std=None)  # whose caches fit this model
        self.impl = impl
        self.ranks: Sharers | None = None  # inside of `parallel.tiles_over` and `parallel.rows_over`
        Z = self.config.z_dim
        self.encoder = Encoder(self.config)
        self.quant_conv = nn.Conv3d(2 * Z, 2 * Z, 1)
        self.post_quant_conv = nn.Conv3d(Z, Z, 1)
        self.decoder = Decoder(self.config)
        self.to(memory_format=LAYOUT)
        self.register_buffer("latents_mean", torch.zeros(Z, dtype=torch.float32), persistent=False)
        self.register_buffer("latents_std", torch.ones(Z, dtype=torch.float32), persistent=False)
        self.set_latent_statistics(self.config.latents_mean, self.config.latents_std)

    def forward(
        self, video: Tensor, *, sample: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For training: (reconstruction, mean, logvar); decodes a draw from the posterior, or its mean if not `sample`.

        The reconstruction is not clamped, so that gradients reach values beyond [-1, 1].
        """
        mean, logvar = self.encode(video)
        latents = mean
        if sample:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            latents = mean + torch.exp(0.5 * logvar) * noise
        return self.decode(latents, clamp=False), mean, logvar

    def encode(self, video: Tensor, *, tile: Tile = None) -> tuple[Tensor, Tensor]:
        """The posterior of a whole clip: mean and log-variance, [B, z_dim, 1 + (T-1)/4, H/8, W/8] each."""
        return self._encode(video, self._begin("encode", video, tile))

    def decode(self, latents: Tensor, *, clamp: bool = True, tile: Tile = None) -> Tensor:
        """The whole clip in one pass: [B, 3, 1 + 4(T'-1), 8H', 8W'], clamped to [-1, 1] if `clamp`.

        Memory grows with the clip; `decode_stream` gives the same frames chunk by chunk.
        """
        return self._decode(latents, self._begin("decode", latents, tile), clamp)

    def encode_chunk(
        self, video: Tensor, cache: VAECache | None = None, *, tile: Tile = None
    ) -> tuple[Tensor, Tensor, VAECache]:
        """(mean, logvar, cache) of the next frames of a clip: 4n+1 of them at its start (no cache), 4n later on."""
        run = self._begin("encode", video, tile, cache, streaming=True)
        return *self._encode(video, run), self._cache("encode", video, run)

    def decode_chunk(
        self, latents: Tensor, cache: VAECache | None = None, *, clamp: bool = True, tile: Tile = None
    ) -> tuple[Tensor, VAECache]:
        """(frames, cache) of the next latent frames of a clip: the first of all gives 1 frame, each other one 4."""
        run = self._begin("decode", latents, tile, cache, streaming=True)
        return self._decode(latents, run, clamp), self._cache("decode", latents, run)

    def encode_stream(
        self, video: Tensor | Iterable[Tensor], cache: VAECache | None = None, *, chunk: int = 1, tile: Tile = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(mean, logvar) of `chunk` latent frames at a time, in memory that does not grow with the clip.

        video  [B, 3, T, H, W], or its pieces in order, cut anywhere in time. The whole equals `encode` up to rounding.
        """
        step = self.config.temporal_factor
        first = 1 + step * (chunk - 1) if cache is None else step * chunk
        for piece in self._pieces("encode", video, chunk, first, step * chunk):
            run, cache = self._begin("encode", piece, tile, cache, streaming=True), None  # each part goes as it is read
            yield self._encode(piece, run)
            cache = self._cache("encode", piece, run)

    def decode_stream(
        self, latents: Tensor | Iterable[Tensor], cache: VAECache | None = None, *, chunk: int = 1,
        clamp: bool = True, tile: Tile = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The frames of `chunk` latent frames at a time, in memory that does not grow with the clip.

        latents  [B, z_dim, T', H', W'], or its pieces in order, cut anywhere in time
        """
        for piece in self._pieces("decode", latents, chunk, chunk, chunk):
            run, cache = self._begin("decode", piece, tile, cache, streaming=True), None  # each part goes as it is read
            yield self._decode(piece, run, clamp)
            cache = self._cache("decode", piece, run)

    def stream_memory(self, kind: str, height: int, width: int, *, tile: Tile = None, impl: str | None = None) -> int:
        """About the bytes that a stream, "encode" or "decode", one latent frame a chunk, takes beyond the weights.

        Of an `impl` other than the model's own, where one is named.
        """
        network = self.encoder if kind == "encode" else self.decoder
        latents, factor = self.config.latent_shape(1, height, width)[2:], self.config.spatial_factor
        size, frames = ((height, width), self.config.temporal_factor) if kind == "encode" else (latents, 1)
        tile = tiling.in_latents(tile, latents, factor)
        kept, largest = tiling.memory(network.stages, size, frames, tile)
        tensors = _TENSORS["reference" if (impl or self.impl) == "reference" else "auto"]
        # the layers at the size of the latents; the frames themselves, cut up and put together
        whole = 12 * network.mid_block.attention.proj.in_features + 12 * self.config.temporal_factor * factor**2
        return (kept + tensors * largest + whole * math.prod(latents)) * self.quant_conv.weight.element_size()

    def fit_tile(
        self, kind: str, height: int, width: int, budget: int, *, impl: str | None = None
    ) -> tuple[tuple[int, int], int]:
        """(tile, bytes): the largest tile with which a stream takes about `budget` bytes at most, and what it takes.

        The whole frame where that fits. Where no tile does, the one that takes least, which is more than `budget`: the
        caches of a stream are those of whole frames, however small its tiles.
        """
        fits, factor = [], self.config.spatial_factor
        for latents in tiling.choices(self.config.latent_shape(1, height, width)[2:]):
            tile = tuple(n * factor for n in latents)
            fits.append((tile, self.stream_memory(kind, height, width, tile=tile, impl=impl)))
            if fits[-1][1] <= budget:
                return fits[-1]
        return min(fits, key=lambda fit: fit[1])

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents as a diffusion model sees them: (latents - mean) / std, per channel."""
        mean, std = (t.to(latents.dtype).view(-1, 1, 1, 1) for t in (self.latents_mean, self.latents_std))
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`: latents as `decode` takes them."""
        mean, std = (t.to(latents.dtype).view(-1, 1, 1, 1) for t in (self.latents_mean, self.latents_std))
        return latents * std + mean

    def set_latent_statistics(self, mean: Iterable[float] | None, std: Iterable[float] | None) -> None:
        """Takes the statistics that `normalize` uses into the config; None leaves zeros or ones."""
        mean, std = (None if t is None else tuple(map(float, t)) for t in (mean, std))
        self.config = replace(self.config, latents_mean=mean, latents_std=std)
        for buffer, values in ((self.latents_mean, mean or (0.0,)), (self.latents_std, std or (1.0,))):
            buffer.copy_(torch.tensor(values, dtype=torch.float64).expand(self.config.z_dim))

    @classmethod
    def from_wan(cls, source: nn.Module | str | os.PathLike[str], *, impl: str = "auto") -> CausalVAE:
        """A copy of a diffusers `AutoencoderKLWan` (2.1's or 2.2's), or of a directory with its config and safetensors;
        or of one safetensors file by Wan's own names.

        The result computes the same function, in the dtype of the weights. Raises `CheckpointError` for damaged or
        missing files and for weights of another model.
        """
        from . import checkpoint, wan_files  # needs safetensors, which a model alone does not

        module = isinstance(source, nn.Module)
        where, file = type(source).__name__ if module else os.fspath(source), not module and os.path.isfile(source)
        try:
            if module:
                sizes, state = checks.config_of(source, _WAN, "_encode", "_decode"), source.state_dict()
            elif file:
                state = {wan_files.own_vae_name(name): value for name, value in checkpoint.read_tensors(source).items()}
                sizes = wan_files.vae_config({name: value.shape for name, value in state.items()})
            else:
                sizes, state = checkpoint.read_wan_directory(source)
        except checkpoint.CheckpointError:
            raise
        except ValueError as error:
            raise checkpoint.CheckpointError(f"CausalVAE.from_wan: {where if file else 'source'} {error}") from error
        config = checkpoint.build(VAEConfig, sizes if file else wan_config(sizes, where), where)
        state = _wan_state(state, cls.planned(config, state, where))
        dtypes = {value.dtype for value in state.values()}
        vae = cls(config, impl=impl).to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
        checkpoint.load_into(vae, state, where)
        return vae

    @classmethod
    def planned(cls, config: VAEConfig, held: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
        """The shapes by our names that the tensors of a VAE of Wan have, once `held`, tensors or headers by diffusers'
        names or ours, is found to agree. Raises `CheckpointError`."""
        from . import checkpoint

        checkpoint.check_dtypes({name: value.dtype for name, value in held.items()}, where)
        wanted = checkpoint.planned_shapes(cls, config, (value.shape for value in held.values()), where)
        named = {own_name(name): tuple(value.shape) for name, value in held.items()}
        found = {name: wanted[name] if _same(shape, wanted.get(name)) else shape for name, shape in named.items()}
        checkpoint.check_shapes(wanted, found, where)
        return wanted

    def _encode(self, video: Tensor, run: Pass) -> tuple[Tensor, Tensor]:            # [B, 3, T, H, W]
        moments = self.encoder(run.part(video).contiguous(memory_format=LAYOUT), run)  # [B, 2Z, T', H', W']
        mean, logvar = run.whole(run.conv(moments, self.quant_conv)).chunk(2, 1)     # 2 x [B, Z, T', H', W']
        return mean, logvar.clamp(-30, 20)

    def _decode(self, latents: Tensor, run: Pass, clamp: bool) -> Tensor:            # [B, Z, T', H', W']
        latents = run.conv(run.part(latents).contiguous(memory_format=LAYOUT), self.post_quant_conv)
        video = run.whole(self.decoder(latents, run))                                # [B, 3, T, H, W]
        return video.clamp(-1, 1) if clamp else video

    def _begin(
        self, kind: str, x: Tensor, tile: Tile, cache: VAECache | None = None, *, streaming: bool = False
    ) -> Pass:
        """A pass for x, once everything about it has been found right, on every rank that shares the frames."""
        begin = partial(self._pass, kind, x, tile, cache, streaming)
        return begin() if self.ranks is None else self.ranks.begin(kind, x, begin)

    def _pass(self, kind: str, x: Tensor, tile: Tile, cache: VAECache | None, streaming: bool) -> Pass:
        self._check(kind, x)
        frames, *size = x.shape[2:]
        if kind == "encode":
            if cache is not None and frames % self.config.temporal_factor:
                raise ValueError(
                    f"after the first chunk, a chunk must have a multiple of {self.config.temporal_factor} frames; got "
                    f"{frames}"
                )
            size = self.config.latent_shape(frames + (cache is not None), *size)[2:]
        tile = tiling.in_latents(tile, size, self.config.spatial_factor)
        if self.ranks is None:
            run = Pass(self.impl, tile, streaming)
        else:
            run = self.ranks.divide(self, x, tile, size, streaming)
        if cache is None:
            return run
        if not isinstance(cache, VAECache):
            got = type(cache).__name__
            raise ValueError(f"cache must be the VAECache that {kind}_chunk returned for the chunk before; got {got}")
        cache.check(kind, self._sizes, x, run.tile, run.by)
        run.past = deque(cache.tensors)
        return run

    def _cache(self, kind: str, x: Tensor, run: Pass) -> VAECache:
        return VAECache(kind, self._sizes, (x.shape[0], *x.shape[3:]), run.tile, run.by, tuple(run.future))

    def _pieces(
        self, kind: str, clip: Tensor | Iterable[Tensor], chunk: int, first: int, step: int
    ) -> Iterator[Tensor]:
        pieces = self._cut(kind, clip, chunk, first, step)
        return pieces if self.ranks is None else self.ranks.pieces(kind, pieces)

    def _cut(self, kind: str, clip: Tensor | Iterable[Tensor], chunk: int, first: int, step: int) -> Iterator[Tensor]:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk must be at least 1 latent frame, a whole number; got {chunk!r}")
        pieces = [clip] if isinstance(clip, Tensor) else clip
        yield from regroup((self._check(kind, piece) for piece in pieces), first, step)

    def _check(self, kind: str, x: Tensor) -> Tensor:
        encode = kind == "encode"
        name, channels = ("video", self.config.in_channels) if encode else ("latents", self.config.z_dim)
        if not isinstance(x, Tensor) or x.ndim != 5 or x.shape[1] != channels or min(x.shape) < 1:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [B, {channels}, T, H, W], none of them 0; got {got}")
        weight = self.quant_conv.weight
        if x.dtype != weight.dtype or x.device != weight.device:
            raise ValueError(
                f"{name} must be {weight.dtype} on {weight.device}, as the model is; got {x.dtype} on {x.device}; "
                "move one of them with .to()"
            )
        return x


# a norm is its weight; the convolution of a Sequential, and the one entry of a list, stand for themselves
_WAN_NAMES = ((".gamma", ""), ("resample.1", "resample"), ("upsamplers.0", "upsampler"), ("attentions.0", "attention"))
_WAN_RENAMED = {"temperal_downsample": "temporal_downsample", "is_residual": "residual", "patch_size": "patch"}
_WAN = "AutoencoderKLWan"
_WAN_UNUSED = ("scale_factor_temporal", "scale_factor_spatial")  # what follows from the other fields
_WAN_FIXED = {"attn_scales": (), "dropout": 0.0}  # so in Wan's own


def wan_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a VAEConfig from those of an AutoencoderKLWan."""
    from . import checkpoint

    if (kind := config.get("_class_name")) != _WAN:
        raise checkpoint.CheckpointError(f"{where} is a {kind}; CausalVAE.from_wan takes an {_WAN}")
    config = {_WAN_RENAMED.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    for name, value in _WAN_FIXED.items():
        if config.get(name, value) != value:
            raise checkpoint.CheckpointError(
                f"{where} has {name}={config[name]!r}; CausalVAE is Wan's VAE, where it is {value!r}"
            )
    config["patch"] = patch = 1 if config.get("patch") is None else config["patch"]
    for name in ("in_channels", "out_channels") if isinstance(patch, int) and patch > 1 else ():
        channels = config.get(name)
        if not isinstance(channels, int) or channels % patch**2:
            raise checkpoint.CheckpointError(
                f"{where}: {name} must be a multiple of {patch**2}, patches of {patch} pixels a side; got {channels!r}"
            )
        config[name] = channels // patch**2
    names = [f.name for f in fields(VAEConfig)]
    try:
        checks.only(config, _WAN, [*names, *_WAN_FIXED, *_WAN_UNUSED])
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{where}: {error}") from error
    return {name: config[name] for name in names if name in config}


def own_name(name: str) -> str:
    """Our name of a tensor of an AutoencoderKLWan."""
    for theirs, ours in _WAN_NAMES:
        name = name.replace(theirs, ours)
    return name


def _wan_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors under our names, in the shapes that `CausalVAE.planned` gives."""
    return {own_name(name): value.reshape(shapes[own_name(name)]) for name, value in state.items()}


def _same(shape: Sequence[int], wanted: Sequence[int] | None) -> bool:
    """But for axes of size 1, added or dropped: a 2D convolution is a 3D one of one frame."""
    return wanted is not None and [n for n in shape if n != 1] == [n for n in wanted if n != 1]
