"""Frames as people see them, and as models do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sora_kernels import video_to_uint8


def to_video(frames: np.ndarray | Tensor) -> Tensor:
    """uint8 `[B, T, H, W, 3]` -> fp32 `[B, 3, T, H, W]` in [-1, 1]."""
    return torch.as_tensor(frames).movedim(-1, 1).float().div_(127.5).sub_(1)


def to_pixels(video: Tensor, impl: str) -> np.ndarray:
    """A decoded clip `[1, 3, T, H, W]` as uint8 `[T, H, W, 3]`; FloatingPointError where it is not finite."""
    if not torch.isfinite(video).all():
        raise FloatingPointError("the VAE gives NaN or infinite pixels: its weights are damaged, or what it was given")
    return video_to_uint8(video, impl=impl)[0].cpu().numpy()


def held(frames: np.ndarray, count: int) -> np.ndarray:
    """As many as `count` frames: the last one stands still."""
    return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames), axis=0)])


def covering(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 `[T, H, W, 3]` scaled to cover `size` = (height, width), and cut around the centre."""
    from PIL import Image

    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    scale = max(height / frames.shape[1], width / frames.shape[2])
    tall, wide = (max(least, round(n * scale)) for n, least in zip(frames.shape[1:3], size, strict=True))
    top, left = (tall - height) // 2, (wide - width) // 2
    scaled = (np.asarray(Image.fromarray(frame).resize((wide, tall), Image.Resampling.LANCZOS)) for frame in frames)
    return np.stack([frame[top : top + height, left : left + width] for frame in scaled])
