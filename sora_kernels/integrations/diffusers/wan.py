"""diffusers' Wan and the models built of its blocks through our operations: VACE, Animate, ChronoEdit, SkyReels-V2.

Theirs upcast to fp32 around every norm, modulation and gate and round once after it; so do our operations inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ... import layers
from ...patchify import final_layer
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import attention_steps, draw, euler, why_not_processor, why_not_projection, why_not_read, why_not_rms_norms
from .wan_blocks import (
    Causal,
    FaceProcessor,
    SkyReelsV2Processor,
    WanProcessor,
    skyreels_block,
    takes_causal,
    vace_block,
    wan_block,
    why_not_block,
)

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    """The steps of the model, and what of it is never replaced."""
    kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
    faces = "encoders of motion and faces: convolutions of images and of one axis"
    return list(_steps(model, how)), (kept, faces) if hasattr(model, "face_encoder") else (kept,)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    """Random inputs that fit the model's config, of so many patches."""
    generator, config = torch.Generator().manual_seed(0), model.config
    T, H, W = grid
    T += -T % max(getattr(config, "num_frame_per_block", 1), 1)
    sizes = frames, *area = [n * p for n, p in zip((T, H, W), config.patch_size, strict=True)]

    def random(*sizes: int) -> Tensor:
        return draw(model.patch_embedding, 1, *sizes, generator=generator)

    latents = random(config.in_channels, *sizes)
    times = torch.tensor([500.0], device=latents.device)
    text = random(512 if config.added_kv_proj_dim else 16, config.text_dim)
    image = None
    if config.image_dim is not None:
        image = random(config.pos_embed_seq_len or 257, config.image_dim)
    if "vace_in_channels" in config:
        return latents, times, text, image, random(config.vace_in_channels, *sizes)
    if "motion_encoder_size" in config:
        pose = random(config.latent_channels, frames - 1, *area)
        side = config.motion_encoder_size
        return latents, times, text, image, pose, random(3, 4 * (frames - 1), side, side)
    if getattr(config, "inject_sample_info", False):  # as the models of SkyReels-V2 that force diffusion have it
        return latents, times.expand(1, T), text, image, True, [1]
    return latents, times, text, image


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The end of a short sampling run, all but noise and time as in the inputs; None if the model does not sample."""
    return euler(model, steps, inputs, kwargs, channels=model.config.out_channels)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    cls = next(cls for cls in type(model).__mro__ if cls.__name__ in _FORWARDS)
    theirs = sys.modules[cls.__module__]  # which holds the block and the attention of this model, often as copies
    skyreels = cls.__name__ == "SkyReelsV2Transformer3DModel"
    name = "SkyReelsV2" if skyreels else "Wan"
    attention, standard = getattr(theirs, f"{name}Attention"), getattr(theirs, f"{name}AttnProcessor")
    processor = SkyReelsV2Processor if skyreels else WanProcessor
    blocks = {getattr(theirs, f"{name}TransformerBlock"): skyreels_block if skyreels else wan_block}
    if (vace := getattr(theirs, "WanVACETransformerBlock", None)) is not None:
        blocks[vace] = vace_block

    for where in ("patch_embedding", "vace_patch_embedding", "pose_patch_embedding"):
        if (embedding := getattr(model, where, None)) is not None:
            reason = why_not_rebind(embedding, nn.Conv3d) or layers.why_not_embed(embedding)
            yield how.step(where, ("patch_embed3d",), reason, bind(embedding, _embed, how.impl))

    for where, module in model.named_modules():
        for kind, forward in blocks.items():
            if isinstance(module, kind):
                reason = why_not_rebind(module, kind) or why_not_block(module)
                yield how.step(where, _BLOCK, reason, bind(module, forward, how.impl))
        if isinstance(module, attention):
            reason = why_not_processor(module, attention, standard) or why_not_rms_norms(module)
            swap = Swap(module, processor(how, module.processor), processor=True)
            yield from attention_steps(where, reason, how, swap)
        elif type(module).__name__ == "WanAnimateFaceBlockCrossAttention":
            standard = theirs.WanAnimateFaceBlockAttnProcessor
            reason = why_not_processor(module, theirs.WanAnimateFaceBlockCrossAttention, standard)
            swap = Swap(module, FaceProcessor(how, module.processor), processor=True)
            yield from attention_steps(where, reason or why_not_rms_norms(module), how, swap)

    reason = why_not_rebind(model, cls) or _why_not_final(model)
    yield how.step("norm_out, proj_out", ("final_layer",), reason, bind(model, _FORWARDS[cls.__name__], how.impl))


def _why_not_final(model: nn.Module) -> str | None:
    return why_not_read(model, norm_out=(FP32LayerNorm,)) or why_not_projection(model, "proj_out")


def _embed(embedding: nn.Module, impl: str, x: Tensor) -> Tensor:
    return layers.embed(embedding, x, impl)


# Whole models, for the sake of the last step: norm, modulation and projection are lines of their forwards. A LoRA
# scale, which the host's decorator finds among keywords only, is the host's business.


def _wan_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    if attention_kwargs or _why_not_final(self):
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, return_dict
        return type(self).forward(self, *inputs, attention_kwargs=attention_kwargs)
    rotary_emb = self.rope(hidden_states)
    x = _tokens(self.patch_embedding(hidden_states))                                         # [B, S, D]
    inputs = timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image
    embedded = self.condition_embedder(*inputs, timestep_seq_len=timestep.shape[1] if timestep.ndim == 2 else None)
    time, rows, text = _conditions(*embedded)                                                # [B, 6, D] or [B, N, 6, D]
    for block in self.blocks:
        x = _called(self, block, x, text, rows, rotary_emb)
    return _final(self, impl, x, time, hidden_states, return_dict)


def _vace_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    control_hidden_states: Tensor | None = None,
    control_hidden_states_scale: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    scales, layers = control_hidden_states_scale, self.config.vace_layers
    if attention_kwargs or _why_not_final(self) or (scales is not None and len(scales) != len(layers)):
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        inputs = *inputs, control_hidden_states, scales, return_dict
        return type(self).forward(self, *inputs, attention_kwargs=attention_kwargs)
    rotary_emb = self.rope(hidden_states)
    x = _tokens(self.patch_embedding(hidden_states))
    control = _tokens(self.vace_patch_embedding(control_hidden_states))
    control = F.pad(control, (0, 0, 0, x.shape[1] - control.shape[1]))
    embedded = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    time, rows, text = _conditions(*embedded)
    scales = control.new_ones(len(layers)) if scales is None else scales
    hints = []
    for block, scale in zip(self.vace_blocks, scales.unbind(), strict=True):
        hint, control = _called(self, block, x, text, control, rows, rotary_emb)
        hints.append((hint, scale))
    hints = iter(hints)
    for i, block in enumerate(self.blocks):
        x = _called(self, block, x, text, rows, rotary_emb)
        if i in layers:
            hint, scale = next(hints)
            x = x + hint.to(x.device) * scale
    return _final(self, impl, x, time, hidden_states, return_dict)


def _skyreels_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    enable_diffusion_forcing: bool = False,
    fps: Any = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    chunk = self.config.num_frame_per_block
    masked = chunk > 1 and not all(takes_causal(block) for block in self.blocks)
    if attention_kwargs or masked or _why_not_final(self):
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        inputs = *inputs, enable_diffusion_forcing, fps, return_dict
        return type(self).forward(self, *inputs, attention_kwargs=attention_kwargs)
    rotary_emb = self.rope(hidden_states)
    x = self.patch_embedding(hidden_states)                                                  # [B, D, T, H, W]
    mask = Causal(tuple(x.shape[2:]), chunk) if chunk > 1 else None
    x = _tokens(x)
    embedded = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    time, rows, text = _conditions(*embedded)                                                # [B, 6, D] or [B, T, 6, D]
    if self.config.inject_sample_info:
        fps = torch.tensor(fps, dtype=torch.long, device=x.device)
        added = self.fps_projection(self.fps_embedding(fps)).unflatten(1, (6, -1))
        if enable_diffusion_forcing:
            rows = rows + added.repeat(timestep.shape[1], 1, 1)
        else:
            rows = rows + added
    if enable_diffusion_forcing:
        rows = rows.repeat_interleave(x.shape[1] // rows.shape[1], 1).transpose(1, 2)        # [B, 6, S, D]
    for block in self.blocks:
        x = _called(self, block, x, text, rows, rotary_emb, mask)
    return _final(self, impl, x, time, hidden_states, return_dict)


def _animate_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    pose_hidden_states: Tensor | None = None,
    face_pixel_values: Tensor | None = None,
    motion_encode_batch_size: int | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    pose = pose_hidden_states
    if attention_kwargs or _why_not_final(self) or pose is None or pose.shape[2] + 1 != hidden_states.shape[2]:
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        inputs = *inputs, pose, face_pixel_values, motion_encode_batch_size, return_dict
        return type(self).forward(self, *inputs, attention_kwargs=attention_kwargs)
    rotary_emb = self.rope(hidden_states)
    x = self.patch_embedding(hidden_states)
    x[:, :, 1:] = x[:, :, 1:] + self.pose_patch_embedding(pose)
    x = _tokens(x)
    embedded = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    time, rows, text = _conditions(*embedded)

    frames = face_pixel_values.transpose(1, 2).flatten(0, 1)                                 # [B*T, C, H, W]
    batches = frames.split(motion_encode_batch_size or self.config.motion_encoder_batch_size)
    motion = torch.cat([self.motion_encoder(batch) for batch in batches])
    faces = self.face_encoder(motion.view(len(x), -1, motion.shape[-1]))                     # [B, T', N, D]
    faces = torch.cat([torch.zeros_like(faces[:, :1]), faces], 1)

    every = self.config.inject_face_latents_blocks
    for i, block in enumerate(self.blocks):
        x = _called(self, block, x, text, rows, rotary_emb)
        if i % every == 0:
            x = self.face_adapter[i // every](x, faces).to(x.device) + x
    return _final(self, impl, x, time, hidden_states, return_dict)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).contiguous()


def _conditions(time: Tensor, rows: Tensor, text: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    text = text if image is None else torch.cat([image, text], 1)
    return time, rows.unflatten(-1, (6, -1)), text


def _called(model: nn.Module, block: nn.Module, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def _final(model: nn.Module, impl: str, x: Tensor, time: Tensor, video: Tensor, return_dict: bool) -> Any:
    table = model.scale_shift_table.to(time.device)                                          # [1, 2, D]
    shift, scale = ((time.unsqueeze(-2) + table).to(x.device)).unbind(-2)                    # [B, D] or [B, N, D]
    patch = tuple(model.config.patch_size)
    grid = tuple(n // p for n, p in zip(video.shape[2:], patch, strict=True))
    how = {"grid": grid, "patch": patch, "eps": model.norm_out.eps, "impl": impl}
    sample = final_layer(x, shift, scale, model.proj_out.weight, model.proj_out.bias, **how)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


_FORWARDS = {
    "WanTransformer3DModel": _wan_forward,
    "WanVACETransformer3DModel": _vace_forward,
    "WanAnimateTransformer3DModel": _animate_forward,
    "ChronoEditTransformer3DModel": _wan_forward,
    "SkyReelsV2Transformer3DModel": _skyreels_forward,
}
