"""What a type checker sees of the public functions: mypy reads this file, and `test_typing.py` also runs it.

`assert_type` is what a call is known to return; a line that ends in `type: ignore` is a call that must be refused, and
mypy reports it when it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import sora_kernels
import sora_model
from sora_kernels import layers
from sora_kernels.attention import AttentionPlan
from sora_kernels.integrations import Report, Verification, patch_model, patched, unpatch_model, verify_patch

B, T, H, W, D, HEADS, C = 1, 2, 3, 4, 8, 2, 4
S, GRID, PATCH = T * H * W, (T, H, W), (1, 1, 1)


def modulation(x: Tensor, row: Tensor) -> None:
    assert_type(sora_kernels.norm_modulate(x, row, row, norm="rms"), Tensor)
    assert_type(sora_kernels.norm_modulate(x, None, None, weight=row, out=torch.empty_like(x)), Tensor)
    assert_type(sora_kernels.gate_residual(x, x, row, gate_table=row), Tensor)
    assert_type(sora_kernels.gate_residual_norm_modulate(x, x, row, row, row), tuple[Tensor, Tensor])


def modulation_refused(x: Tensor, row: Tensor) -> None:
    sora_kernels.norm_modulate(x, row)  # type: ignore[call-arg]
    sora_kernels.norm_modulate(x, row, row, "rms")  # type: ignore[call-arg]
    sora_kernels.norm_modulate(x, row, row, epsilon=1e-5)  # type: ignore[call-arg]
    sora_kernels.gate_residual(x, x, 0.5)  # type: ignore[arg-type]
    sora_kernels.gate_residual_norm_modulate(x, x, row, row, row, out=x)  # type: ignore[arg-type]


def heads(q: Tensor, weight: Tensor) -> None:
    assert_type(sora_kernels.qk_norm_rope(q, q, q_weight=weight, k_weight=weight, grid=GRID), tuple[Tensor, Tensor])
    stats = sora_kernels.qk_norm_stats(q, q)
    assert_type(stats, Tensor)
    width = q[0, 0].numel()
    assert_type(sora_kernels.qk_norm_rope(q, q, across="width", stats=stats, width=width), tuple[Tensor, Tensor])
    assert_type(sora_kernels.qk_norm_rope(q, q, grid=[2 * T, H, W], tokens=(S, 2 * S)), tuple[Tensor, Tensor])
    assert_type(sora_kernels.gate_heads(q, torch.ones(q.shape[:3])), Tensor)


def heads_refused(q: Tensor) -> None:
    sora_kernels.qk_norm_rope(q, q, grid=S)  # type: ignore[arg-type]
    sora_kernels.qk_norm_rope(q)  # type: ignore[call-arg]
    sora_kernels.qk_norm_stats(q)  # type: ignore[call-arg]


def attention(q: Tensor, lens: Tensor, with_lse: bool) -> None:
    assert_type(sora_kernels.spacetime_attention(q, q, q), Tensor)
    assert_type(sora_kernels.spacetime_attention(q, q, q, grid=GRID, window=[1, 3, 3], causal="frame"), Tensor)
    assert_type(sora_kernels.spacetime_attention(q, q, q, kv_lens=lens, return_lse=True), tuple[Tensor, Tensor])
    assert_type(sora_kernels.spacetime_attention(q, q, q, return_lse=with_lse), Tensor | tuple[Tensor, Tensor])
    out, lse = sora_kernels.attention_forward(q, q, q)
    assert_type(sora_kernels.attention_backward(out, q, q, q, out, lse), tuple[Tensor, Tensor, Tensor])
    assert_type(sora_kernels.merge_attention((out, lse), (out, lse)), tuple[Tensor, Tensor])
    plan = sora_kernels.attention_plan(S, grid=GRID, window=(1, 3, 3))
    assert_type(plan, AttentionPlan)
    per_head = sora_kernels.attention_plan(S, grid=GRID, window=[(1, 3, 3), GRID])
    assert_type(per_head, AttentionPlan | tuple[tuple[tuple[int, ...], AttentionPlan], ...])


def attention_refused(q: Tensor) -> None:
    sora_kernels.spacetime_attention(q, q)  # type: ignore[call-overload]
    sora_kernels.spacetime_attention(q, q, q, window="1x3x3")  # type: ignore[arg-type]
    sora_kernels.spacetime_attention(q, q, q, mask=q)  # type: ignore[call-overload]
    sora_kernels.merge_attention(q, q)  # type: ignore[arg-type]
    sora_kernels.attention_plan(GRID)  # type: ignore[call-overload]


def patches(video: Tensor, weight: Tensor, row: Tensor) -> None:
    tokens = sora_kernels.patch_embed3d(video, weight)
    assert_type(tokens, Tensor)
    assert_type(sora_kernels.unpatchify3d(tokens, GRID, PATCH, D), Tensor)
    assert_type(sora_kernels.final_layer(tokens, row, row, row.expand(C, D), grid=GRID, patch=PATCH), Tensor)
    assert_type(sora_kernels.video_to_uint8(video), Tensor)


def patches_refused(video: Tensor, weight: Tensor) -> None:
    sora_kernels.patch_embed3d(video, D)  # type: ignore[arg-type]
    sora_kernels.unpatchify3d(video, GRID, PATCH)  # type: ignore[call-arg]
    sora_kernels.video_to_uint8(video, PATCH)  # type: ignore[call-arg]


def marks(frames: Tensor, tile: Tensor) -> None:
    assert_type(sora_kernels.embed_watermark(frames, tile), Tensor)


def marks_refused(frames: Tensor) -> None:
    sora_kernels.embed_watermark(frames)  # type: ignore[call-arg]


def convolutions(x: Tensor, weight: Tensor, row: Tensor) -> None:
    past = torch.zeros(B, C, 2, H, W)
    assert_type(sora_kernels.norm_silu(x, row), Tensor)
    assert_type(sora_kernels.causal_conv3d(x, weight, row, stride=(1, 1, 1)), Tensor)
    assert_type(sora_kernels.causal_conv3d(x, weight, cache=past), tuple[Tensor, Tensor])
    assert_type(sora_kernels.causal_conv3d(x, weight, norm_weight=row, return_raw=True), tuple[Tensor, Tensor])
    assert_type(
        sora_kernels.causal_conv3d(x, weight, cache=past, norm_weight=row, return_raw=True),
        tuple[Tensor, Tensor, Tensor],
    )
    assert_type(sora_kernels.upsample_conv3d(x, weight), Tensor)
    assert_type(sora_kernels.upsample_conv3d(x, weight, cache=past), tuple[Tensor, Tensor])
    assert_type(sora_kernels.downsample_conv3d(x, weight), Tensor)
    assert_type(sora_kernels.downsample_conv3d(x, weight, cache=past), tuple[Tensor, Tensor])


def convolutions_refused(x: Tensor, weight: Tensor) -> None:
    sora_kernels.causal_conv3d(x)  # type: ignore[call-overload]
    sora_kernels.causal_conv3d(x, weight, padding=1)  # type: ignore[call-overload]
    sora_kernels.causal_conv3d(x, weight, cache=True)  # type: ignore[call-overload]
    sora_kernels.upsample_conv3d(x, weight, factor=2)  # type: ignore[call-overload]


def modules(x: Tensor) -> None:
    host = torch.nn.LayerNorm(D)
    assert_type(layers.LayerNorm.forward(host, x), Tensor)


def dropping_in(model: torch.nn.Module) -> None:
    assert_type(patch_model(model, ("norm_modulate",), strict=True), Report)
    assert_type(verify_patch(model, gradients=False), Verification)
    assert_type(unpatch_model(model), None)
    with patched(model) as report:
        assert_type(report, Report)


def failures(error: sora_kernels.Unavailable) -> RuntimeError:
    return error


def model() -> None:
    small = sora_model.DiTConfig(dim=48, heads=2, layers=1, ffn_dim=64)
    assert_type(sora_model.SoraDiT(small), sora_model.SoraDiT)
    assert_type(sora_model.VAEConfig(), sora_model.VAEConfig)
    sora = sora_model.Sora.from_pretrained("toy", device="cpu")
    assert_type(sora, sora_model.Sora)
    clip = sora.generate("a red ball", seconds=1 / 8, steps=1)
    assert_type(clip, sora_model.Clip)
    assert_type(clip.fps, float)
    assert_type(sora.animate(clip.frames[0], "a red ball", seconds=1 / 8, steps=1), sora_model.Clip)
    assert_type(sora.vae, sora_model.CausalVAE)
    assert_type(sora_model.AttentionMode.parse("causal=frame"), sora_model.AttentionMode)


def model_failures() -> tuple[type[ValueError], ...]:
    return sora_model.CheckpointError, sora_model.MediaError, sora_model.TooLargeError


def model_refused(sora: sora_model.Sora) -> None:
    sora.generate()  # type: ignore[call-arg]
    sora.generate("a red ball", size="64x64")  # type: ignore[arg-type]
    sora_model.Sora.from_pretrained("toy", half=True)  # type: ignore[call-arg]


def run() -> None:
    """The calls that are typed above, made: what is not refused must work."""
    x, row, video = torch.randn(B, S, D), torch.randn(D), torch.randn(B, C, *GRID)
    q = torch.randn(B, S, HEADS, 32)
    modulation(x, row)
    heads(q, torch.randn(32))
    attention(q, torch.tensor([S]), True)
    patches(video, torch.randn(D, C, *PATCH), row)
    marks(torch.zeros(B, 2, H, W, 3, dtype=torch.uint8), torch.randn(8, 8))
    convolutions(video, torch.randn(C, C, 3, 3, 3), torch.randn(C))
    modules(x)
    model()
