"""The causal video VAE of Wan 2.1: pixels to latents, 8x8 smaller in space and 4x in time, and back.

Causal in time: frame t depends on frames up to t only, and the first frame of a clip is coded alone. So a clip of
4n+1 frames has n+1 latent frames, and both directions run chunk by chunk in constant memory: `encode_chunk` and
`decode_chunk` take what the layers remember of the past and return it anew; the modules themselves keep nothing.
Source: Wan, arXiv 2503.20314, section 4.1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels import (
    causal_conv3d,
    downsample_conv3d,
    norm_modulate,
    norm_silu,
    spacetime_attention,
    upsample_conv3d,
)

from . import checkpoint

LAYOUT = torch.channels_last_3d  # the norms and convolutions of every implementation are fastest in it
EPS = 1e-24  # Wan divides by max(‖x‖, 1e-12): the smallest that keeps a pixel of zeros finite, and no more


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `CausalVAE`; the defaults are Wan 2.1's. JSON: `VAEConfig(**json.loads(json.dumps(asdict(config))))`.

    base_dim             channels at full resolution; level i has base_dim * dim_mult[i]
    z_dim                channels of the latents
    num_res_blocks       residual blocks per level of the encoder; the decoder has one more
    temporal_downsample  for each step between two levels: halve the frames as well as height and width?
    decoder_base_dim     base_dim of the decoder where it differs
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
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        names = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels", "decoder_dim")
        for name, size in [*((name, getattr(self, name)) for name in names), *(("dim_mult", m) for m in self.dim_mult)]:
            if not isinstance(size, int) or not 0 < size <= 4096:
                raise ValueError(f"VAEConfig: {name} must be a whole number from 1 to 4096; got {size!r}")
        if not 0 < len(self.dim_mult) <= 8:
            raise ValueError(f"VAEConfig: dim_mult must name 1 to 8 levels; got {self.dim_mult}")
        steps = self.temporal_downsample
        if len(steps) != len(self.dim_mult) - 1 or not all(isinstance(step, bool) for step in steps):
            raise ValueError(
                f"VAEConfig: temporal_downsample must be {len(self.dim_mult) - 1} booleans, one per step between the "
                f"levels of dim_mult={self.dim_mult}; got {steps}"
            )
        squares = sum((self.base_dim * m) ** 2 + (self.decoder_dim * m) ** 2 for m in self.dim_mult)
        if (about := 27 * (2 * self.num_res_blocks + 1) * squares) > 10**10:
            raise ValueError(f"VAEConfig: no VAE has about {about:,} parameters; give smaller sizes")
        if any(self.decoder_dim * mult % 2 for mult in self.dim_mult[1:]):
            raise ValueError(
                f"VAEConfig: the decoder halves its channels at each step, so its base width {self.decoder_dim} times "
                f"each of dim_mult[1:]={self.dim_mult[1:]} must be even"
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and (len(values) != self.z_dim or not all(map(math.isfinite, values))):
                raise ValueError(f"VAEConfig: {name} must be {self.z_dim} finite numbers (z_dim); got {values}")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ValueError(f"VAEConfig: latents_std must be positive; got {self.latents_std}")

    @property
    def decoder_dim(self) -> int:
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first, which stands for one."""
        return 2 ** sum(self.temporal_downsample)

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


@dataclass(frozen=True)
class VAECache:
    """What the layers remember of the frames so far: opaque, made by a chunk, handed to the next chunk of that clip."""

    kind: str
    tensors: tuple[Tensor, ...]


