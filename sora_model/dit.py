"""The diffusion transformer over spacetime patches: Wan 2.1 and 2.2, from text and from images, in one file.

    latents -> tokens -> layers x [ self-attention, cross-attention to text and image, feed-forward ] -> latents

A token is one patch of latent cells. The timestep reaches every block as six rows (adaLN: shift, scale, gate,
twice), made once and shared by the blocks, each of which adds a table of its own. Source: arXiv 2503.20314.

In the margin: B clips, S = T'·H'·W' tokens, N timesteps a clip (1, T' or S), L text tokens, I image tokens,
width D, heads H (in a video: height) of E = D/H.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sora_kernels import (
    final_layer,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
    patch_embed3d,
)

from . import checks
from .attention import AttentionMode, Grid
from .context import Context
from .memory import Memory, Past
from .parallel import Parallel


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The sizes of a SoraDiT; `DiTConfig(**config.to_dict())` is the same config again, through JSON too.

    image_dim     width of an image's tokens, which cross-attention sees beside the text (Wan 2.1 image-to-video)
    image_tokens  how many there are, of the first and the last frame together, each with a place of its own; None: any
                  number of one image

    Raises ValueError naming the field that is no positive integer within reason, or does not fit the others.
    """

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: Grid = (1, 2, 2)
    image_dim: int | None = None
    image_tokens: int | None = None
    cross_attn_norm: bool = True
    eps: float = 1e-6
    attention: AttentionMode = AttentionMode()

    def __post_init__(self) -> None:
        if not isinstance(self.patch, tuple | list) or len(self.patch) != 3:
            raise ValueError(f"DiTConfig: patch must be three integers (t, h, w); got {self.patch!r}")
        object.__setattr__(self, "patch", tuple(self.patch))
        checks.flag("DiTConfig: cross_attn_norm", self.cross_attn_norm)
        checks.number("DiTConfig: eps", self.eps, 1e-30, 1)
        if isinstance(self.attention, Mapping):
            unknown = self.attention.keys() - {field.name for field in dataclasses.fields(AttentionMode)}
            if unknown:
                raise ValueError(f"DiTConfig: attention has no setting {sorted(unknown)[0]!r}")
            object.__setattr__(self, "attention", AttentionMode(**self.attention))
        if not isinstance(self.attention, AttentionMode):
            raise ValueError(f"DiTConfig: attention must be an AttentionMode or its fields; got {self.attention!r}")
        for field in dataclasses.fields(self):
            if field.type == "int":  # annotations are kept as strings
                _check_size(field.name, getattr(self, field.name), 2**20)
        for name in ("image_dim", "image_tokens"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name), 2**20)
        if self.image_tokens is not None and self.image_dim is None:
            raise ValueError(f"DiTConfig: image_tokens={self.image_tokens} needs an image_dim too")
        for size in self.patch:
            _check_size("patch", size, 64)
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(
                f"DiTConfig: dim must be heads x an even head width (rotary pairs); "
                f"got dim={self.dim}, heads={self.heads}"
            )
        if self.freq_dim % 2:
            raise ValueError(f"DiTConfig: freq_dim must be even (cosines and sines); got {self.freq_dim}")
        if self.parameters > 10**12:
            raise ValueError(f"DiTConfig: no model has {self.parameters:,} parameters; give smaller sizes")

    @property
    def parameters(self) -> int:
        """How many numbers the model holds: known before any is allocated."""
        d, cells = self.dim, math.prod(self.patch)
        attention = 4 * d * (d + 1) + 2 * d
        ffn = self.ffn_dim * (d + 1) + d * (self.ffn_dim + 1)
        block = 2 * attention + ffn + 6 * d + 2 * d * self.cross_attn_norm
        time = d * (self.freq_dim + 1) + d * (d + 1) + 6 * d * (d + 1)
        text = d * (self.text_dim + 1) + d * (d + 1)
        patches = d * (self.in_channels * cells + 1) + self.out_channels * cells * (d + 1)
        image = 0
        if (i := self.image_dim) is not None:
            image = i * (i + 1) + d * (i + 1) + 2 * i + 2 * d + (self.image_tokens or 0) * i
            block += 2 * d * (d + 1) + d
        return patches + time + text + image + self.layers * block + 2 * d

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"patch": list(self.patch)}

    @classmethod
    def from_wan(cls, config: Mapping[str, Any]) -> DiTConfig:
        """From the config of a diffusers WanTransformer3DModel.

        ValueError for that of another class, or one with a field that is not known here.
        """
        names = {"num_attention_heads": "heads", "num_layers": "layers", "patch_size": "patch"}
        named_image = {"image_dim": "image_dim", "pos_embed_seq_len": "image_tokens"}
        checks.of_kind(config, "WanTransformer3DModel")
        if missing := [name for name in (*names, "attention_head_dim", "ffn_dim") if name not in config]:
            raise ValueError(f"not the config of a WanTransformer3DModel: it lacks {', '.join(missing)}")
        known = {field.name for field in dataclasses.fields(cls)} - {"attention"}
        named = known - {"dim", "image_tokens", *names.values()} | {*names, *named_image, *_OTHERS}
        checks.only(config, "WanTransformer3DModel", named)
        for name in ("num_attention_heads", "attention_head_dim"):
            _check_size(name, config[name], 2**20)
        if config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise ValueError(f"qk_norm must be 'rms_norm_across_heads', Wan's own; got {config['qk_norm']!r}")
        sizes = {(names | named_image).get(name, name): value for name, value in config.items()}
        sizes["dim"] = config["num_attention_heads"] * config["attention_head_dim"]
        if (width := config.get("added_kv_proj_dim")) != (sizes["dim"] if config.get("image_dim") else None):
            raise ValueError(
                f"added_kv_proj_dim must be the model's width {sizes['dim']} where there is an image_dim, else null; "
                f"got {width} with image_dim={config.get('image_dim')}"
            )
        if config.get("out_channels") is None:
            sizes["out_channels"] = config.get("in_channels", cls.in_channels)
        return cls(**{name: value for name, value in sizes.items() if name in known})

    @classmethod
    def of_weights(cls, shapes: Mapping[str, tuple[int, ...]], *, heads: int | None = None) -> DiTConfig:
        """From the weights' shapes, by our names, as Wan's own files come: without a config, with heads of 128.

        ValueError where they are not those of a Wan transformer.
        """
        try:
            dim, in_channels, *patch = shapes["patch_embedding.weight"]
            sizes = {
                "dim": dim, "in_channels": in_channels, "patch": tuple(patch), "heads": heads or dim // 128,
                "layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
                "ffn_dim": shapes["blocks.0.ffn.0.weight"][0], "text_dim": shapes["text_embedding.0.weight"][1],
                "freq_dim": shapes["time_embedding.0.weight"][1],
                "out_channels": shapes["head.weight"][0] // math.prod(patch),
                "cross_attn_norm": "blocks.0.cross_norm.weight" in shapes,
            }  # fmt: skip
            if "image_embedding.norm_in.weight" in shapes:
                sizes["image_dim"] = shapes["image_embedding.norm_in.weight"][0]
                sizes["image_tokens"] = shapes.get("image_embedding.place", (1, None))[1]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"not the weights of a Wan transformer: {error} is missing or of another shape") from error
        return cls(**sizes)


