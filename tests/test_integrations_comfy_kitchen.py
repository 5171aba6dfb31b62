"""The backend "sora" of comfy-kitchen: its operations on ours, with gradients that its own lack."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

import sora_kernels
from sora_kernels.integrations import _host, comfy_kitchen
from sora_kernels.testing import assert_matches_oracle

kitchen = pytest.importorskip("comfy_kitchen")


@pytest.fixture(autouse=True)
def registered():
    comfy_kitchen.register()


def of_sora(name):
    return kitchen.registry.get_implementation(name) is getattr(kitchen.registry._backends["sora"], name)


def test_ours_is_preferred_and_can_be_switched_off():
    order = kitchen.registry._priority
    comfy_kitchen.register()
    assert kitchen.registry._priority == order and order[0] == "sora" and order.count("sora") == 1
    for name in ("adaln", "rms_adaln", "rms_rope", "rms_rope_split_half"):
        assert of_sora(name)
    kitchen.disable_backend("sora")
    assert not of_sora("adaln")
    kitchen.enable_backend("sora")
    with kitchen.use_backend("eager"):
        assert not of_sora("adaln")
    assert of_sora("adaln")
    assert "sora" != kitchen.registry.get_capable_backend("apply_rope")


def modulated(norm):
    def function(x, scale, shift):
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) if norm == "adaln" else F.rms_norm(x, x.shape[-1:], eps=1e-6)
        return normed * (1 + scale) + shift

    return function


def compare(operation, formula, tensors, counted):
    """Outputs and gradients of the host's operation against the formula in fp64, by the error rule."""
    with counted() as calls:
        runs = {}
        for name, function, double in (("ours", operation, False), ("plain", formula, False), ("exact", formula, True)):
            leaves = [(t.double() if double else t).detach().requires_grad_() for t in tensors]
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.manual_seed(3)
            grads = [torch.randn(o.shape).to(tensors[0].dtype).to(o.dtype) for o in outputs]
            runs[name] = (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads))
    assert calls
    for i, (ours, plain, exact) in enumerate(zip(*runs.values(), strict=True)):
        summed = max(tensors[0].numel() // ours.numel(), 1)
        assert_matches_oracle(ours, exact, plain, f"result {i}", terms=summed)


@pytest.fixture
def counted(monkeypatch):
    """A context that lists the calls of our functions in it."""

    @contextlib.contextmanager
    def count():
        calls = []
        with monkeypatch.context() as patch:
            for name in ("norm_modulate", "qk_norm_rope"):
                original = getattr(sora_kernels, name)
                spied = lambda *a, original=original, **kw: calls.append(original) or original(*a, **kw)  # noqa: E731
                patch.setattr(comfy_kitchen, name, spied)
            yield calls

    return count


@pytest.mark.parametrize(
    ("x", "scale", "shift"),
    [
        ((2, 12, 24), (2, 1, 24), (2, 1, 24)),  # ComfyUI's Wan 2.1
        ((2, 12, 24), (2, 12, 24), (1, 1, 24)),
        ((2, 12, 24), (24,), (12, 24)),
        ((2, 3, 4, 24), (2, 3, 1, 24), (3, 1, 24)),  # a row a frame
        ((2, 1, 3, 4, 24), (2, 1, 1, 1, 24), (1, 1, 3, 4, 24)),
        ((7, 24), (7, 24), (1,)),
        ((24,), (24,), (24,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["adaln", "rms_adaln"])
def test_modulation_and_its_gradients(norm, dtype, x, scale, shift, counted):
    tensors = [torch.randn(shape).to(dtype) for shape in (x, scale, shift)]
    compare(lambda *t: getattr(kitchen, norm)(*t, 1e-6), modulated(norm), tensors, counted)


def test_the_results_of_a_backward_are_the_same_bits_twice():
    tensors = [torch.randn(s).requires_grad_() for s in ((2, 50, 24), (2, 1, 24), (2, 1, 24))]
    first, second = (torch.autograd.grad(kitchen.adaln(*tensors).square().sum(), tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_strides_are_those_the_host_promises():
    x = torch.randn(2, 24, 12).transpose(1, 2)
    out = kitchen.adaln(x, torch.ones(24), torch.ones(24))
    torch.testing.assert_close(out, modulated("adaln")(x, 1, 1))
    assert out.stride() == torch.empty_like(x).stride()
    assert out.stride() != out.contiguous().stride()


def rotations(S, pairs):
    phi = torch.randn(S, pairs)
    return torch.stack([phi.cos(), -phi.sin(), phi.sin(), phi.cos()], -1).view(S, pairs, 2, 2)


def rotated(split, rot):
    """The host's formula: the norm, then for each pair the product with its matrix."""

    def function(q, k, freqs, q_scale, k_scale):
        def one(x, scale):
            normed = F.rms_norm(x, x.shape[-1:], weight=scale, eps=1e-6)
            turned, rest = normed[..., :rot], normed[..., rot:]
            a, b = turned.chunk(2, -1) if split else (turned[..., ::2], turned[..., 1::2])
            f = freqs.to(x.dtype)
            pairs = [f[..., i, 0] * a + f[..., i, 1] * b for i in (0, 1)]
            turned = torch.cat(pairs, -1) if split else torch.stack(pairs, -1).flatten(-2)
            return torch.cat([turned, rest], -1)

        return one(q, q_scale), one(k, k_scale)

    return function


@pytest.mark.parametrize("split", [False, True], ids=["pairs of neighbours", "split halves"])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_rotation_and_their_gradients(split, heads_first, dtype, counted):
    B, S, H, E = 2, 6, 4, 16
    rot = 12 if split else E
    q, k = torch.randn(B, S, H, E).to(dtype), torch.randn(B, S, 2, E).to(dtype)
    freqs = rotations(S, rot // 2)[None, :, None]
    if heads_first:
        q, k, freqs = q.transpose(1, 2), k.transpose(1, 2), freqs.transpose(1, 2)
    scales = [torch.randn(E).to(dtype) for _ in range(2)]
    formula = rotated(split, rot)

    def host(q, k, *scales):
        if split:
            return torch.ops.comfy_kitchen.rms_rope_split_half(q, k, freqs, *scales, 1e-6, rot)
        return torch.ops.comfy_kitchen.rms_rope(q, k, freqs, *scales, 1e-6)

    compare(host, lambda q, k, *scales: formula(q, k, freqs, *scales), [q, k, *scales], counted)


def test_one_scale_for_both_takes_the_gradients_of_both():
    q, k, freqs = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), rotations(5, 4)[None, :, None]
    shared, first, second = (torch.linspace(0.5, 1.5, 8).requires_grad_() for _ in range(3))
    sum(t.square().sum() * i for i, t in enumerate(kitchen.rms_rope(q, k, freqs, shared), 1)).backward()
    sum(t.square().sum() * i for i, t in enumerate(kitchen.rms_rope(q, k, freqs, first, second), 1)).backward()
    torch.testing.assert_close(shared.grad, first.grad + second.grad)


@pytest.mark.parametrize("freqs", [(2, 5, 1, 4, 2, 2), (1, 9, 1, 4, 2, 2), (1, 5, 2, 4, 2, 2)], ids=str)
def test_other_forms_go_to_the_next_backend_and_have_no_gradient(freqs):
    q, k = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(2, 5, 2, 8)
    arguments = {"q": q, "k": k, "freqs_cis": torch.randn(freqs), "q_scale": torch.ones(8)}
    assert kitchen.registry.get_capable_backend("rms_rope", arguments) == "eager"
    if freqs[1] <= 5:
        with pytest.raises(ValueError, match=r"rms_rope: no gradient, sora takes one rotation .* got \["):
            kitchen.rms_rope(**arguments)[0].sum().backward()
    arguments["freqs_cis"] = rotations(5, 4)[None, :, None]
    assert kitchen.registry.get_capable_backend("rms_rope", arguments) == "sora"
    arguments["k"] = k[:, :4]
    assert kitchen.registry.get_capable_backend("rms_rope", arguments) == "eager"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend):
    def step(x, scale, shift):
        return kitchen.adaln(F.gelu(x), scale, shift, 1e-6).sin()

    tensors = [torch.randn(s).requires_grad_() for s in ((2, 12, 24), (2, 1, 24), (24,))]
    torch._dynamo.reset()
    plain, ours = step(*tensors), torch.compile(step, fullgraph=True, backend=backend)(*tensors)
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(plain.square().sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), tensors), expected)


def test_a_missing_or_old_host_is_named(monkeypatch):
    monkeypatch.setattr(_host, "release", lambda distribution: (0, 1, 3))
    with pytest.raises(ImportError, match="needs comfy-kitchen >= 0.2.40 for a backend.*; found 0.1.3: pip install -U"):
        comfy_kitchen.register()
