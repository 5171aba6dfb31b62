"""Operands as they come - of any strides, values and sizes - in every public function and implementation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import sora_kernels
from sora_kernels import _dispatch, _library
from sora_kernels.testing import LAYOUTS, arrange, poison_empty

INTEGERS = ("video_to_uint8", "embed_watermark")  # functions that give them, without a gradient


@dataclass
class Case:
    """A call: the shapes of its tensors by argument (a list: these integers), and its other arguments."""

    function: str
    shapes: dict[str, tuple | list]
    keywords: dict = field(default_factory=dict)
    constants: tuple[str, ...] = ()  # float tensors without a gradient

    @property
    def impls(self) -> list[str]:
        grad = self.function not in INTEGERS
        impls = [i for i in _library.impls(f"{self.function}_fwd") if i != "sdpa" or self.is_plain_attention]
        return [i for i in impls if not _dispatch.why_not(self.function, i, "cpu", torch.float32, grad)]

    @property
    def is_plain_attention(self) -> bool:
        return "kv_lens" not in self.shapes and "grid" not in self.keywords and all(map(all, self.shapes.values()))

    def draw(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        drawn = {n: torch.tensor(s) if isinstance(s, list) else torch.randn(s) for n, s in self.shapes.items()}
        return {name: t.long() if isinstance(self.shapes[name], list) else t for name, t in drawn.items()}

    def leaves(self, tensors: dict[str, Tensor]) -> list[str]:
        return [n for n, t in tensors.items() if t.is_floating_point() and n not in self.constants]

    def call(self, impl: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        named = dict(tensors)
        freqs = {f"{k}freqs": (named.pop(f"{k}cos"), named.pop(f"{k}sin")) for k in ("", "k_") if f"{k}cos" in named}
        outputs = getattr(sora_kernels, self.function)(**named, **freqs, **self.keywords, impl=impl)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def run(self, impl: str, tensors: dict[str, Tensor], layout: str = "contiguous", dense: bool = False):
        """Outputs and gradients by name; the incoming gradients lie in `layout`, or are a dense copy of that."""
        leaves = {n: t.detach().requires_grad_() if n in self.leaves(tensors) else t for n, t in tensors.items()}
        with poison_empty():
            outputs = self.call(impl, leaves)
            results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
            through = [o for o in outputs if o.requires_grad]
            if not through:
                return results
            douts = [arrange(torch.linspace(-1, 2, o.numel()).view(o.shape), layout) for o in through]
            douts = [d.clone(memory_format=torch.contiguous_format) if dense else d for d in douts]
            wanted = {n: t for n, t in leaves.items() if t.requires_grad}
            grads = torch.autograd.grad(through, wanted.values(), douts, materialize_grads=True, allow_unused=True)
        return results | {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}


VECTORS = dict(weight=(8,), bias=(8,), shift_table=(8,), scale_table=(8,))
HEADS = dict(q=(1, 6, 2, 8), k=(1, 6, 2, 8))
PATCHES = dict(grid=(1, 2, 2), patch=(1, 2, 2))
CASES = {
    "norm_modulate": Case("norm_modulate", dict(x=(2, 6, 8), shift=(2, 3, 8), scale=(2, 1, 8), **VECTORS)),
    "norm_modulate, a row a token": Case(
        "norm_modulate", dict(x=(2, 3, 8), shift=(2, 3, 8), scale=(2, 3, 8), weight=(8,), bias=(8,))
    ),
    "norm_modulate rms": Case("norm_modulate", dict(x=(2, 6, 8), shift=(8,), scale=(2, 8)), dict(norm="rms")),
    "norm_modulate, index": Case(
        "norm_modulate",
        dict(x=(2, 6, 8), shift=(3, 8), scale=(2, 3, 8), index=[[2, 0, 0, 2, 0, 0], [1, 1, 1, 2, 0, 1]], **VECTORS),
    ),
    "gate_residual": Case("gate_residual", dict(x=(2, 6, 8), y=(2, 6, 8), gate=(2, 3, 8), gate_table=(8,))),
    "gate_residual, y_norm": Case(
        "gate_residual", dict(x=(2, 6, 8), y=(2, 6, 8), gate=(2, 8)), dict(y_norm="layer")
    ),
    "gate_residual_norm_modulate": Case(
        "gate_residual_norm_modulate",
        dict(x=(2, 6, 8), y=(2, 6, 8), gate=(2, 1, 8), shift=(2, 3, 8), scale=(2, 3, 8), gate_table=(8,), **VECTORS),
    ),
    "gate_residual_norm_modulate, index": Case(
        "gate_residual_norm_modulate",
        dict(x=(2, 6, 8), y=(2, 6, 8), gate=(3, 8), shift=(8,), scale=(2, 3, 8),
             index=[[2, 0, 0, 2, 0, 0], [1, 1, 1, 2, 0, 1]]),
        dict(norm="rms", y_norm="rms"),
    ),
    "qk_norm_rope": Case(
        "qk_norm_rope", HEADS | dict(q_weight=(8,), k_weight=(8,), q_bias=(8,), k_bias=(8,)),
        dict(grid=(2, 1, 3), norm="layer"),
    ),
    "qk_norm_rope, freqs": Case(
        "qk_norm_rope", HEADS | dict(q_weight=(16,), k_weight=(16,), cos=(5, 3), sin=(5, 3)),
        dict(across="width", text_len=1), ("cos", "sin"),
    ),
    "qk_norm_rope, freqs by head": Case(
        "qk_norm_rope", HEADS | dict(cos=(6, 2, 4), sin=(6, 2, 4)), dict(interleaved=False), ("cos", "sin"),
    ),
    "qk_norm_rope, freqs by clip": Case(
        "qk_norm_rope", dict(q=(2, 4, 2, 8), k=(2, 3, 1, 8), cos=(2, 4, 2, 4), sin=(2, 4, 2, 4),
                             k_cos=(1, 3, 1, 4), k_sin=(1, 3, 1, 4)), {}, ("cos", "sin", "k_cos", "k_sin"),
    ),
    "qk_norm_rope, stats": Case(
        "qk_norm_rope", HEADS | dict(q_weight=(16,), k_weight=(16,), stats=(1, 12)),
        dict(across="width", width=32, eps=4.0, grid=(2, 2, 3), tokens=(4, 10)),
    ),
    "qk_norm_stats": Case("qk_norm_stats", dict(q=(2, 6, 2, 8), k=(2, 4, 3, 8))),
    "patch_embed3d": Case(
        "patch_embed3d", dict(video=(2, 3, 1, 4, 4), weight=(5, 3, 1, 2, 2), bias=(5,), pos=(4, 5))
    ),
    "patch_embed3d, pos by clip": Case(
        "patch_embed3d", dict(video=(2, 3, 1, 4, 4), weight=(5, 3, 1, 2, 2), pos=(2, 4, 5))
    ),
    "unpatchify3d": Case("unpatchify3d", dict(tokens=(2, 4, 12)), dict(**PATCHES, channels=3)),
    "final_layer": Case(
        "final_layer", dict(x=(2, 4, 6), shift=(2, 2, 6), scale=(2, 6), weight=(12, 6), bias=(12,)), PATCHES
    ),
    "video_to_uint8": Case("video_to_uint8", dict(video=(2, 8, 2, 4, 4)), dict(patch=(1, 2, 2))),
    "embed_watermark": Case(
        "embed_watermark", dict(tile=(3, 5)), dict(frames=torch.full((2, 1, 9, 10, 3), 99, dtype=torch.uint8))
    ),
    "spacetime_attention": Case("spacetime_attention", HEADS | dict(v=(1, 6, 2, 8)), dict(return_lse=True)),
    "gate_heads": Case("gate_heads", dict(x=(2, 6, 2, 8), gate=(2, 6, 2))),
    "spacetime_attention, kv_lens": Case(
        "spacetime_attention", dict(q=(2, 6, 2, 8), k=(2, 7, 1, 8), v=(2, 7, 1, 8), kv_lens=[3, 7]),
        dict(return_lse=True),
    ),
    "spacetime_attention, window": Case(
        "spacetime_attention", dict(q=(1, 9, 2, 8), k=(1, 9, 2, 8), v=(1, 9, 2, 8)),
        dict(grid=(2, 2, 2), window=(1, 2, 1), text_len=1, sink=1, causal="frame"),
    ),
    "spacetime_attention, dilated window": Case(
        "spacetime_attention", dict(q=(1, 7, 2, 8), k=(1, 7, 1, 8), v=(1, 7, 1, 8)),
        dict(grid=(1, 2, 3), window=(1, 2, 2), dilation=(1, 1, 2), causal=(1, 0, 1), text_len=1),
    ),
    "norm_silu": Case("norm_silu", dict(x=(2, 4, 2, 3, 3), weight=(4,), bias=(4,))),
    "norm_silu group": Case(
        "norm_silu", dict(x=(2, 4, 2, 3, 3), weight=(4,), bias=(4,)), dict(norm="group", groups=2)
    ),
    "causal_conv3d": Case(
        "causal_conv3d",
        dict(x=(2, 4, 2, 3, 3), weight=(6, 4, 3, 3, 3), bias=(6,), cache=(2, 4, 2, 3, 3), residual=(2, 6, 2, 3, 3),
             norm_weight=(6,)),
        dict(return_raw=True),
    ),
    "causal_conv3d plain": Case("causal_conv3d", dict(x=(1, 4, 3, 3, 3), weight=(6, 4, 3, 3, 3), bias=(6,))),
    "causal_conv3d to one channel": Case("causal_conv3d", dict(x=(1, 4, 1, 3, 3), weight=(1, 4, 1, 1, 1), bias=(1,))),
    "causal_conv3d, stride": Case(
        "causal_conv3d", dict(x=(2, 4, 2, 3, 3), weight=(6, 4, 1, 3, 3), bias=(6,)), dict(stride=(1, 2, 2))
    ),
    "upsample_conv3d": Case(
        "upsample_conv3d", dict(x=(2, 4, 2, 3, 3), weight=(6, 4, 3, 3, 3), bias=(6,), cache=(2, 4, 1, 3, 3)),
        dict(factor=(2, 2, 2)),
    ),
    "downsample_conv3d": Case(
        "downsample_conv3d", dict(x=(2, 4, 2, 4, 4), weight=(6, 4, 3, 3, 3), bias=(6,), cache=(2, 4, 1, 4, 4)),
        dict(factor=(2, 2, 2)),
    ),
}  # fmt: skip
SLOW = ("triton", "cudnn")  # in the interpreter
ALL = [(name, impl) for name, case in CASES.items() for impl in case.impls]
EACH = pytest.mark.parametrize("name, impl", ALL, ids=[f"{name}-{impl}" for name, impl in ALL])
# Functions without an implementation of their own, or that take the private ops of one above.
OTHERS = {"Unavailable", "attention_plan", "attention_forward", "attention_backward", "merge_attention"}


def test_every_function_and_implementation_is_among_the_cases():
    assert {case.function for case in CASES.values()} == set(sora_kernels.__all__) - OTHERS
    tested = {(CASES[name].function, impl) for name, impl in ALL}
    for function, impl in {(op.rpartition("_")[0], impl) for op, impls in _library.ops().items() for impl in impls}:
        grad = function not in INTEGERS
        assert (function, impl) in tested or _dispatch.why_not(function, impl, "cpu", torch.float32, grad)


# ---- strides


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: object) -> None:
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(
            actual[name], t, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{what}, {name}: {m}"
        )


@EACH
def test_operands_and_gradients_are_read_with_their_strides(name, impl):
    """Each operand alone in each layout; in the interpreter all at once, each operand in another one."""
    case = CASES[name]
    tensors = case.draw()
    dense = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    awkward = LAYOUTS[1:]
    if impl in SLOW:
        plans = [{n: awkward[i % len(awkward)] for i, n in enumerate(tensors, start=shift)} for shift in (1,)]
    else:
        plans = [{n: layout} for n in (*tensors, "the gradient") for layout in awkward]
    for plan in plans:
        arranged = {n: arrange(t, plan.get(n, "contiguous")) for n, t in tensors.items()}
        copied = {n: t.clone(memory_format=torch.contiguous_format) for n, t in arranged.items()}
        layout = plan.get("the gradient", "constant" if impl in SLOW else "contiguous")
        actual = case.run(impl, arranged, layout)
        expected = case.run("reference" if impl in SLOW else impl, copied, layout, dense=True)
        assert_same(actual, expected, plan)
    assert all(torch.equal(tensors[n], t) for n, t in dense.items()), "an operand was written to"


@pytest.mark.parametrize("name, impl", [(name, impl) for name, impl in ALL if impl not in SLOW])
def test_operands_may_be_negated_views(name, impl):
    """As `c.conj().imag` is: memory holds the values with the other sign."""
    case = CASES[name]
    tensors = case.draw()
    negated = {n: torch._neg_view(-t) if t.is_floating_point() else t for n, t in tensors.items()}
    assert_same(case.run(impl, negated), case.run(impl, tensors), "negated views")


# ---- values


QUICK = {  # in the interpreter; the others there are slow
    "norm_modulate, a row a token", "gate_residual", "qk_norm_rope, freqs", "patch_embed3d, pos by clip",
    "unpatchify3d", "final_layer", "spacetime_attention", "norm_silu", "causal_conv3d to one channel",
}  # fmt: skip
VALUES = [
    pytest.param(name, impl, marks=[pytest.mark.slow] if impl in SLOW and name not in QUICK else [])
    for name, impl in ALL
    if impl != "reference"
]


@pytest.mark.parametrize("name, impl", VALUES)
def test_what_is_no_number_spreads_as_in_plain_pytorch(name, impl):
    """One element of each operand in turn is NaN, inf or -inf.

    Outputs have NaN in the same elements as plain PyTorch has. Of an infinity, inf * 0 and inf - inf depend on the
    order of operations: outputs are not finite in the same elements. A gradient misses no NaN, and has one only where
    plain PyTorch's has: how far it spreads there depends on what is multiplied by the zeros around a clip or a tile.
    """
    case = CASES[name]
    for operand in [*case.leaves(case.draw()), *case.constants]:
        for value in ("nan",) if impl in SLOW else ("nan", "inf", "-inf"):
            tensors = case.draw()
            t = tensors[operand]
            # of a convolution's weight the last tap in the middle, which meets pixels and not only the zeros around
            middle = (0, 0, -1, *(n // 2 for n in t.shape[3:])) if operand == "weight" and t.ndim == 5 else None
            t[middle or tuple(n // 2 for n in t.shape)] = float(value)
            actual, expected = case.run(impl, tensors), case.run("reference", tensors)
            hidden = "window" in name and operand in ("k", "v")  # from some queries: the test below
            for result, want in expected.items():
                got, what = actual[result], f"{value} in {operand}: {result}"
                if not got.is_floating_point():
                    assert torch.equal(got, want), what
                elif result.startswith("output") and not hidden:
                    kind = torch.isnan if value == "nan" else lambda t: ~t.isfinite()
                    assert torch.equal(kind(got), kind(want)), what
                else:
                    assert got.isfinite().all() or not want.isfinite().all(), what
                    if value == "nan" and not hidden:
                        assert not (want.isnan() & ~got.isnan()).any(), what


@pytest.mark.parametrize("impl", CASES["spacetime_attention, window"].impls)
@pytest.mark.parametrize("operand", ["k", "v"])
def test_nan_of_a_key_reaches_all_queries_that_see_it(operand, impl):
    """Of one that a query does not see, it depends on the tiles whether v is left out or multiplied by 0."""
    q, k, v = torch.randn(3, 1, 12, 1, 8)
    dict(k=k, v=v)[operand][0, 7, 0, 3] = float("nan")
    out = sora_kernels.spacetime_attention(q, k, v, grid=(3, 2, 2), causal="frame", impl=impl)
    assert out[0, 4:, 0].isnan().any(-1).all()
    if operand == "k":
        assert not out[0, :4].isnan().any(), "a score that is hidden is no number to anyone"


MODES = {
    "dense": {},
    "window": dict(grid=(2, 2, 3), window=(1, 2, 1)),
    "stride": dict(grid=(2, 2, 3), window=(2, 2, 2), stride=(1, 2, 2)),
    "causal": dict(grid=(2, 2, 3), causal="frame"),
    "sink": dict(grid=(3, 2, 2), window=(1, 1, 2), causal="frame", sink=1),
    "text": dict(grid=(2, 1, 5), window=(1, 1, 2), text_len=2),
    "text first": dict(grid=(2, 1, 5), window=(1, 1, 2), text_len=2, text_at="start"),
    "packed": dict(grids=[(2, 1, 3), (1, 2, 3)], causal="frame"),
    "kv_lens": dict(kv_lens=torch.tensor([5])),
    "causal, kv_lens": dict(grid=(2, 2, 3), causal="frame", kv_lens=torch.tensor([7])),
    "rule by head": dict(grid=(2, 2, 3), window=[(1, 2, 1), (2, 2, 1)]),
}


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_a_scale_of_any_sign_hides_the_same_keys(mode, impl, require):
    """Hidden scores are -inf: times a scale below zero they would be the largest of all, times zero no number."""
    require("spacetime_attention", impl, grad=True)
    tensors = {name: torch.randn(1, 12, 2, 8) for name in "qkv"}
    for scale in (-0.3, 0.0) if impl == "triton" else (0.3, -0.3, 0.0, -0.0):
        case = Case("spacetime_attention", {}, MODES[mode] | dict(scale=scale, return_lse=True))
        actual, expected = (case.run(i, tensors) for i in (impl, "reference"))
        for name, want in expected.items():
            torch.testing.assert_close(actual[name], want, rtol=1e-4, atol=1e-5)


def fused(x: Tensor, impl: str) -> Tensor:
    zero = torch.zeros(x.shape[-1])
    return sora_kernels.gate_residual_norm_modulate(x, torch.zeros_like(x), zero, None, None, impl=impl)[1]


def final(x: Tensor, impl: str) -> Tensor:
    unit, places = torch.eye(x.shape[-1]), dict(grid=(1, 1, x.shape[1]), patch=(1, 1, 1))
    return sora_kernels.final_layer(x, None, None, unit, **places, impl=impl)[:, :, 0, 0].mT


def heads(x: Tensor, impl: str, across: str) -> Tensor:
    x = x.unsqueeze(2) if across == "head" else x.unflatten(2, (2, -1))
    return sora_kernels.qk_norm_rope(x, x, norm="layer", across=across, impl=impl)[0].flatten(2)


def group(x: Tensor, impl: str, last: bool) -> Tensor:
    """SiLU of the norm, of a group of which a row is one channel or, channels last, all of them."""
    x = x.flatten(0, 1)
    video, groups = (x[:, :, None, None, None], 1) if last else (x[None, :, None, None], len(x))
    ones = torch.ones(video.shape[1])
    y = sora_kernels.norm_silu(video, ones, norm="group", groups=groups, impl=impl)
    return y.view(2, -1, x.shape[-1])


LAYER_NORMS = {
    "norm_modulate": lambda x, impl: sora_kernels.norm_modulate(x, None, None, impl=impl),
    "gate_residual_norm_modulate": fused,
    "final_layer": final,
    "qk_norm_rope": lambda x, impl: heads(x, impl, "head"),
    "qk_norm_rope across the width": lambda x, impl: heads(x, impl, "width"),
    "norm_silu": lambda x, impl: group(x, impl, last=False),
    "norm_silu channels last": lambda x, impl: group(x, impl, last=True),
}


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_rows_that_are_nearly_constant_are_normalised_as_exactly_as_by_plain_pytorch(name, impl, require):
    """Around 1000.7 the mean's last place is 30 times the root of eps: one that is off by it turns 0 into 0.06."""
    require(name.split()[0], impl)
    after = torch.nn.functional.silu if name.startswith("norm_silu") else lambda t: t
    for width, spread in itertools.product((24, 200) if impl == "triton" else (24, 200, 1536), (0.0, 1e-3, 1.0)):
        x = 1000.7 + spread * torch.randn(2, 8, width)
        oracle, plain = (after(torch.nn.functional.layer_norm(t, (width,), eps=1e-6)) for t in (x.double(), x))
        error = (LAYER_NORMS[name](x, impl).double() - oracle).abs().max().item()
        bound = 2 * (plain.double() - oracle).abs().max().item() + 1e-6
        assert error <= bound, (width, spread, error, bound)


