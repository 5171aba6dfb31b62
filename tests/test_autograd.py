"""Derivatives of every kind, of every public function: forward mode, torch.func, second order, refusals."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from test_registration import CALLS as PLAIN
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import sora_kernels as sk
from sora_kernels import _dispatch
from sora_kernels.testing import assert_matches_oracle
from sora_model.dit import DiTConfig, SoraDiT


def rows(n, *shape):
    return [torch.randn(n, *shape) for _ in range(10)]


def attention_parts(n):
    q, k, v, dout = torch.randn(4, n, 6, 2, 8)
    out, lse = sk.attention_forward(q, k, v)
    return dout, q, k, v, out, lse, torch.randn_like(lse)


VIDEO = (4, 3, 4, 4)
# Every public function, and what of its arguments changes the derivative: function of tensors alone, tensors for n
CALLS = PLAIN | {
    "norm_modulate rms": (
        lambda x, shift, scale, w, b, s, t: sk.norm_modulate(
            x, shift, scale, norm="rms", weight=w, bias=b, shift_table=s, scale_table=t
        ),
        lambda n: (torch.randn(n, 6, 8), torch.randn(8), torch.randn(n, 2, 8), *torch.randn(4, 8)),
    ),
    "gate_residual table": (
        lambda x, y, g, t: sk.gate_residual(x, y, g, gate_table=t),
        lambda n: (*torch.randn(2, n, 6, 8), *torch.randn(2, 8)),
    ),
    "gate_residual y_norm": (
        lambda x, y: sk.gate_residual(x, y, None, y_norm="layer"), lambda n: torch.randn(2, n, 6, 8).unbind(),
    ),
    "gate_residual_norm_modulate tables": (
        lambda x, y, g, s, w, b, t: sk.gate_residual_norm_modulate(
            x, y, g, s, None, norm="rms", weight=w, bias=b, gate_table=t, scale_table=w, shift_table=b
        ),
        lambda n: (*torch.randn(2, n, 6, 8), torch.randn(n, 3, 8), torch.randn(n, 6, 8), *torch.randn(3, 8)),
    ),
    "qk_norm_rope width": (
        lambda q, k, u, v, b: sk.qk_norm_rope(
            q, k, q_weight=u, k_weight=v, q_bias=b, norm="layer", across="width", grid=(2, 2, 2), text_len=2,
            interleaved=False, rotary_dim=6, origin=(3, 0, 0),
        ),
        lambda n: (torch.randn(n, 10, 2, 8), torch.randn(n, 10, 3, 8), *(torch.randn(c) for c in (16, 24, 16))),
    ),
    "qk_norm_rope stats": (
        lambda q, k, s, w: sk.qk_norm_rope(
            q, k, q_weight=w, across="width", stats=s.to(torch.promote_types(s.dtype, torch.float32)).square() + 1,
            width=32, grid=(3, 2, 2), tokens=(1, 11),
        ),
        lambda n: (torch.randn(n, 10, 2, 8), torch.randn(n, 10, 3, 8), torch.randn(n, 20), torch.randn(16)),
    ),
    "qk_norm_stats": (sk.qk_norm_stats, lambda n: (torch.randn(n, 6, 2, 8), torch.randn(n, 5, 3, 8))),
    "qk_norm_rope freqs": (
        lambda q, k: sk.qk_norm_rope(q, k, norm=None, freqs=(torch.linspace(0, 1, 24).view(6, 4),) * 2),
        lambda n: torch.randn(2, n, 6, 2, 8).unbind(),
    ),
    "qk_norm_rope freqs of each": (
        lambda q, k: sk.qk_norm_rope(
            q, k, freqs=(torch.linspace(0, 1, 24).view(1, 6, 1, 4),) * 2,
            k_freqs=(torch.linspace(1, 2, 12).view(3, 4),) * 2,
        ),
        lambda n: (torch.randn(n, 6, 2, 8), torch.randn(n, 3, 1, 8)),
    ),
    "patch_embed3d pos": (
        lambda x, w, p: sk.patch_embed3d(x, w, pos=p),
        lambda n: (torch.randn(n, 3, 2, 4, 4), torch.randn(5, 3, 2, 2, 2), torch.randn(4, 5)),
    ),
    "video_to_uint8": (sk.video_to_uint8, lambda n: (torch.randn(n, 3, 2, 4, 4),)),
    "embed_watermark": (
        functools.partial(sk.embed_watermark, torch.full((1, 1, 4, 6, 3), 99, dtype=torch.uint8)),
        lambda n: (torch.randn(n, 3),),
    ),
    "final_layer rms": (
        lambda x, scale, w: sk.final_layer(x, None, scale, w, grid=(2, 2, 2), patch=(1, 2, 2), norm="rms"),
        lambda n: (torch.randn(n, 8, 6), torch.randn(n, 4, 6), torch.randn(12, 6)),
    ),
    "spacetime_attention lse": (
        functools.partial(sk.spacetime_attention, return_lse=True, kv_lens=torch.tensor([3, 0]), scale=0.7),
        lambda n: (torch.randn(2, 5, 4, 8), *torch.randn(2, 2, 6, 2, 8)),
    ),
    "spacetime_attention text": (
        lambda q, k, v: sk.spacetime_attention(
            q, k, v, grid=(3, 2, 2), window=[(2, 1, 2), (3, 2, 2)], stride=2, text_len=2, text_at="start"
        ),
        lambda n: torch.randn(3, n, 14, 2, 8).unbind(),
    ),
    "spacetime_attention dilated": (
        lambda q, k, v: sk.spacetime_attention(
            q, k, v, grid=(2, 3, 2), window=(2, 2, 1), dilation=(1, 2, 1), causal=(0, 1, 0), text_len=1
        ),
        lambda n: torch.randn(3, n, 13, 2, 8).unbind(),
    ),
    "gate_heads": (sk.gate_heads, lambda n: (torch.randn(n, 5, 2, 8), torch.randn(n, 5, 2))),
    "attention_forward": (sk.attention_forward, lambda n: torch.randn(3, n, 6, 2, 8).unbind()),
    "attention_backward": (lambda *t: sk.attention_backward(*t[:-1], dlse=t[-1]), attention_parts),
    "merge_attention lse": (
        lambda a, la, b, lb: sk.merge_attention((a, la), (b, lb)), PLAIN["merge_attention"][1],
    ),
    "norm_silu group": (
        functools.partial(sk.norm_silu, norm="group", groups=2),
        lambda n: (torch.randn(n, *VIDEO), *torch.randn(2, 4)),
    ),
    "causal_conv3d all": (
        lambda x, w, b, c, r, g: sk.causal_conv3d(
            x, w, b, cache=c, residual=r, norm_weight=g, return_raw=True, stride=(1, 2, 2)
        ),
        lambda n: (
            torch.randn(n, *VIDEO), torch.randn(5, 4, 3, 3, 3), torch.randn(5), torch.randn(n, 4, 2, 4, 4),
            torch.randn(n, 5, 3, 2, 2), torch.randn(5),
        ),
    ),
    "upsample_conv3d cache": (
        lambda x, w, c: sk.upsample_conv3d(x, w, factor=(2, 2, 1), cache=c),
        lambda n: (torch.randn(n, *VIDEO), torch.randn(5, 4, 3, 3, 3), torch.randn(n, 4, 1, 4, 4)),
    ),
    "downsample_conv3d cache": (
        lambda x, w, c: sk.downsample_conv3d(x, w, factor=(1, 2, 2), cache=c),
        lambda n: (torch.randn(n, *VIDEO), torch.randn(5, 4, 3, 3, 3), torch.randn(n, 4, 2, 4, 4)),
    ),
}  # fmt: skip
INTEGERS = ("video_to_uint8", "embed_watermark")
SMOOTH = [name for name in CALLS if name not in INTEGERS]
RECORDED = [name for name in SMOOTH if name.split()[0] not in ("attention_forward", "attention_backward")]
PURE = ("merge_attention",)  # plain torch itself: derivatives of any order, inside and outside of torch.func
IMPLS = ("reference", "cpu")


def test_every_public_function_is_here():
    assert {name.split()[0] for name in CALLS} == set(sk.__all__) - {"Unavailable", "attention_plan"}


@pytest.fixture
def call(monkeypatch):
    """(function returning a tuple, its tensors in `dtype`) with `impl` in place of auto."""

    def make(name, impl, dtype=torch.float32, n=2):
        monkeypatch.setattr(_dispatch, "FORCED", impl)
        if reason := impl == "cpu" and _dispatch.why_not("norm_modulate", impl, "cpu", torch.float32):
            pytest.skip(reason)
        function, tensors = CALLS[name]
        tensors = [t.contiguous() for t in tensors(n)]
        # what is exact in every dtype; a log-sum-exp keeps the dtype that the mathematics has
        tensors = [t if t.ndim == 3 and "attention" in name else t.bfloat16() for t in tensors]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = [t.to(dtype if t.dtype == torch.bfloat16 else wide) for t in tensors]
        return lambda *args: pytree.tree_leaves(function(*args)), tensors

    return make


def directions(tensors):
    generator = torch.Generator().manual_seed(1)
    return tuple([torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in tensors])


def difference(function, tensors, tangents, h=1e-5):
    """d/dh function(tensors + h · tangents), a central difference in fp64."""
    up, down = (function(*(t + s * d for t, d in zip(tensors, tangents, strict=True))) for s in (h, -h))
    return [(u - d) / (2 * h) for u, d in zip(up, down, strict=True)]


def by_duals(function, tensors, tangents):
    with forward_ad.dual_level():
        outputs = function(*map(forward_ad.make_dual, tensors, tangents))
        return tuple(zip(*[forward_ad.unpack_dual(o) for o in outputs], strict=True))


def compare(actual, expected, rtol=1e-6, atol=1e-6):
    for a, e in zip(actual, expected, strict=True):
        finite = e.isfinite()  # a log-sum-exp of nothing
        torch.testing.assert_close(a[finite], e[finite], rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode", [jvp, by_duals], ids=["func.jvp", "dual numbers"])
@pytest.mark.parametrize("name", SMOOTH)
def test_tangents_are_those_of_a_difference_quotient(name, mode, call):
    function, tensors = call(name, "reference", torch.float64)
    tangents = directions(tensors)
    primals, actual = mode(function, tuple(tensors), tangents)
    for p, e in zip(primals, function(*tensors), strict=True):
        assert torch.equal(p, e)
    expected = [d.nan_to_num(0.0) for d in difference(function, tensors, tangents)]  # −inf − −inf
    compare(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SMOOTH)
def test_tangents_hold_the_error_rule(name, impl, dtype, call):
    wide, exact = call(name, "reference", torch.float64)
    tangents = directions(exact)
    oracle = jvp(wide, tuple(exact), tangents)[1]
    function, like = call(name, impl, dtype)
    tensors, tangents = (tuple(t.to(x.dtype) for t, x in zip(ts, like, strict=True)) for ts in (exact, tangents))
    primals, actual = jvp(function, tensors, tangents)
    for p, e in zip(primals, function(*tensors), strict=True):
        assert torch.equal(p, e), "the value is the kernel's"
    for i, (a, o) in enumerate(zip(actual, oracle, strict=True)):
        assert_matches_oracle(a, o, o.to(a.dtype), f"tangent {i}", terms=256)


def total(function):
    """One number that each output enters nonlinearly, but for the log-sum-exp of queries that see nothing."""
    return lambda *args: sum(o.nan_to_num(neginf=0.0).sin().sum() for o in function(*args))


def recorded_grads(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(total(function)(*leaves), leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", RECORDED)
def test_first_gradients_under_transforms_are_those_of_backward(name, impl, call):
    """Bit for bit: the same kernels compute them."""
    function, tensors = call(name, impl)
    everything = tuple(range(len(tensors)))
    expected = recorded_grads(function, tensors)
    outputs, pull = vjp(total(function), *tensors)
    for actual in (grad(total(function), everything)(*tensors), pull(torch.ones(()))):
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", RECORDED)
def test_jacobians_by_reverse_and_by_forward_mode_agree(name, impl, call):
    function, tensors = call(name, impl, n=2 if "lse" in name else 1)
    outputs = function(*tensors)
    cotangents = [torch.randn_like(o) for o in outputs]

    def few(s, x):  # of a few directions: whole jacobians take long
        moved = function(x + s * torch.ones_like(x), *tensors[1:])
        return torch.stack([(c * m.nan_to_num(neginf=0.0)).sum() for c, m in zip(cotangents, moved, strict=True)])

    s = torch.zeros(1)
    reverse, forward = (j(few, argnums=0)(s, tensors[0]) for j in (jacrev, jacfwd))
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_vmap_gives_what_each_sample_gives_alone(name, impl, call):
    function, tensors = call(name, impl)
    where = [0, 1, -1]  # the axis of the samples differs from argument to argument, and one argument has none
    stacked, dims, samples = [], [], []
    for i, t in enumerate(tensors):
        two = [t, t.flip(-1)]
        dim = None if i == len(tensors) - 1 and i > 0 else where[i % 3]
        stacked.append(t if dim is None else torch.stack(two, dim))
        dims.append(dim)
        samples.append([t, t] if dim is None else two)
    actual = vmap(function, tuple(dims))(*stacked)
    alone = [function(*sample) for sample in zip(*samples, strict=True)]
    for a, e in zip(actual, zip(*alone, strict=True), strict=True):
        assert torch.equal(a, torch.stack(e))
    if name in RECORDED:
        everything = tuple(range(len(tensors)))
        per_sample = vmap(grad(total(function), everything), tuple(dims))(*stacked)
        alone = [recorded_grads(function, sample) for sample in zip(*samples, strict=True)]
        for a, e in zip(per_sample, zip(*alone, strict=True), strict=True):
            assert torch.equal(a, torch.stack(e))


@pytest.mark.parametrize("impl", ["reference"])
@pytest.mark.parametrize("name", RECORDED)
def test_second_derivatives_under_transforms(name, impl, call):
    """H·v by forward over reverse, reverse over forward, reverse over reverse, and a difference of gradients."""
    function, tensors = call(name, impl, torch.float64)
    directed, everything = directions(tensors), tuple(range(len(tensors)))
    gradient = grad(total(function), everything)
    expected = difference(gradient, tensors, directed)

    def slope(*args):
        return jvp(total(function), args, directed)[1]

    def product(*args):
        return sum((g * d).sum() for g, d in zip(gradient(*args), directed, strict=True))

    tensors, close = tuple(tensors), functools.partial(compare, rtol=1e-5, atol=1e-5)
    close(jvp(gradient, tensors, directed)[1], expected)
    close(grad(slope, everything)(*tensors), expected)
    close(grad(product, everything)(*tensors), expected)
    # and where the outer derivative is a plain backward
    for inner in (slope, product):
        leaves = [t.clone().requires_grad_() for t in tensors]
        close(torch.autograd.grad(inner(*leaves), leaves), expected)
    with forward_ad.dual_level():
        leaves = [t.clone().requires_grad_() for t in tensors]
        duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves, directed, strict=True)]
        grads = torch.autograd.grad(total(function)(*duals), duals)
        close([forward_ad.unpack_dual(g).tangent for g in grads], expected)


@pytest.mark.parametrize("name", ["norm_modulate", "spacetime_attention"])
def test_hessian_and_third_derivatives_in_the_kernels_dtype(name, call):
    function, tensors = call(name, "cpu", n=1)
    x = tensors[0][:, :2].contiguous()
    rest = [t[:, :2].contiguous() if t.ndim == x.ndim and name == "spacetime_attention" else t for t in tensors[1:]]
    if name == "norm_modulate":
        rest = [t[:, :1] for t in rest]
    oracle, wide = call(name, "reference", torch.float64)[0], [t.double() for t in rest]

    def third(function, *args):
        return grad(
            lambda x: jvp(grad(lambda x: total(function)(x, *args)), (x,), (torch.ones_like(x),))[1].sin().sum()
        )

    expected = hessian(total(oracle))(x.double(), *wide), third(oracle, *wide)(x.double())
    call(name, "cpu")
    actual = hessian(total(function))(x, *rest), third(function, *rest)(x)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4)


def test_merging_nothing_with_nothing_has_derivatives():
    """Those of attention over both parts at once: 0 for the queries of the second sample, which see no key at all."""
    q, k, v = torch.randn(3, 2, 6, 2, 8, dtype=torch.float64)
    lens = torch.tensor([6, 0])

    def merged(q, k, v):
        parts = (
            sk.spacetime_attention(q, k[:, part], v[:, part], kv_lens=n, return_lse=True)
            for part, n in ((slice(4), lens.clamp(max=4)), (slice(4, None), (lens - 4).clamp(min=0)))
        )
        return sk.merge_attention(*parts)

    def whole(q, k, v):
        return sk.spacetime_attention(q, k, v, kv_lens=lens, return_lse=True)

    tensors, tangents = (q, k, v), directions((q, k, v))
    for mode in (
        lambda f: jvp(f, tensors, tangents)[1],
        lambda f: recorded_grads(f, tensors),
        lambda f: jvp(grad(total(f), (0, 1, 2)), tensors, tangents)[1],
    ):
        for a, e in zip(mode(merged), mode(whole), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


# What is refused

SECOND = r"sora_kernels\.\w+: .* take second derivatives by torch.func"


def test_the_double_backward_trick_is_refused():
    """It asks for the derivative of a gradient by the gradient that went in, and by nothing else."""
    x = torch.randn(1, 6, 8)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.functional.jvp(lambda x: sk.norm_modulate(x, None, None), x, x)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.functional.hvp(lambda x: sk.norm_modulate(x, None, None).square().sum(), x, x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in RECORDED if name.split()[0] not in PURE])
def test_a_second_backward_is_refused_by_name(name, impl, call):
    function, tensors = call(name, impl)
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    # linear in the outputs: their own gradient depends on nothing
    grads = torch.autograd.grad(sum(o.nan_to_num(neginf=0.0).sum() for o in outputs), leaves, create_graph=True)
    penalty, refused = sum(g.square().sum() for g in grads), pytest.raises(RuntimeError, match=SECOND)
    if linear := name.split()[0] == "unpatchify3d":
        assert not penalty.requires_grad
    whole = functools.partial(torch.autograd.grad, inputs=leaves, retain_graph=True, allow_unused=True)
    for grad_of in (whole, torch.Tensor.backward):
        with contextlib.nullcontext() if linear else refused:
            grad_of(sum(leaf.sum() for leaf in leaves) + penalty)


@pytest.mark.parametrize("name", [name for name in RECORDED if name.split()[0] not in PURE])
def test_transforms_of_a_backward_whose_forward_was_outside_are_refused(name, call):
    function, tensors = call(name, "cpu")
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = function(*leaves)[0]
    pull = functools.partial(torch.autograd.grad, output, leaves, retain_graph=True)
    seed = torch.ones_like(output)
    refused = pytest.raises(RuntimeError, match="outside of a transform")
    with refused:
        jvp(lambda g: pull(g), (seed,), (seed,))
    with refused:
        vmap(lambda g: pull(g))(torch.stack([seed, seed]))
    with refused:
        grad(lambda g: pull(g)[0].square().sum())(seed)
    with refused, forward_ad.dual_level():
        pull(forward_ad.make_dual(seed, seed))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_have_no_tangent(name, impl, call):
    function, (given,) = call(name, impl)
    with pytest.raises(TypeError, match=f"{name}: integers have no tangent"):
        jvp(function, (given,), (given,))
    with pytest.raises(TypeError, match=f"{name}: integers have no tangent"):
        by_duals(function, (given,), (given,))
    with forward_ad.dual_level():  # of a tensor that has none
        assert torch.equal(function(given)[0], CALLS[name][0](given))


def test_lengths_are_not_mapped_over():
    q, lens = torch.randn(2, 6, 2, 8), torch.tensor([[3, 6], [1, 2]])
    with pytest.raises(ValueError, match="kv_lens must be the same for all samples"):
        vmap(lambda n: sk.spacetime_attention(q, q, q, kv_lens=n))(lens)


@pytest.mark.parametrize(
    "transform", [lambda f, x: vmap(f)(x[None]), lambda f, x: jvp(f, (x,), (x,)), lambda f, x: grad(f)(x)]
)
def test_no_transform_writes_where_it_is_told(transform):
    x, out = torch.randn(2, 1, 6, 8)
    with pytest.raises(ValueError, match="out= is for inference"):
        transform(lambda x: sk.norm_modulate(x, None, None, out=out).sum(), x)


# Around


def test_tangents_do_not_depend_on_grad_mode_or_autocast(call):
    for name in ("norm_modulate", "spacetime_attention", "patch_embed3d"):
        function, tensors = call(name, "cpu")
        tangents = directions(tensors)
        expected = jvp(function, tuple(tensors), tangents)[1]
        with torch.no_grad():
            without = jvp(function, tuple(tensors), tangents)[1]
        with torch.autocast("cpu", torch.bfloat16):
            cast = jvp(function, tuple(tensors), tangents)[1]
        for e, *others in zip(expected, without, cast, strict=True):
            assert all(torch.equal(e, o) for o in others), name


def test_a_mean_flow_step_of_a_transformer():
    """A loss with the stopped total derivative of a network: parameters get the gradients they get without kernels."""
    sizes = dict(dim=24, heads=2, layers=2, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=128)
    dit = SoraDiT(DiTConfig(**sizes))
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    (z, v), text = torch.randn(2, 1, 4, 3, 4, 4), torch.randn(1, 5, 16)
    point, along = (z, torch.tensor([300.0])), (v, torch.ones(1))

    def step(impl):
        u, du = jvp(lambda z, t: dit(z, t, text, impl=impl), point, along)
        loss = (u - (v - du).detach()).square().mean()
        return du.detach(), *torch.autograd.grad(loss, list(dit.parameters()))

    steps = step("auto"), step("reference")
    for actual, expected in zip(*steps, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    wide = copy.deepcopy(dit).double()
    with torch.no_grad():
        function = functools.partial(wide, text=text.double(), impl="reference")
        (expected,) = difference(lambda *at: (function(*at),), *([t.double() for t in ts] for ts in (point, along)))
    torch.testing.assert_close(steps[0][0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", RECORDED)
def test_gradients_of_a_part_are_parts_of_the_gradients(name, impl, call):
    """Of one input alone, and of one output alone, which is what zeros for the others give: bit for bit."""
    function, tensors = call(name, impl)
    seeds = [torch.randn_like(o) for o in function(*tensors)]

    def grads(wanted, chosen, seeds):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        pairs = [(o, s) for o, s in zip(function(*leaves)[chosen], seeds, strict=True) if o.requires_grad]
        outputs, seeds = zip(*pairs, strict=True)
        inputs = [leaves[i] for i in wanted]
        return torch.autograd.grad(outputs, inputs, seeds, allow_unused=True, materialize_grads=True)

    everything, all_outputs = range(len(tensors)), slice(None)
    whole = grads(everything, all_outputs, seeds)
    for i in everything:
        assert torch.equal(grads([i], all_outputs, seeds)[0], whole[i]), f"input {i}"
    for j in range(len(seeds)):
        alone = grads(everything, slice(j, j + 1), [seeds[j]])
        zeros = grads(everything, all_outputs, [s if k == j else torch.zeros_like(s) for k, s in enumerate(seeds)])
        assert all(torch.equal(a, z) for a, z in zip(alone, zeros, strict=True)), f"output {j}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", RECORDED)
def test_what_a_backward_needs_is_not_changed_unseen(name, impl, call):
    """After a change in place of any input or output the gradients are an error, or those of the values before it."""
    function, tensors = call(name, impl)
    seeds = [torch.randn_like(o) for o in function(*tensors)]
    results = []
    for changed in range(-1, len(tensors) + len(seeds)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        given = [leaf * 1 for leaf in leaves]
        outputs = function(*given)
        with torch.no_grad():
            if changed >= 0:
                (*given, *outputs)[changed].mul_(3)
        try:
            results.append(torch.autograd.grad(outputs, leaves, seeds))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
    for grads in results[1:]:
        assert all(torch.equal(g, e) for g, e in zip(grads, results[0], strict=True))


# of compilations, which take seconds
QUICK = [("spacetime_attention", "jvp"), ("causal_conv3d", "vmap"), ("gate_residual", "grad")]
COMPILED = {
    "jvp": lambda f, tensors: jvp(f, tensors, tuple(torch.ones_like(t) for t in tensors)),
    "grad": lambda f, tensors: grad(total(f), tuple(range(len(tensors))))(*tensors),
    "vmap": lambda f, tensors: vmap(f)(*(torch.stack([t, t]) for t in tensors)),
}


@pytest.mark.parametrize(
    "name, transform",
    [
        pytest.param(name, transform, marks=() if (name, transform) in QUICK else pytest.mark.slow)
        for name, transform in itertools.product(PLAIN, COMPILED)
    ],
)
def test_transforms_compile_whole(name, transform, call):
    torch._dynamo.reset()
    function, tensors = call(name, "cpu")

    def run(*tensors):
        return pytree.tree_leaves(COMPILED[transform](function, tensors))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compare(compiled(*tensors), run(*tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["norm_modulate", pytest.param("spacetime_attention", marks=pytest.mark.slow)])
def test_tangents_of_a_compiled_function(name, call):
    """Dual numbers into a compiled function: its graph is that of the level."""
    torch._dynamo.reset()
    function, tensors = call(name, "cpu")
    compiled = torch.compile(function, backend="aot_eager")
    compiled(*tensors)
    for mode in (by_duals, jvp):
        compare(
            mode(compiled, tuple(tensors), directions(tensors))[1],
            mode(function, tuple(tensors), directions(tensors))[1],
        )


# ---- torch.export, which records a forward alone


@pytest.mark.parametrize("name", [*PLAIN, "norm_modulate, strict"])
def test_an_exported_program_has_the_values_and_refuses_to_pass_for_a_constant(name):
    """In the midst of a module that is trained, a term without gradients would go unseen."""
    name, _, strict = name.partition(", ")
    function, tensors = PLAIN[name]
    tensors = tuple(t.requires_grad_() for t in tensors(2))

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = torch.export.export(Module(), tensors, strict=bool(strict)).module()
    with torch.no_grad():
        outputs, expected = (pytree.tree_leaves(f(*tensors)) for f in (program, function))
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    if name == "merge_attention":  # plain torch
        torch.autograd.grad(program(*tensors).sum(), tensors)
        return
    with pytest.raises(RuntimeError, match="a program made by torch.export holds no gradients of it; run the program"):
        program(*tensors)
