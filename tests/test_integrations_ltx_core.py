"""LTX-2's pluggable ops, by a stand-in of `ltx_core`'s door: one block's functions against the host's arithmetic."""

from __future__ import annotations

import enum
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sora_kernels.integrations import _host, ltx_core
from sora_kernels.testing import assert_matches_oracle

HEADS, E = 2, 12


class LTXRopeType(enum.Enum):
    INTERLEAVED = "interleaved"
    SPLIT = "split"


def rotate(x, pe, rope_type):
    """The host's `apply_rotary_emb` of [B, S, H·E]."""
    cos, sin = (t.to(x.dtype) for t in pe)
    if rope_type is LTXRopeType.INTERLEAVED:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-second, first), -1).flatten(-2) * sin
    wide = cos.ndim == 3
    x = x if wide else x.unflatten(-1, (cos.shape[1], -1)).transpose(1, 2)
    first, second = x.chunk(2, -1)
    x = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return x if wide else x.transpose(1, 2).flatten(-2)


class Functions:
    """The host's functions in PyTorch, which `from_functions` takes for those not given."""

    @staticmethod
    def attention(q, k, v, heads):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    @staticmethod
    def preattention(q, k, attn_module, mask, pe, k_pe):
        q, k = attn_module.q_norm(q), attn_module.k_norm(k)
        if pe is not None:
            q = rotate(q, pe, attn_module.rope_type)
            k = rotate(k, pe if k_pe is None else k_pe, attn_module.rope_type)
        return q, k

    @staticmethod
    def ada_zero(x, eps, scale, shift):
        return F.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    @staticmethod
    def post_sa(x, y, norm_weights, eps, gate):
        x = x + y * gate
        return x, F.rms_norm(x, x.shape[-1:], norm_weights, eps=eps)

    masked_attention = gated_attention = None


class TransformerOpsConfig(types.SimpleNamespace):
    @classmethod
    def from_functions(
        cls, attention=None, masked_attention=None, preattention=None, gated_attention=None, ada_zero=None, post_sa=None
    ):
        given = {name: function for name, function in locals().items() if name != "cls"}
        return cls(**{name: function or getattr(Functions, name) for name, function in given.items()})


class Block(nn.Module):
    """Attention with its norms, between ada_zero and post_sa, as in the host's block."""

    def __init__(self, rope_type):
        super().__init__()
        self.rope_type, self.heads = rope_type, HEADS
        self.q_norm, self.k_norm = nn.RMSNorm(HEADS * E, eps=1e-6), nn.RMSNorm(HEADS * E, eps=1e-6)
        for norm in (self.q_norm, self.k_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, ops, x, context, scale, shift, gate, pe, k_pe):
        normed = ops.ada_zero(x, 1e-6, scale, shift)
        context = normed if context is None else context
        q, k = ops.preattention(normed, context, self, None, pe, k_pe)
        return ops.post_sa(x, ops.attention(q, k, context, self.heads), None, 1e-6, gate)


@pytest.fixture(autouse=True)
def host(monkeypatch):
    name = "ltx_core.model.transformer.transformer"
    module = types.ModuleType(name)
    module.TransformerOpsConfig = TransformerOpsConfig
    monkeypatch.setitem(sys.modules, name, module)
    while name := name.rpartition(".")[0]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def table(form, B, S):
    phi = {"split": (B, HEADS, S, E // 2), "split, one for all clips": (1, HEADS, S, E // 2),
           "split over the width": (B, S, HEADS * E // 2), "interleaved": (B, S, HEADS * E // 2)}[form]  # fmt: skip
    phi = torch.randn(phi)
    phi = phi.repeat_interleave(2, -1) if form == "interleaved" else phi
    return phi.cos(), phi.sin()


FORMS = ("split", "split, one for all clips", "split over the width", "interleaved", "none")


@pytest.mark.parametrize("other_keys", [False, True], ids=["self-attention", "keys of the sound"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_on_our_ops(dtype, form, other_keys):
    draws = [runs_of_a_block(dtype, form, other_keys, seed) for seed in range(12)]
    for i, results in enumerate(zip(*draws[0], strict=True)):
        if i < 2:
            actual, baseline, exact = results
            assert_matches_oracle(actual, exact, baseline, f"output {i}")
        # after five operations chance decides whose worst element errs more: gradients as a whole, of several draws
        actual, baseline, exact = (torch.cat([draw[k][i].double().flatten() for draw in draws]) for k in range(3))
        error, plain_error = (actual - exact).norm().item(), (baseline - exact).norm().item()
        assert error <= 2 * plain_error + torch.finfo(dtype).eps * exact.norm().item(), f"result {i}"


def runs_of_a_block(dtype, form, other_keys, seed):
    """Outputs and gradients: ours, plain, and plain in fp64."""
    torch.manual_seed(seed)
    B, S, Sk = 2, 6, 5
    block = Block(LTXRopeType.INTERLEAVED if form == "interleaved" else LTXRopeType.SPLIT).to(dtype)
    pe = None if form == "none" else table(form, B, S)
    k_pe = table(form, B, Sk) if other_keys and pe else None
    tensors = [torch.randn(shape).to(dtype) for shape in ((B, S, 24), (B, 1, 24), (B, S, 24), (B, 1, 24))]
    tensors += [torch.randn(B, Sk, 24).to(dtype)] if other_keys else []
    ours, plain = ltx_core.transformer_ops(), TransformerOpsConfig.from_functions()
    runs = []
    for ops, double in ((ours, False), (plain, False), (plain, True)):
        module = block.double() if double else block.to(dtype)
        leaves = [(t.double() if double else t).detach().requires_grad_() for t in tensors]
        x, scale, shift, gate, *context = leaves
        outputs = module(ops, x, context[0] if context else None, scale, shift, gate, pe, k_pe)
        grads = [torch.linspace(-1, 1, o.numel()).to(dtype).to(o.dtype).view_as(o) for o in outputs]
        leaves += list(module.parameters())
        runs.append([*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)])
    return runs


def test_functions_given_take_the_place_of_ours():
    marker = object()
    ops = ltx_core.transformer_ops(gated_attention=marker, post_sa=marker)
    assert ops.gated_attention is ops.post_sa is marker
    assert (ops.attention, ops.preattention, ops.ada_zero) == (
        ltx_core.attention, ltx_core.preattention, ltx_core.ada_zero)  # fmt: skip


def test_a_missing_or_old_host_is_named(monkeypatch):
    monkeypatch.setattr(_host, "release", lambda distribution: (1, 0, 0))
    with pytest.raises(ImportError, match="needs ltx-core >= 1.2 for .*; found 1.0.0: install it from packages"):
        ltx_core.transformer_ops()