# fields without a size of ours; rope_max_seq_len is how long diffusers makes its tables of angles, ours need none
_OTHERS = ("attention_head_dim", "qk_norm", "added_kv_proj_dim", "rope_max_seq_len")


class Attention(nn.Module):
    """Four projections, and RMS norms of q and k over the whole width: what both attentions share."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, config.eps
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.Parameter(torch.ones(config.dim))
        self.norm_k = nn.Parameter(torch.ones(config.dim))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))                                             # [B, ., H, E]


class SelfAttention(Attention):
    """Tokens see those that the mode says; the rotation of q and k tells how far apart two of them are."""

    def forward(self, x: Tensor, grid: Grid, mode: AttentionMode, impl: str, context: Context) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))        # [B, S, H, E]
        norms = {"q_weight": self.norm_q, "k_weight": self.norm_k, "across": "width", "eps": self.eps, "impl": impl}
        out = context.attention(q, k, v, grid, mode, norms)                                  # [B, S, H, E]
        return self.o(out.flatten(2))                                                        # [B, S, D]


class CrossAttention(Attention):
    """Every token sees every token of its clip's text; and of its image, apart: the two results are added."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        if config.image_dim is not None:
            self.k_image, self.v_image = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_image = nn.Parameter(torch.ones(config.dim))

    def forward(
        self, x: Tensor, text: Tensor, text_lens: Tensor | None, image: Tensor | None, impl: str, context: Context
    ) -> Tensor:
        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return self.split(norm_modulate(x, None, None, norm="rms", weight=weight, eps=self.eps, impl=impl))

        q = normed(self.q(x), self.norm_q)                                                   # [B, S, H, E]
        k, v = normed(self.k(text), self.norm_k), self.split(self.v(text))                   # [B, L, H, E]
        out = context.attend(q, k, v, text_lens, impl)                                       # [B, S, H, E]
        if image is not None:
            k, v = normed(self.k_image(image), self.norm_k_image), self.split(self.v_image(image))  # [B, I, H, E]
            out = out + context.attend(q, k, v, None, impl)
        return self.o(out.flatten(2))                                                        # [B, S, D]