@dataclass
class _Pass:
    """One way of a chunk through the layers: the implementation to use, and each convolution's past, in order."""

    impl: str
    streaming: bool = False
    past: Iterator[Tensor] | None = None  # None: the clip begins with this chunk
    future: list[Tensor] = field(default_factory=list)

    @property
    def starts(self) -> bool:
        return self.past is None

    def conv(self, x: Tensor, conv: nn.Conv3d, function: Callable = causal_conv3d, **kwargs) -> Tensor:
        """`function` with the parameters of `conv`, and with its cache where it has a past to remember."""
        frames = conv.kernel_size[0] - 1
        if not self.streaming or frames == 0:
            return function(x, conv.weight, conv.bias, impl=self.impl, **kwargs)
        if self.starts:  # nothing but zeros before x: without a cache they cost nothing
            y, cache = function(x, conv.weight, conv.bias, impl=self.impl, **kwargs), x[:, :, -frames:]
            cache = F.pad(cache, (0, 0, 0, 0, frames - cache.shape[2], 0))
        else:
            y, cache = function(x, conv.weight, conv.bias, cache=next(self.past), impl=self.impl, **kwargs)
        self.future.append(cache)
        return y

    def norm_silu(self, x: Tensor, weight: Tensor) -> Tensor:
        return norm_silu(x, weight, eps=EPS, impl=self.impl)


class ResidualBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(dim_in))
        self.conv1 = nn.Conv3d(dim_in, dim_out, 3)
        self.norm2 = nn.Parameter(torch.ones(dim_out))
        self.conv2 = nn.Conv3d(dim_out, dim_out, 3)
        self.conv_shortcut = nn.Conv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, C, T, H, W]
        skip = x if self.conv_shortcut is None else run.conv(x, self.conv_shortcut)  # [B, C', T, H, W]
        h = run.norm_silu(x, self.norm1)                                             # [B, C, T, H, W]
        h = run.conv(h, self.conv1, norm_weight=self.norm2, norm_eps=EPS)            # [B, C', T, H, W]
        return run.conv(h, self.conv2, residual=skip)                                # [B, C', T, H, W]


