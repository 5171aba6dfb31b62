"""fp32 products of thousands of terms as compiled code: as near to fp64 as PyTorch's; run by tests/test_ptx.py.

A product without tensor cores is one chain of additions, where the interpreter's, NumPy's, adds in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sora_kernels as sk
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

Case = tuple[Callable, Callable, dict[str, torch.Tensor]]


def embed(C: int, size: tuple, patch: tuple, D: int) -> Case:
    """Sums over a patch, over D."""

    def plain(video, weight, bias):
        features = video
        for axis, side in enumerate(patch):
            features = features.unfold(2 + axis, side, side)
        return F.linear(features.movedim(1, 4).flatten(4).flatten(1, 3), weight.flatten(1), bias)

    weight = torch.randn(D, C, *patch) / (C * patch[0] * patch[1] * patch[2]) ** 0.5
    return sk.patch_embed3d, plain, dict(video=torch.randn(1, C, *size), weight=weight, bias=torch.randn(D))


def final(tokens: int, D: int, N: int) -> Case:
    """Sums over D, over features, over tokens."""

    def plain(x, shift, scale, weight):
        y = F.linear(F.layer_norm(x, (D,), None, None, 1e-6) * (1 + scale) + shift, weight)
        return y.mT.unflatten(2, (tokens, 1, 1))

    ours = partial(sk.final_layer, grid=(tokens, 1, 1), patch=(1, 1, 1))
    weight, rows = torch.randn(N, D) / D**0.5, [torch.randn(1, 1, D) for _ in range(2)]
    return ours, plain, dict(x=torch.randn(1, tokens, D), shift=rows[0], scale=rows[1], weight=weight)


def conv(C: int, N: int, size: tuple) -> Case:
    """Sums over channels and taps, over pixels."""

    def plain(x, weight):
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight)

    weight = torch.randn(N, C, 3, 3, 3) / (27 * C) ** 0.5
    return sk.causal_conv3d, plain, dict(x=torch.randn(1, C, *size), weight=weight)


def attend(queries: int, keys: int, E: int) -> Case:
    """Sums over keys, over queries."""

    def plain(q, k, v):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    sizes = dict(q=queries, k=keys, v=keys)
    return sk.spacetime_attention, plain, {name: torch.randn(1, n, 1, E) for name, n in sizes.items()}


CASES = {
    "patch_embed3d of 4096 features": partial(embed, 128, (2, 8, 8), (2, 4, 4), 40),
    "patch_embed3d of width 4096": partial(embed, 3, (1, 4, 4), (1, 2, 2), 4096),
    "final_layer of width 5120": partial(final, 20, 5120, 12),
    "final_layer of 1024 features": partial(final, 20, 64, 1024),
    "final_layer of 32768 tokens": partial(final, 32768, 32, 4),
    "causal_conv3d of 384 channels": partial(conv, 384, 16, (1, 3, 5)),
    "causal_conv3d to 384 channels": partial(conv, 16, 384, (1, 3, 5)),
    "causal_conv3d of 32768 pixels": partial(conv, 4, 4, (2, 128, 128)),
    "attention to 4096 keys": partial(attend, 5, 4096, 32),
    "attention of 4096 queries": partial(attend, 4096, 5, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_long_products_in_fp32_keep_the_error_rule(case):
    ours, plain, inputs = CASES[case]()
    grads = [torch.randn_like(plain(**inputs))]
    actual, baseline = (outputs_and_grads(f, inputs, grads) for f in (partial(ours, impl="triton"), plain))
    oracle = outputs_and_grads(plain, {n: t.double() for n, t in inputs.items()}, [grads[0].double()])
    for name in oracle:
        assert_matches_oracle(actual[name], oracle[name], baseline[name], f"{case}: {name}")