class ImageEmbedding(nn.Module):
    """The tokens of CLIP's image encoder at the transformer's width, each normalised before and after."""

    def __init__(self, image_dim: int, dim: int, tokens: int | None) -> None:
        super().__init__()
        self.place = None if tokens is None else nn.Parameter(torch.zeros(1, tokens, image_dim))
        self.norm_in, self.norm_out = nn.LayerNorm(image_dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim))

    def forward(self, image: Tensor, impl: str) -> Tensor:                                   # [B, I, image_dim]
        def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
            return norm_modulate(x, None, None, weight=norm.weight, bias=norm.bias, eps=norm.eps, impl=impl)

        image = image if self.place is None else image + self.place
        return normed(self.ffn(normed(image, self.norm_in)), self.norm_out)                  # [B, I, D]


class Block(nn.Module):
    """Self-attention and feed-forward, modulated and gated by the timestep; between them, the text and the image."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, ffn_dim, self.eps = config.dim, config.ffn_dim, config.eps
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.cross_norm = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else None
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.table = nn.Parameter(torch.empty(1, 6, dim).normal_().div_(dim**0.5))

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor,
        text_lens: Tensor | None,
        image: Tensor | None,
        grid: Grid,
        mode: AttentionMode,
        impl: str,
        context: Context,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(2)                        # [B, N, D]
        tables = self.table[0].unbind(0)                                                     # 6 x [D]
        how = {"eps": self.eps, "index": context.index, "impl": impl}
        gated = {"index": context.index, "impl": impl}

        h = norm_modulate(x, shift1, scale1, shift_table=tables[0], scale_table=tables[1], **how)
        y = self.self_attn(h, grid, mode, impl, context)                                     # [B, S, D]
        if self.cross_norm is None:
            x = h = gate_residual(x, y, gate1, gate_table=tables[2], **gated)
        else:
            affine = {"weight": self.cross_norm.weight, "bias": self.cross_norm.bias}
            x, h = gate_residual_norm_modulate(x, y, gate1, None, None, gate_table=tables[2], **affine, **how)
        y = self.cross_attn(h, text, text_lens, image, impl, context)                        # [B, S, D]
        tables2 = {"shift_table": tables[3], "scale_table": tables[4]}
        x, h = gate_residual_norm_modulate(x, y, None, shift2, scale2, **tables2, **how)
        return gate_residual(x, self.ffn(h), gate2, gate_table=tables[5], **gated)           # [B, S, D]


class SoraDiT(nn.Module):
    """Predicts the velocity of noisy latents from their timesteps, a text and, where it takes one, an image.

    checkpointing  keep of each block its input alone, and compute it again in the backward: a third more work in the
                   memory of one block

    The weights may be of one dtype, or as Wan keeps them: half precision, with the tables, the time embedding
    and the norms before cross-attention in fp32 (`from_wan(..., dtype=torch.bfloat16)`).
    """

    def __init__(self, config: DiTConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        self.parallel: Parallel | None = None  # inside of `parallel.over`
        dim, text_dim = config.dim, config.text_dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        image = (config.image_dim, dim, config.image_tokens)
        self.image_embedding = None if config.image_dim is None else ImageEmbedding(*image)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(dim, math.prod(config.patch) * config.out_channels)
        self.head_table = nn.Parameter(torch.empty(1, 2, dim).normal_().div_(dim**0.5))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Wan's initialisation for training from scratch. The head starts at zero: so does the prediction."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for embedding in (self.text_embedding, self.time_embedding):
            nn.init.normal_(embedding[0].weight, std=0.02)
            nn.init.normal_(embedding[2].weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_lens: Tensor | None = None,
        *,
        image: Tensor | None = None,
        attention: AttentionMode | None = None,
        memory: Memory | None = None,
        remember: bool = False,
        impl: str = "auto",
    ) -> Tensor:
        """The velocity of the latents, in their shape (but `out_channels` channels) and dtype.

        latents     [B, C, T, H, W], sizes divisible by the patch
        timesteps   0 (clean) to 1000 (noise), fp32, fp64 or integer; one for each clip [B], frame of tokens
                    [B, T'] or token [B, S], in t-major order
        text        [B, L, text_dim]
        text_lens   [B] integers: how many of the L tokens count; None: all, as Wan sees its texts' padding
        image       [B, I, image_dim], where the config has an image_dim: CLIP's last but one hidden states of the first
                    frame, or of the first and then the last
        attention   the mode of self-attention; None: that of the config, or causal by frames where there is a memory
        memory      the latents are the frames that follow those remembered, which they see; with `remember` they are
                    remembered too
        impl        handed to every sora_kernels function

        Raises ValueError or TypeError naming the argument; `Unavailable` where impl cannot run.
        """
        grid = self.grid_of(latents, timesteps, text, text_lens, image)
        if remember and memory is None:
            raise ValueError("remember needs a memory")
        mode = attention or (self.config.attention if memory is None else AttentionMode(causal="frame"))
        if self.parallel is not None:
            return self.parallel.velocity(self, latents, timesteps, text, text_lens, image, grid, mode, memory, impl)
        x = self.embed_patches(latents, impl)                                                # [B, S, D]
        time = self.embed_times(timesteps).to(x.dtype)                                       # [B, N, D]

        def context(layer: int) -> Context:
            return Context() if memory is None else Past(memory, memory.layer(layer), remember)

        x = self.through_blocks(x, time, text, text_lens, image, grid, mode, impl, context)  # [B, S, D]
        if remember:
            memory.frames += grid[0]
        return self.read_out(x, time, grid, impl)                                            # [B, C, T, H, W]

    def embed_patches(self, latents: Tensor, impl: str) -> Tensor:
        """Tokens `[B, S, D]` of latents."""
        return patch_embed3d(latents, self.patch_embedding.weight, self.patch_embedding.bias, impl=impl)

    def through_blocks(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        text_lens: Tensor | None,
        image: Tensor | None,
        grid: Any,
        mode: AttentionMode,
        impl: str,
        context: Callable[[int], Context],
    ) -> Tensor:
        """Tokens through all blocks; `time` [B, N, D] as embedded, and the context that each layer has."""
        rows = self.time_projection(time).unflatten(-1, (6, -1))                             # [B, N, 6, D]
        text = self.text_embedding(text)                                                     # [B, L, D]
        image = None if image is None else self.image_embedding(image, impl)                 # [B, I, D]
        again = self.checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            inputs = x, rows, text, text_lens, image, grid, mode, impl, context(layer)
            weights = dict(block.named_parameters()) if again else {}
            if any(hasattr(weight, "to_local") for weight in weights.values()):  # FSDP makes them whole in the backward
                x = checkpoint(block, *inputs, use_reentrant=False)                          # [B, S, D]
            elif again:  # the weights of now: a functional call around this one is over when the backward asks for them
                x = checkpoint(functional_call, block, weights, inputs, use_reentrant=False)  # [B, S, D]
            else:
                x = block(*inputs)                                                           # [B, S, D]
        return x

    def read_out(self, x: Tensor, time: Tensor, grid: Grid, impl: str) -> Tensor:
        """The velocity of a clip's tokens."""
        shift, scale = (time.unsqueeze(2) + self.head_table).unbind(2)                       # [B, N, D]
        how = {"grid": grid, "patch": self.config.patch, "eps": self.config.eps, "impl": impl}
        return final_layer(x, shift, scale, self.head.weight, self.head.bias, **how)         # [B, C, T, H, W]

    def embed_times(self, timesteps: Tensor) -> Tensor:
        weight = self.time_embedding[0].weight
        times = timesteps.to(torch.promote_types(weight.dtype, torch.float32))
        times = times[:, None] if times.ndim == 1 else times                                 # [B, N]
        half = self.config.freq_dim // 2
        powers = -math.log(10000.0) * torch.arange(half, dtype=times.dtype, device=times.device) / half
        angles = times[..., None] * powers.exp()                                             # [B, N, half]
        return self.time_embedding(torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype))

    def grid_of(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, text_lens: Tensor | None, image: Tensor | None
    ) -> Grid:
        config, weight = self.config, self.patch_embedding.weight
        given = {"latents": latents, "timesteps": timesteps, "text": text, "text_lens": text_lens, "image": image}
        for name, t in given.items():
            if not isinstance(t, Tensor) and (t is not None or name not in ("text_lens", "image")):
                raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
            if t is not None and t.device != weight.device:
                raise ValueError(f"{name} must be on {weight.device} like the weights; got {t.device}")
            if t is not None and name in ("latents", "text", "image") and t.dtype != weight.dtype:
                raise TypeError(f"{name} must be {weight.dtype} like the weights; got {t.dtype}")
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents must be [B, {config.in_channels}, T, H, W]; got {list(latents.shape)}")
        batch = latents.shape[0]
        sizes = latents.shape[2:]
        for axis, size, patch in zip(("frames", "rows", "columns"), sizes, config.patch, strict=True):
            if size % patch or size == 0:
                fits = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
                raise ValueError(
                    f"latents have {size} {axis}, which patches of {patch} do not divide; "
                    f"{' or '.join(map(str, fits))} would fit"
                )
        frames, height, width = (n // p for n, p in zip(sizes, config.patch, strict=True))
        tokens = frames * height * width
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != config.text_dim:
            raise ValueError(f"text must be [{batch}, L, {config.text_dim}]; got {list(text.shape)}")
        if tuple(timesteps.shape) not in ((batch,), (batch, 1), (batch, frames), (batch, tokens)):
            raise ValueError(
                f"timesteps must be one for each clip [{batch}], frame [{batch}, {frames}] or token "
                f"[{batch}, {tokens}]; got {list(timesteps.shape)}"
            )
        if timesteps.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64):
            raise TypeError(f"timesteps must be fp32, fp64 or integers; got {timesteps.dtype}")
        if text_lens is not None and (text_lens.shape != (batch,) or text_lens.dtype.is_floating_point):
            got = f"{list(text_lens.shape)} {text_lens.dtype}"
            raise ValueError(f"text_lens must be [{batch}] integers; got {got}")
        if (image is None) != (config.image_dim is None):
            raise ValueError(
                f"image must be [{batch}, I, {config.image_dim}]: this model sees one; got None" if image is None else
                f"image must be None: this model sees none; got {list(image.shape)}"
            )
        if image is not None:
            tokens = config.image_tokens or (image.shape[1] if image.ndim == 3 else "I")
            if tuple(image.shape) != (batch, tokens, config.image_dim):
                raise ValueError(f"image must be [{batch}, {tokens}, {config.image_dim}]; got {list(image.shape)}")
        return frames, height, width

    def to_dtype(self, dtype: torch.dtype) -> SoraDiT:
        """Converts the weights as Wan keeps them: to `dtype`, save those that stay in fp32, and in fp8. Returns the
        model."""
        for name, parameter in self._not_in_fp8():
            parameter.data = parameter.data.to(_kept_in(name, dtype))
        return self

    def weights_in(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights as `to_dtype` converts them, for `torch.func.functional_call`: gradients reach the parameters."""
        return {name: parameter.to(_kept_in(name, dtype)) for name, parameter in self._not_in_fp8()}

    def _not_in_fp8(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.dtype.itemsize > 1]

    def kept_wide(self, dtype: torch.dtype) -> set[nn.Parameter]:
        """The weights that `to_dtype` does not convert."""
        return {parameter for name, parameter in self.named_parameters() if _kept_in(name, dtype) != dtype}

    @classmethod
    def planned(cls, sizes: Mapping[str, Any], held: Mapping[str, Any], where: str) -> tuple[DiTConfig, dict[str, Any]]:
        """The config of a transformer of Wan, and what is held by our names: tensors, or headers without values.

        sizes  of its config.json, or {"_class_name": ORIGINAL} without one
        held   by the names of diffusers' or Wan's own file

        Raises as `from_wan`, unless names, dtypes and shapes are those of the config.
        """
        from . import fp8
        from .checkpoint import FP8, CheckpointError, check_dtypes, check_shapes, planned_shapes

        if any("lora_" in name for name in held):
            raise CheckpointError(
                f"{where} is a LoRA, which changes a model's weights: load the model, then load_lora, or --lora"
            )
        weights = fp8.weights(held)
        given = {own_name(name): value for name, value in weights.items() if "norm_added_q" not in name}
        check_dtypes({name: value.dtype for name, value in given.items()}, where, also=FP8)
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        if sizes.get("_class_name") == ORIGINAL:
            config = DiTConfig.of_weights(shapes, heads=sizes.get("num_heads"))
        else:
            config = DiTConfig.from_wan(sizes)
        check_shapes(planned_shapes(cls, config, shapes.values(), where), shapes, where)
        return config, given

    @classmethod
    def from_wan(
        cls, source: nn.Module | str | Path, *, dtype: torch.dtype | None = None, keep_fp8: bool = False
    ) -> SoraDiT:
        """The same model as a diffusers WanTransformer3DModel: the module, or a directory it was saved in; or as Wan's
        own safetensors, a directory of theirs or one file.

        The weights are in the dtypes they have, or in `dtype` save those that Wan keeps in fp32; a module's are copied,
        a file's are mapped into memory where they keep their dtype. Those stored in fp8, with scales or without, are
        widened one by one, to bf16 where no `dtype` is named; with `keep_fp8` those of the blocks' linear layers, which
        are nearly all, stay in fp8 and are widened to the same bits by each layer as it runs: they take no gradients.
        Raises CheckpointError for what cannot be read or does not fit together, ValueError for another class, however
        much it resembles Wan (SkyReels-V2, ChronoEdit, VACE, ...).
        """
        # the model itself needs no safetensors
        from . import fp8
        from .checkpoint import FP8, read_tensors, read_wan_directory, unfilled

        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point one or None; got {dtype}")
        is_module = isinstance(source, nn.Module)
        if is_module:
            sizes, state = checks.config_of(source, "WanTransformer3DModel", "forward"), source.state_dict()
        elif Path(source).is_file():
            sizes, state = {"_class_name": ORIGINAL}, read_tensors(source, also=FP8)
        else:
            sizes, state = read_wan_directory(source, also=FP8)
        where = type(source).__name__ if is_module else str(source)
        scales = {own_name(name): scale for name, scale in fp8.scales(state, where).items()}
        config, given = cls.planned(sizes, state, where)
        if dtype is None and (scales or any(value.dtype in FP8 for value in given.values())):
            dtype = torch.bfloat16
        for name, value in given.items():
            value = value.detach()
            if keep_fp8 and fp8.stays(name, value.shape, value.dtype):
                wide = value
            else:
                wide = fp8.widened(value, scales.get(name), _kept_in(name, dtype) if dtype else value.dtype)
            given[name] = wide.clone() if is_module and wide is value else wide
        with unfilled():
            model = cls(config)
        model.load_state_dict(given, assign=True)
        fp8.keep(model, scales)
        return model


_NAMES_FROM_WAN = {  # those of diffusers, then those of Wan's own files that differ from ours; in this order
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "image_embedding.ffn.0",
    "condition_embedder.image_embedder.ff.net.2": "image_embedding.ffn.2",
    "condition_embedder.image_embedder.norm1": "image_embedding.norm_in",
    "condition_embedder.image_embedder.norm2": "image_embedding.norm_out",
    "condition_embedder.image_embedder.pos_embed": "image_embedding.place",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "attn.to_out.0": "attn.o",
    "attn.to_": "attn.",
    "attn.norm_q.weight": "attn.norm_q",
    "attn.norm_k.weight": "attn.norm_k",
    "attn.add_k_proj": "attn.k_image",
    "attn.add_v_proj": "attn.v_image",
    "attn.norm_added_k.weight": "attn.norm_k_image",
    "norm2.": "cross_norm.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head",
    "attn.k_img": "attn.k_image",
    "attn.v_img": "attn.v_image",
    "attn.norm_k_img.weight": "attn.norm_k_image",
    "norm3.": "cross_norm.",
    "img_emb.proj.0": "image_embedding.norm_in",
    "img_emb.proj.1": "image_embedding.ffn.0",
    "img_emb.proj.3": "image_embedding.ffn.2",
    "img_emb.proj.4": "image_embedding.norm_out",
    "img_emb.emb_pos": "image_embedding.place",
    "head.head": "head",
    "head.modulation": "head_table",
    "modulation": "table",
}


def _kept_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight in a model of `dtype`: never less than fp32 for what Wan keeps in it."""
    wide = name.endswith("table") or name.startswith(("time_embedding", "image_embedding.norm")) or "cross_norm" in name
    return torch.promote_types(dtype, torch.float32) if wide else dtype


ORIGINAL = "WanModel"  # the class that Wan's own config.json names, or none where a file comes without one


def own_name(name: str) -> str:
    """Our name of a weight of diffusers' WanTransformer3DModel, or of Wan's own files."""
    name = name.removeprefix("model.").removeprefix("diffusion_model.")
    for theirs, ours in _NAMES_FROM_WAN.items():
        name = name.replace(theirs, ours)
    return "head_table" if name == "scale_shift_table" else name.replace("scale_shift_table", "table")


def _check_size(name: str, value: Any, limit: int) -> None:
    checks.whole(f"DiTConfig: {name}", value, 1, limit)