class AttentionBlock(nn.Module):
    """Attention of one head among the pixels of each frame; frames do not see each other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, C, T, H, W]
        B, C, T, H, W = x.shape
        h = x.permute(0, 2, 3, 4, 1).reshape(B * T, H * W, C)                        # [BT, HW, C]
        h = norm_modulate(h, None, None, norm="rms", weight=self.norm, eps=EPS, impl=run.impl)
        q, k, v = self.to_qkv(h).unflatten(-1, (3, 1, C)).unbind(2)                  # 3 x [BT, HW, 1, C]
        h = spacetime_attention(q, k, v, impl=run.impl).flatten(2)                   # [BT, HW, C]
        h = self.proj(h).view(B, T, H, W, C).permute(0, 4, 1, 2, 3)                  # [B, C, T, H, W]
        return x + h


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attention = AttentionBlock(dim)

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, C, T, H, W]
        return self.resnets[1](self.attention(self.resnets[0](x, run), run), run)


class Downsample(nn.Module):
    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Conv3d(dim, dim, (1, 3, 3))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, C, T, H, W]
        x = run.conv(x, self.resample, downsample_conv3d, factor=(1, 2, 2))          # [B, C, T, H/2, W/2]
        if self.time_conv is None:
            return x
        # the first frame stays as it is; the others become one per pair, which sees the frame before it too
        first, x, before = (x[:, :, :1], x[:, :, 1:], x[:, :, :1]) if run.starts else (x[:, :, :0], x, next(run.past))
        weight, bias = self.time_conv.weight, self.time_conv.bias
        x, last = downsample_conv3d(x, weight, bias, factor=(2, 1, 1), cache=before, impl=run.impl)
        if run.streaming:
            run.future.append(last)
        return torch.cat([first, x], 2)                                              # [B, C, T', H/2, W/2]


class Upsample(nn.Module):
    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Conv3d(dim, dim // 2, (1, 3, 3))
        self.time_conv = nn.Conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, C, T, H, W]
        if self.time_conv is not None:
            # the first frame stays as it is, unseen by the others, each of which becomes two
            first, x = (x[:, :, :1], x[:, :, 1:]) if run.starts else (x[:, :, :0], x)
            x = run.conv(x, self.time_conv).unflatten(1, (2, -1))                    # [B, 2, C, T, H, W]
            x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)                            # [B, C, 2T, H, W]
            x = torch.cat([first, x], 2)                                             # [B, C, T', H, W]
        return run.conv(x, self.resample, upsample_conv3d, factor=(1, 2, 2))         # [B, C/2, T', 2H, 2W]


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv_in = nn.Conv3d(config.in_channels, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            for j in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim_out if j else dim_in, dim_out))
            if i < len(config.temporal_downsample):
                self.down_blocks.append(Downsample(dim_out, config.temporal_downsample[i]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = nn.Parameter(torch.ones(dims[-1]))
        self.conv_out = nn.Conv3d(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, 3, T, H, W]
        x = run.conv(x, self.conv_in)                                                # [B, C, T, H, W]
        for block in self.down_blocks:
            x = block(x, run)
        x = self.mid_block(x, run)                                                   # [B, C, T', H', W']
        return run.conv(run.norm_silu(x, self.norm_out), self.conv_out)              # [B, 2Z, T', H', W']


class UpBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, blocks: int, upsampler: Upsample | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim_out if j else dim_in, dim_out) for j in range(blocks))
        self.upsampler = upsampler

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, C, T, H, W]
        for resnet in self.resnets:
            x = resnet(x, run)
        return x if self.upsampler is None else self.upsampler(x, run)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.decoder_dim * mult for mult in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        self.conv_in = nn.Conv3d(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, dim in enumerate(dims):
            dim_in = dims[i - 1] // 2 if i else dim  # an upsampler halves the channels
            upsampler = Upsample(dim, temporal[i]) if i < len(temporal) else None
            self.up_blocks.append(UpBlock(dim_in, dim, config.num_res_blocks + 1, upsampler))
        self.norm_out = nn.Parameter(torch.ones(dims[-1]))
        self.conv_out = nn.Conv3d(dims[-1], config.out_channels, 3)

    def forward(self, x: Tensor, run: _Pass) -> Tensor:                              # [B, Z, T', H', W']
        x = self.mid_block(run.conv(x, self.conv_in), run)                           # [B, C, T', H', W']
        for block in self.up_blocks:
            x = block(x, run)                                                        # [B, C, T, H, W]
        return run.conv(run.norm_silu(x, self.norm_out), self.conv_out)              # [B, 3, T, H, W]


class CausalVAE(nn.Module):
    """Wan 2.1's causal video VAE. Videos are [B, 3, T, H, W] in [-1, 1], T = 4n+1, H and W multiples of 8.

    impl  which implementation of the ops to use, as everywhere in sora_kernels
    """

    def __init__(self, config: VAEConfig | None = None, *, impl: str = "auto"):
        super().__init__()
        self.config = config or VAEConfig()
        self.impl = impl
        Z = self.config.z_dim
        self.encoder = Encoder(self.config)
        self.quant_conv = nn.Conv3d(2 * Z, 2 * Z, 1)
        self.post_quant_conv = nn.Conv3d(Z, Z, 1)
        self.decoder = Decoder(self.config)
        self.to(memory_format=LAYOUT)
        self.register_buffer("latents_mean", torch.zeros(Z), persistent=False)
        self.register_buffer("latents_std", torch.ones(Z), persistent=False)
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

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of a whole clip: mean and log-variance, [B, z_dim, 1 + (T-1)/4, H/8, W/8] each."""
        self._check("video", video, self.config.in_channels)
        self.config.latent_shape(*video.shape[2:])
        return self._posterior(self.encoder(video.contiguous(memory_format=LAYOUT), _Pass(self.impl)))

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """The whole clip in one pass: [B, 3, 1 + 4(T'-1), 8H', 8W'], clamped to [-1, 1] if `clamp`.

        Memory grows with the clip; `decode_stream` gives the same frames chunk by chunk.
        """
        self._check("latents", latents, self.config.z_dim)
        video = self.decoder(self._from_latents(latents), _Pass(self.impl))
        return video.clamp(-1, 1) if clamp else video

    def encode_chunk(self, video: Tensor, cache: VAECache | None = None) -> tuple[Tensor, Tensor, VAECache]:
        """(mean, logvar, cache) of the next frames of a clip: 4n+1 of them at its start (no cache), 4n later on."""
        self._check("video", video, self.config.in_channels)
        run, step = self._streaming("encode", cache), self.config.temporal_factor
        if cache is not None and video.shape[2] % step:
            raise ValueError(
                f"after the first chunk, a chunk must have a multiple of {step} frames; got {video.shape[2]}"
            )
        self.config.latent_shape(video.shape[2] + (cache is not None), *video.shape[3:])
        moments = self.encoder(video.contiguous(memory_format=LAYOUT), run)
        return *self._posterior(moments), VAECache("encode", tuple(run.future))

    def decode_chunk(
        self, latents: Tensor, cache: VAECache | None = None, *, clamp: bool = True
    ) -> tuple[Tensor, VAECache]:
        """(frames, cache) of the next latent frames of a clip: the first of all gives 1 frame, each other one 4."""
        self._check("latents", latents, self.config.z_dim)
        run = self._streaming("decode", cache)
        video = self.decoder(self._from_latents(latents), run)
        return video.clamp(-1, 1) if clamp else video, VAECache("decode", tuple(run.future))

    def encode_stream(
        self, video: Tensor | Iterable[Tensor], cache: VAECache | None = None, *, chunk: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(mean, logvar) of `chunk` latent frames at a time; the whole equals `encode` up to rounding.

        video  [B, 3, T, H, W], or its pieces in order, cut anywhere in time
        """
        step = self.config.temporal_factor
        first = 1 + step * (chunk - 1) if cache is None else step * chunk
        for piece in _regroup(video, first, step * chunk):
            mean, logvar, cache = self.encode_chunk(piece, cache)
            yield mean, logvar

    def decode_stream(
        self, latents: Tensor | Iterable[Tensor], cache: VAECache | None = None, *, chunk: int = 1, clamp: bool = True
    ) -> Iterator[Tensor]:
        """The frames of `chunk` latent frames at a time, in memory that does not grow with the clip.

        latents  [B, z_dim, T', H', W'], or its pieces in order, cut anywhere in time
        """
        for piece in _regroup(latents, chunk, chunk):
            frames, cache = self.decode_chunk(piece, cache, clamp=clamp)
            yield frames

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
            buffer.copy_(torch.tensor(values).expand(self.config.z_dim))

    @classmethod
    def from_wan(cls, source: nn.Module | str | os.PathLike[str], *, impl: str = "auto") -> CausalVAE:
        """A copy of a diffusers `AutoencoderKLWan` (Wan 2.1), or of a directory with its config.json and safetensors.

        The result computes the same function, in the dtype of the weights. Raises `CheckpointError` for damaged or
        missing files, for weights of another model, and for features of Wan 2.2's VAE.
        """
        if isinstance(source, nn.Module):
            config, state, where = getattr(source, "config", {}), source.state_dict(), type(source).__name__
            config = {"_class_name": where, **config}
        else:
            config, state = checkpoint.read_wan_directory(source)
            where = os.fspath(source)
        vae = cls(checkpoint.build(VAEConfig, _wan_config(config, where), where), impl=impl)
        dtypes = {value.dtype for value in state.values()}
        if len(dtypes) == 1:
            vae.to(dtypes.pop())
        shapes = {name: value.shape for name, value in vae.state_dict().items()}
        checkpoint.load_into(vae, _wan_state(state, shapes), where)
        return vae

    def _posterior(self, moments: Tensor) -> tuple[Tensor, Tensor]:                  # [B, 2Z, T', H', W']
        mean, logvar = _Pass(self.impl).conv(moments, self.quant_conv).chunk(2, 1)   # 2 x [B, Z, T', H', W']
        return mean, logvar.clamp(-30, 20)

    def _from_latents(self, latents: Tensor) -> Tensor:                              # [B, Z, T', H', W']
        latents = latents.contiguous(memory_format=LAYOUT)
        return _Pass(self.impl).conv(latents, self.post_quant_conv)

    def _streaming(self, kind: str, cache: VAECache | None) -> _Pass:
        if cache is None:
            return _Pass(self.impl, streaming=True)
        if not isinstance(cache, VAECache) or cache.kind != kind:
            got = f"that of {cache.kind}_chunk" if isinstance(cache, VAECache) else type(cache).__name__
            raise ValueError(f"cache must be the VAECache that {kind}_chunk returned for the chunk before; got {got}")
        return _Pass(self.impl, streaming=True, past=iter(cache.tensors))

    def _check(self, name: str, x: Tensor, channels: int) -> None:
        if not isinstance(x, Tensor) or x.ndim != 5 or x.shape[1] != channels or min(x.shape) < 1:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [B, {channels}, T, H, W], none of them 0; got {got}")
        weight = self.quant_conv.weight
        if x.dtype != weight.dtype or x.device != weight.device:
            raise ValueError(
                f"{name} must be {weight.dtype} on {weight.device}, as the model is; got {x.dtype} on {x.device}; "
                "move one of them with .to()"
            )


def _regroup(pieces: Tensor | Iterable[Tensor], first: int, step: int) -> Iterator[Tensor]:
    """Cuts a sequence of pieces into `first`, then `step` frames at a time; the last may be shorter."""
    if step < 1:
        raise ValueError("chunk must be at least 1 latent frame")
    held, wanted = [], first
    for piece in [pieces] if isinstance(pieces, Tensor) else pieces:
        held.append(piece)
        while sum(p.shape[2] for p in held) >= wanted:
            whole = torch.cat(held, 2) if len(held) > 1 else held[0]
            yield whole[:, :, :wanted]
            held, wanted = [whole[:, :, wanted:]], step
    if sum(p.shape[2] for p in held):
        yield torch.cat(held, 2)


# a norm is its weight; the convolution of a Sequential, and the one entry of a list, stand for themselves
_WAN_NAMES = ((".gamma", ""), ("resample.1", "resample"), ("upsamplers.0", "upsampler"), ("attentions.0", "attention"))
_WAN_RENAMED = {"temperal_downsample": "temporal_downsample"}
_WAN_FIXED = {"attn_scales": (), "dropout": 0.0, "is_residual": False, "patch_size": None}  # so in Wan 2.1


def _wan_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a VAEConfig from those of an AutoencoderKLWan."""
    if (kind := config.get("_class_name")) != "AutoencoderKLWan":
        raise checkpoint.CheckpointError(f"{where} is a {kind}; CausalVAE.from_wan takes an AutoencoderKLWan")
    config = {_WAN_RENAMED.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    for name, value in _WAN_FIXED.items():
        if config.get(name, value) != value:
            raise checkpoint.CheckpointError(
                f"{where} has {name}={config[name]!r}; CausalVAE is Wan 2.1's VAE, where it is {value!r}"
            )
    return {f.name: config[f.name] for f in fields(VAEConfig) if f.name in config}


def _wan_state(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors under our names; axes of size 1 added or dropped (a 2D convolution is a 3D one of one frame)."""
    renamed = {}
    for name, value in state.items():
        for theirs, ours in _WAN_NAMES:
            name = name.replace(theirs, ours)
        shape = shapes.get(name, value.shape)
        same = [n for n in shape if n != 1] == [n for n in value.shape if n != 1]
        renamed[name] = value.reshape(shape) if same else value
    return renamed
