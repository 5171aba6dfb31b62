"""LightX2V's registers of weight classes, by a stand-in: the classes "sora" beside the host's own in PyTorch."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from sora_kernels.integrations import _host, lightx2v
from sora_kernels.testing import assert_matches_oracle


class Register(dict):
    """As the host's: a decorator by name, which refuses a name that is taken."""

    def __call__(self, name):
        def register(target):
            if name in self:
                raise Exception(f"{name} already exists.")
            self[name] = target
            return target

        return register


def stand_in():
    """The registers, with the classes that the door builds on."""
    host = types.ModuleType("lightx2v.utils.registry_factory")
    names = ("ATTN_WEIGHT_REGISTER", "RMS_WEIGHT_REGISTER", "LN_WEIGHT_REGISTER", "ROPE_REGISTER")
    host.__dict__.update({name: Register() for name in names})

    @host.ATTN_WEIGHT_REGISTER("torch_sdpa")
    class TorchSDPAWeight:
        def apply(self, q, k, v, drop_rate=0, attn_mask=None, causal=False, **kwargs):
            q, k, v = ((t[None] if t.ndim == 3 else t).transpose(1, 2) for t in (q, k, v))
            scale = kwargs.get("softmax_scale")
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, drop_rate, causal, scale=scale)
            return out.transpose(1, 2).flatten(2).flatten(0, 1)

    class Norm:
        weight = bias = None
        eps, infer_dtype, sensitive_layer_dtype = 1e-6, torch.float32, torch.float32

        def _get_actual_weight(self):
            return None if self.weight is None else self.weight + self.weight_diff

        def _get_actual_bias(self):
            return self.bias

    @host.RMS_WEIGHT_REGISTER("torch")
    class RMSWeight(Norm):
        def apply(self, x):
            out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            weight = self._get_actual_weight()
            return out if weight is None else out * weight

    @host.LN_WEIGHT_REGISTER("torch")
    class LNWeight(Norm):
        def apply(self, x):
            out = F.layer_norm(x, x.shape[-1:], self._get_actual_weight(), self._get_actual_bias(), self.eps)
            return out.to(self.infer_dtype) if self.sensitive_layer_dtype != self.infer_dtype else out

    @host.ROPE_REGISTER("torch_complex_rope")
    class TorchComplexRope:
        def __init__(self, layout="interleaved"):
            self.layout = layout

        def prepare_freqs(self, freqs, rotary_dim=None):
            if torch.is_tensor(freqs) and torch.is_complex(freqs):
                return freqs
            return torch.complex(*(freqs if isinstance(freqs, tuple) else freqs.chunk(2, -1)))

        def apply(self, q, k, freqs, **kwargs):
            return tuple(self.apply_single(x, freqs, **kwargs) for x in (q, k))

        def apply_single(self, x, freqs, rotary_dim=None):
            rotary_dim = rotary_dim or x.shape[-1]
            turns = self.prepare_freqs(freqs, rotary_dim)
            turns = (turns if turns.ndim == x.ndim else turns.unsqueeze(-2)).to(torch.complex128)
            x_rot, x_pass = x[..., :rotary_dim].double(), x[..., rotary_dim:]
            split = x_rot.unflatten(-1, (2, -1)).unbind(-2)
            a, b = (x_rot[..., ::2], x_rot[..., 1::2]) if self.layout == "interleaved" else split
            out = torch.view_as_real(torch.complex(a, b) * turns)
            out = out.flatten(-2) if self.layout == "interleaved" else torch.cat(out.unbind(-1), -1)
            return torch.cat([out.to(x.dtype), x_pass], -1)

    return host