# ---- sizes


def empty_cases():
    """Each axis in turn of size 0, where the function takes that."""
    for B, S, D in ((0, 4, 8), (2, 0, 8), (2, 4, 0), (0, 0, 0)):
        x, vectors = (B, S, D), dict(weight=(D,), bias=(D,), shift_table=(D,), scale_table=(D,))
        for row in {(B, 1, D), (B, S, D), (D,)}:
            yield Case("norm_modulate", dict(x=x, shift=row, scale=(B, D), **vectors))
            yield Case("gate_residual", dict(x=x, y=x, gate=row, gate_table=(D,)))
            both = dict(x=x, y=x, gate=(D,), shift=row, scale=row, gate_table=(D,), **vectors)
            yield Case("gate_residual_norm_modulate", both)
    for B, S, H, E in ((0, 6, 2, 8), (2, 0, 2, 8), (2, 6, 0, 8), (2, 6, 2, 0)):
        yield Case("qk_norm_stats", dict(q=(B, S, H, E), k=(B, S + 1, H, E)))
        shapes = dict(q=(B, S, H, E), k=(B, S, H, E), stats=(B, 2 * S), q_weight=(H * E,))
        yield Case("qk_norm_rope", shapes, dict(across="width", width=32, eps=9.0))
        for across, norm in itertools.product(("head", "width"), ("rms", "layer", None)):
            width = (E,) if across == "head" else (H * E,)
            names = ("q_weight", "k_weight", "q_bias", "k_bias")[: 0 if norm is None else 2 if norm == "rms" else 4]
            shapes = dict(q=(B, S, H, E), k=(B, S, H, E)) | dict.fromkeys(names, width)
            rule = dict(norm=norm, across=across)
            yield Case("qk_norm_rope", shapes, rule)
            if S and E:
                yield Case("qk_norm_rope", shapes, rule | dict(grid=(2, 1, 3)))
                none = dict(cos=(0, E // 2), sin=(0, E // 2))
                yield Case("qk_norm_rope", shapes | none, rule | dict(text_len=S), ("cos", "sin"))
            if E:
                for table in ((S, E // 2), (S, H, E // 2)):
                    yield Case("qk_norm_rope", shapes | dict(cos=table, sin=table), rule, ("cos", "sin"))
    for B, C, T, H, W, D in ((0, 3, 2, 4, 4, 5), (2, 0, 2, 4, 4, 5), (2, 3, 0, 4, 4, 5), (2, 3, 2, 0, 4, 5),
                             (2, 3, 2, 4, 0, 5), (2, 3, 2, 4, 4, 0)):  # fmt: skip
        S = T * H * W // 4
        for pos in ((S, D), (B, S, D)):
            yield Case("patch_embed3d", dict(video=(B, C, T, H, W), weight=(D, C, 1, 2, 2), bias=(D,), pos=pos))
        yield Case("video_to_uint8", dict(video=(B, 4 * C, T, H, W)), dict(patch=(1, 2, 2)))
    yield Case("unpatchify3d", dict(tokens=(0, 4, 12)), dict(**PATCHES, channels=3))
    for B, D in ((0, 6), (2, 0)):
        for row in ((B, 2, D), (B, 4, D), (D,)):
            yield Case("final_layer", dict(x=(B, 4, D), shift=row, scale=(B, D), weight=(12, D), bias=(12,)), PATCHES)
    for B, S, H, E in ((0, 6, 2, 8), (2, 0, 2, 8), (2, 6, 0, 8), (2, 6, 2, 0)):
        yield Case("gate_heads", dict(x=(B, S, H, E), gate=(B, S, H)))
    for B, Sq, Sk, H, Hk, E in ((0, 6, 6, 2, 1, 8), (2, 0, 6, 2, 2, 8), (2, 6, 0, 2, 2, 8), (2, 6, 6, 0, 0, 8),
                                (2, 6, 6, 2, 2, 0), (2, 0, 0, 2, 2, 8)):  # fmt: skip
        shapes = dict(q=(B, Sq, H, E), k=(B, Sk, Hk, E), v=(B, Sk, Hk, E))
        yield Case("spacetime_attention", shapes, dict(return_lse=True))
        yield Case("spacetime_attention", shapes | dict(kv_lens=[Sk // 2] * B), dict(return_lse=True))
        if Sk:
            mode = dict(grid=(2, 1, 3), window=(1, 1, 2), causal="frame", sink=1)
            yield Case("spacetime_attention", shapes, dict(**mode, return_lse=True))
    for B, C, T, H, W in ((0, 4, 2, 4, 4), (2, 0, 2, 4, 4), (2, 4, 0, 4, 4), (2, 4, 2, 0, 4), (2, 4, 2, 4, 0)):
        x, out = (B, C, T, H, W), (B, 6, T, H, W)
        yield Case("norm_silu", dict(x=x, weight=(C,), bias=(C,)))
        yield Case("norm_silu", dict(x=x, weight=(C,), bias=(C,)), dict(norm="group", groups=2))
        if C:  # a weight must not be empty
            conv = dict(x=x, weight=(6, C, 3, 3, 3), bias=(6,))
            epilogue = dict(cache=(B, C, 2, H, W), residual=out, norm_weight=(6,))
            yield Case("causal_conv3d", conv)
            yield Case("causal_conv3d", conv | epilogue, dict(return_raw=True))
            for function in ("upsample_conv3d", "downsample_conv3d"):
                yield Case(function, conv, dict(factor=(1, 2, 2)))
                yield Case(function, conv | dict(cache=(B, C, 1, H, W)), dict(factor=(2, 2, 2)))
    yield Case("causal_conv3d", dict(x=(2, 4, 3, 4, 4), weight=(6, 4, 1, 3, 3), bias=(6,), cache=(2, 4, 0, 4, 4)))


@pytest.mark.parametrize("function", dict.fromkeys(case.function for case in CASES.values()))
@pytest.mark.parametrize("layout", ["contiguous", "constant"])
def test_sizes_of_zero_give_empty_results_and_the_gradients_of_nothing(function, layout):
    for case in empty_cases():
        if case.function != function:
            continue
        tensors = {n: arrange(t, layout) for n, t in case.draw().items()}
        expected = case.run("reference", tensors, layout)
        for impl in case.impls:
            assert_same(case.run(impl, tensors, layout), expected, (impl, case))
