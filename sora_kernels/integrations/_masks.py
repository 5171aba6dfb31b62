"""Masks of hosts as the lengths that `spacetime_attention` takes."""

from __future__ import annotations

import torch
from torch import Tensor


def real_keys_first(seen: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, kv_lens) for a boolean mask of keys [B or 1, Sk] and k, v [B, Sk, H, E].

    Attention does not depend on the order of keys, so any mask of them is a prefix once they are sorted: one copy of
    k and v, no wait for a GPU, differentiable.
    """
    seen = seen.expand(key.shape[:2])
    order = seen.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
    return key.take_along_dim(order, 1), value.take_along_dim(order, 1), seen.sum(1)