@pytest.fixture
def host(monkeypatch):
    host = stand_in()
    for name in ("lightx2v", "lightx2v.utils", "lightx2v.common", "lightx2v.common.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, host.__name__, host)
    lightx2v.register()
    lightx2v.register()  # twice is once
    return host


def both(register, parent, *arguments):
    return register["sora"](*arguments), register[parent](*arguments)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"softmax_scale": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(host, dtype, how, batched):
    ours, plain = both(host.ATTN_WEIGHT_REGISTER, "torch_sdpa")
    shape = (2, 7, 4, 16) if batched else (7, 4, 16)
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    offsets = torch.arange(3 if batched else 2) * 7
    out = ours.apply(q, k, v, cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=7, max_seqlen_kv=7, **how)
    assert out.shape == ((14 if batched else 7), 64) and isinstance(ours, type(plain))
    assert_matches_oracle(out, plain.apply(q.double(), k.double(), v.double(), **how), plain.apply(q, k, v, **how))


def test_a_block_of_a_ring(host):
    ours = host.ATTN_WEIGHT_REGISTER["sora"]()
    q, k, v = torch.randn(7, 4, 16), torch.randn(9, 4, 16), torch.randn(9, 4, 16)
    out, lse = ours.apply_with_lse(q, k, v, softmax_scale=0.3)
    torch.testing.assert_close(out, ours.apply(q, k, v, softmax_scale=0.3))
    torch.testing.assert_close(lse, (0.3 * torch.einsum("qhe,khe->qhk", q, k)).logsumexp(-1))


def test_what_attention_refuses(host):
    ours, q = host.ATTN_WEIGHT_REGISTER["sora"](), torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match="serves neither drop_rate nor attn_mask; use 'torch_sdpa'"):
        ours.apply(q, q, q, attn_mask=torch.ones(6, 6).bool())
    with pytest.raises(ValueError, match="one sequence for each of the 1 batches; got cu_seqlens_kv of 2: use"):
        ours.apply(q, q, q, cu_seqlens_kv=torch.tensor([0, 2, 6]))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", ["RMS_WEIGHT_REGISTER", "LN_WEIGHT_REGISTER"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(host, dtype, name, affine):
    ours, plain = both(getattr(host, name), "torch")
    x, weight, diff, bias = torch.randn(5, 24).to(dtype), *(torch.randn(24).to(dtype) for _ in range(3))

    def apply(norm, kind):
        if affine:
            norm.weight, norm.weight_diff = weight.to(kind), diff.to(kind)
            norm.bias = bias.to(kind)
        return norm.apply(x.to(kind))

    assert_matches_oracle(apply(ours, dtype), apply(plain, torch.double), apply(plain, dtype))


def test_a_norm_of_sensitive_layers_returns_the_dtype_of_inference(host):
    ours = host.LN_WEIGHT_REGISTER["sora"]()
    ours.infer_dtype = torch.bfloat16
    assert ours.apply(torch.randn(5, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["complex", "complex with heads", "cos and sin", "one tensor"])
@pytest.mark.parametrize("rotary_dim", [None, 8])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "split_half"])
def test_rotary_embedding(host, layout, batched, rotary_dim, form):
    ours, plain = both(host.ROPE_REGISTER, "torch_complex_rope", layout)
    q, k = (torch.randn((2, 6, 3, 16) if batched else (6, 3, 16)) for _ in range(2))
    phi = torch.randn(6, (rotary_dim or 16) // 2)
    freqs = {"complex": torch.polar(torch.ones_like(phi), phi), "cos and sin": (phi.cos(), phi.sin()),
             "one tensor": torch.cat([phi.cos(), phi.sin()], -1)}  # fmt: skip
    freqs = freqs["complex"][:, None] if form == "complex with heads" else freqs[form]
    kwargs = {"rotary_dim": rotary_dim} if rotary_dim else {}
    if batched and form == "complex with heads":
        freqs = freqs[:, 0]
    for out, expected in zip(ours.apply(q, k, freqs, **kwargs), plain.apply(q, k, freqs, **kwargs), strict=True):
        torch.testing.assert_close(out, expected)


def test_frequencies_of_each_clip_are_the_hosts(host):
    ours, plain = both(host.ROPE_REGISTER, "torch_complex_rope")
    q, freqs = torch.randn(2, 6, 3, 16), torch.polar(torch.ones(2, 6, 1, 8), torch.randn(2, 6, 1, 8))
    torch.testing.assert_close(ours.apply(q, q, freqs), plain.apply(q, q, freqs), rtol=0, atol=0)


def test_a_missing_host_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightx2v", None)
    with pytest.raises(ImportError, match="needs lightx2v >= 0.1 for its registers of weight classes"):
        lightx2v.register()
    monkeypatch.setattr(_host, "release", lambda distribution: (0, 0, 3))
    with pytest.raises(ImportError, match="found 0.0.3: install it from github.com"):
        lightx2v.register()
