"""The drop-in layers lent to torch's own modules: same parameters, same results, within the project's error rule."""

from __future__ import annotations

import copy
import inspect
import types

import pytest
import torch
from torch import nn

from sora_kernels import layers
from sora_kernels.testing import assert_matches_oracle

DTYPES = [torch.float32, torch.bfloat16]


class LlamaRMSNorm(nn.Module):
    """The norm of Llama and T5: statistics in fp32, `variance_epsilon` instead of `eps`."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-3

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class WanNorm(nn.Module):
    """The channel norm of Wan's VAE, with its SiLU."""

    def __init__(self, channels, bias=True):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1, 1)) if bias else 0.0

    def forward(self, x):
        normalized = nn.functional.normalize(x, dim=1) * x.shape[1] ** 0.5
        return nn.functional.silu(normalized * self.gamma + self.bias)


class GroupNormSiLU(nn.GroupNorm):
    def forward(self, x):
        return nn.functional.silu(super().forward(x))


HOSTS = {  # layer, host, shapes of x
    "LayerNorm": (layers.LayerNorm, lambda: nn.LayerNorm(37, eps=1e-3), [(2, 5, 37), (3, 37), (37,), (2, 2, 3, 37)]),
    "LayerNorm without bias": (layers.LayerNorm, lambda: nn.LayerNorm(16, bias=False), [(2, 5, 16)]),
    "LayerNorm without parameters": (
        layers.LayerNorm, lambda: nn.LayerNorm(16, elementwise_affine=False), [(2, 5, 16)]
    ),
    "RMSNorm": (layers.RMSNorm, lambda: nn.RMSNorm(24, eps=1e-3), [(2, 7, 24), (1, 24), (2, 1, 4, 24)]),
    "RMSNorm of Llama": (layers.RMSNorm, lambda: LlamaRMSNorm(20), [(2, 5, 20)]),
    "RMS norm and SiLU": (layers.NormSiLU, lambda: WanNorm(6), [(2, 6, 3, 4, 5)]),
    "RMS norm without bias and SiLU": (layers.NormSiLU, lambda: WanNorm(5, bias=False), [(1, 5, 1, 2, 2)]),
    "GroupNorm and SiLU": (layers.NormSiLU, lambda: GroupNormSiLU(3, 6, eps=1e-3), [(2, 6, 3, 4, 5)]),
    "Conv3d": (layers.PatchEmbed3d, lambda: nn.Conv3d(3, 10, (2, 3, 1), (2, 3, 1)), [(2, 3, 4, 6, 3), (1, 3, 5, 8, 2)]),
    "Conv3d without bias": (layers.PatchEmbed3d, lambda: nn.Conv3d(3, 10, 2, 2, bias=False), [(2, 3, 2, 4, 6)]),
}  # fmt: skip


def make(name):
    layer, host, shapes = HOSTS[name]
    host = host()
    with torch.no_grad():
        for p in host.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return layer, host, shapes


def lend(layer, host):
    host.forward = types.MethodType(layer.forward, host)
    return host


def run(host, x):
    x = x.detach().requires_grad_()
    out = host(x)
    torch.manual_seed(7)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, [x, *host.parameters()], weights)
    return {"output": out.detach()} | dict(zip(["x", *dict(host.named_parameters())], grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HOSTS)
def test_same_output_and_gradients_as_the_host(name, dtype):
    layer, host, shapes = make(name)
    host = host.to(dtype)
    for shape in shapes:
        x = torch.randn(shape).to(dtype)
        plain = run(host, x)
        exact = run(copy.deepcopy(host).double(), x.double())
        actual = run(lend(layer, copy.deepcopy(host)), x)
        for key, value in actual.items():
            terms = 1 if key in ("output", "x") else x.numel() // value.numel() + 1
            assert_matches_oracle(value, exact[key], plain[key], key, terms)


@pytest.mark.parametrize("name", HOSTS)
def test_lending_changes_no_parameter_and_can_be_taken_back(name):
    layer, host, shapes = make(name)
    x = torch.randn(shapes[0])
    before, state = host(x), copy.deepcopy(host.state_dict())
    lend(layer, host)(x)
    assert host.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in host.state_dict().items())
    del host.forward
    assert torch.equal(host(x), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_without_eps_takes_that_of_the_statistics(dtype):
    x = (1e-3 * torch.randn(2, 3, 8)).to(dtype)
    host = nn.RMSNorm(8, dtype=dtype)
    assert host.eps is None
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    assert_matches_oracle(lend(layers.RMSNorm, copy.deepcopy(host))(x), exact, host(x))


def test_patches_flow_on_as_tokens_without_a_copy():
    _, host, _ = make("Conv3d")
    lend(layers.PatchEmbed3d, host)
    out = host(torch.randn(2, 3, 4, 6, 3))
    tokens = out.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous() and tokens.data_ptr() == out.data_ptr()


def test_autocast_gives_its_dtype_as_the_host_does():
    _, host, shapes = make("Conv3d")
    x = torch.randn(shapes[0])
    exact = copy.deepcopy(host).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = host(x), lend(layers.PatchEmbed3d, copy.deepcopy(host))(x)
    assert plain.dtype == torch.bfloat16
    assert_matches_oracle(ours, exact, plain)


@pytest.mark.parametrize("layer", [getattr(layers, name) for name in layers.__all__])
def test_layers_are_pure_as_kernelize_demands(layer):
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    extra = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert extra == {"has_backward", "can_torch_compile"}
    assert layer.has_backward and layer.can_torch_compile
    kinds = [p.kind for p in inspect.signature(layer.forward).parameters.values()]
    for host in (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Conv3d):
        assert kinds == [p.kind for p in inspect.signature(host.forward).parameters.values()]


def test_layers_compile_without_a_graph_break():
    hosts = [(lend(*pair[:2]), pair[2][0]) for pair in map(make, ("LayerNorm", "GroupNorm and SiLU", "Conv3d"))]
    for host, shape in hosts:
        x = torch.randn(shape)
        compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), host(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "host", "shape", "message"),
    [
        (layers.LayerNorm, nn.LayerNorm((3, 8)), (2, 3, 8), r"last axis of x, \(8,\); got \(3, 8\)"),
        (layers.RMSNorm, nn.RMSNorm(6), (2, 3, 8), r"last axis of x, \(8,\); got \(6,\)"),
        (layers.NormSiLU, nn.GroupNorm(2, 4, affine=False), (1, 4, 1, 2, 2), "must have a weight"),
        (layers.NormSiLU, nn.GroupNorm(2, 4), (1, 4, 2, 2), r"x must be \[B, C, T, H, W\]"),
        (layers.PatchEmbed3d, nn.Conv3d(2, 4, 2, 1), (1, 2, 2, 2, 2), "stride equal to its kernel"),
        (layers.PatchEmbed3d, nn.Conv3d(2, 4, 2, 2, padding=1), (1, 2, 2, 2, 2), "no padding"),
        (layers.PatchEmbed3d, nn.Conv3d(2, 4, 2, 2, groups=2), (1, 2, 2, 2, 2), "groups; got .* 2"),
    ],
)
def test_hosts_of_other_mathematics_are_refused(layer, host, shape, message):
    with pytest.raises(ValueError, match=message):
        lend(layer, host)(torch.randn(shape))
