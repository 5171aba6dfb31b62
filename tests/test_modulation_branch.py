"""The end of a branch as models have it: a norm of y, a squashed gate, no gate at all; out= into a joint buffer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_modulation import plain

from sora_kernels import _dispatch, gate_residual, gate_residual_norm_modulate, norm_modulate
from sora_kernels.modulation import reference
from sora_kernels.testing import arrange, assert_matches_oracle, outputs_and_grads, poison_empty

IMPLS = ("reference", "cpu", "triton")
EACH = pytest.mark.parametrize("impl", IMPLS)
ENDS = (gate_residual, gate_residual_norm_modulate)
OPS = pytest.mark.parametrize("function", ENDS, ids=lambda f: f.__name__)


def eager(norm, y_norm, **t):
    """Plain PyTorch in x's dtype."""
    y = t["y"]
    width = [y.shape[-1]]
    if y_norm:
        y = F.layer_norm(y, width, None, None, 1e-6) if y_norm == "layer" else F.rms_norm(y, width, None, 1e-6)
    gate = t.get("gate")
    return plain(norm, **t | {"y": y, "gate": torch.ones(width) if gate is None else gate})


def check(function, impl, tensors, norm, y_norm, **how):
    fused = function is gate_residual_norm_modulate
    norms = dict(y_norm=y_norm) | (dict(norm=norm) if fused else {})
    grads = [torch.randn_like(tensors["x"]) for _ in range(2)][: 2 if fused else 1]
    with poison_empty():
        actual = outputs_and_grads(partial(function, impl=impl, **norms, **how), tensors, grads)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    exact = partial(getattr(reference, function.__name__), **norms)
    oracle = outputs_and_grads(exact, wide, [g.double() for g in grads])
    baseline = outputs_and_grads(partial(eager, norm if fused else None, y_norm), tensors, grads)
    assert actual.keys() == oracle.keys() == baseline.keys()
    for name, value in actual.items():
        terms = 1 if value.shape == tensors["x"].shape else tensors["x"].numel() // value.numel() + 1
        assert_matches_oracle(value, oracle[name], baseline[name].to(value.dtype), name, terms)


def draw(function, B, S, D, gate, dtype=torch.float32, rows=None):
    tensors = dict(zip("xy", torch.randn(2, B, S, D).to(dtype), strict=True))
    tensors["gate"] = None if gate is None else torch.randn(gate).to(rows or dtype)
    if function is gate_residual_norm_modulate:
        tensors |= dict(shift=None, scale=torch.randn(B, D).to(rows or dtype), weight=torch.randn(D).to(dtype))
    return tensors


CASES = [  # B, S, D, gate, norm, y_norm
    (2, 12, 64, (2, 1, 64), "rms", "rms"),
    (2, 9, 33, (33,), "layer", "layer"),
    (1, 6, 130, (1, 6, 130), "rms", "layer"),
    (2, 6, 17, (2, 3, 17), "layer", "rms"),
    (2, 5, 48, None, "layer", None),
    (2, 5, 40, None, "rms", "rms"),
]


@OPS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@EACH
def test_outputs_and_gradients_match_the_fp64_oracle(function, impl, dtype, case, require):
    require(function.__name__, impl, dtype=dtype, grad=True)
    if impl == "triton" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
    B, S, D, gate, norm, y_norm = case
    check(function, impl, draw(function, B, S, D, gate, dtype), norm, y_norm)


@OPS
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("size", [(1, 3, 1536, (1536,)), (2, 150, 40, (2, 1, 40)), (1, 9, 5120, (1, 9, 5120))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_at_other_sizes(function, norm, size, dtype, require):
    require(function.__name__, "cpu", dtype=dtype, grad=True)
    check(function, "cpu", draw(function, *size, dtype, torch.float32), norm, norm)


@OPS
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_reference_passes_gradcheck(function, norm):
    tensors = {n: t.double().requires_grad_() for n, t in draw(function, 2, 4, 5, (2, 5)).items() if t is not None}
    if function is gate_residual_norm_modulate:
        tensors["shift"] = torch.randn(5, dtype=torch.float64, requires_grad=True)
    run = partial(getattr(reference, function.__name__), y_norm=norm)
    assert torch.autograd.gradcheck(lambda *args: run(**dict(zip(tensors, args, strict=True))), tuple(tensors.values()))


@OPS
@EACH
def test_two_runs_of_any_threads_and_layouts_agree_bit_for_bit(function, impl, require):
    require(function.__name__, impl, grad=True)
    tensors, grads = draw(function, 2, 70 if impl == "cpu" else 10, 24, (2, 24)), [torch.randn(24) for _ in range(2)]
    grads = [g.expand(tensors["x"].shape) for g in grads]
    threads, results = torch.get_num_threads(), []
    for layout, count in (("contiguous", threads), ("contiguous", 1), ("strided", 3)):
        torch.set_num_threads(count)
        given = {n: t if t is None else arrange(t, layout) for n, t in tensors.items()}
        results.append(outputs_and_grads(partial(function, impl=impl, y_norm="rms"), given, grads))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@EACH
def test_y_far_from_zero_is_normalised_exactly(impl, require):
    require("gate_residual", impl)
    y = 1000.7 + 1e-3 * torch.randn(2, 4, 200)
    oracle, baseline = (F.layer_norm(t, [200], eps=1e-6) for t in (y.double(), y))
    error = (gate_residual(torch.zeros_like(y), y, None, y_norm="layer", impl=impl) - oracle).abs().max()
    assert error <= 2 * (baseline - oracle).abs().max() + 1e-6


@EACH
@pytest.mark.parametrize("index", [None, torch.tensor([[0, 1, 1, 0, 2], [2, 2, 0, 0, 0]])], ids=["frames", "index"])
def test_a_norm_of_y_is_one_before_the_call(impl, index, require):
    """In fp32, where storing it rounds nothing: with an index, tables and several rows as well."""
    require("gate_residual_norm_modulate", impl, grad=True)
    x, y = torch.randn(2, 2, 5, 40)
    gate, shift, scale = torch.randn(3, 2, 3 if index is not None else 1, 40)
    tensors = dict(x=x, y=y, gate=gate, shift=shift, scale=scale, gate_table=torch.randn(40))
    grads, how = list(torch.randn(2, 2, 5, 40)), dict(index=index, norm="rms")

    def before(y, **t):
        return gate_residual_norm_modulate(y=F.layer_norm(y, [40], eps=1e-6), **t, **how, impl="reference")

    run = partial(gate_residual_norm_modulate, y_norm="layer", **how, impl=impl)
    actual, expected = (outputs_and_grads(f, tensors, grads) for f in (run, before))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


def test_without_a_gate_the_gradient_of_a_sum_is_handed_on():
    x, y = (torch.randn(1, 3, 8, requires_grad=True) for _ in range(2))
    dout = torch.randn(1, 3, 8)
    grads = torch.autograd.grad(gate_residual(x, y, None), (x, y), dout)
    assert all(g.data_ptr() == dout.data_ptr() for g in grads)


X = torch.zeros(2, 6, 8)


@OPS
@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(y_norm="batch"), ValueError, "y_norm must be one of None, 'layer', 'rms'; got 'batch'"),
        (dict(y_norm=True), ValueError, "y_norm must be one of None, 'layer', 'rms'; got True"),
        (dict(gate=None, gate_table=X[0, 0]), ValueError, "gate_table is added to a gate; got gate=None"),
        (dict(y_norm="rms", eps=0), ValueError, "eps must be positive; got 0"),
        (dict(y_norm="rms", eps="1"), TypeError, "eps must be a number; got str"),
    ],
)
def test_bad_input_is_refused(function, given, error, message):
    rows = dict(shift=None, scale=None) if function is gate_residual_norm_modulate else {}
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(**(dict(x=X, y=X, gate=X[0, 0], **rows) | given))


# ---- chains of models


class MochiBranch(torch.nn.Module):
    """The lines of diffusers' MochiTransformerBlock around its attention and feed-forward, given what these return."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = block.norm1, block.norm2, block.norm3, block.norm4

    def forward(self, x, temb, attention, ff):
        h, gate_msa, scale_mlp, gate_mlp = self.norm1(x, temb)
        x = x + self.norm2(attention, torch.tanh(gate_msa).unsqueeze(1))
        g = self.norm3(x, (1 + scale_mlp.unsqueeze(1).to(torch.float32)))
        return h, g, x + self.norm4(ff, torch.tanh(gate_mlp).unsqueeze(1))

    def fused(self, x, temb, attention, ff, impl):
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.norm1.linear(self.norm1.silu(temb)).chunk(4, dim=1)
        rule = dict(norm="rms", eps=self.norm2.eps, impl=impl)
        h = norm_modulate(x, None, scale_msa, **rule)
        x, g = gate_residual_norm_modulate(x, attention, gate_msa.tanh(), None, scale_mlp, y_norm="rms", **rule)
        return h, g, gate_residual(x, ff, gate_mlp.tanh(), y_norm="rms", eps=self.norm4.eps, impl=impl)


@EACH
def test_mochi(impl, require):
    """Its RMS norms, tanh gates and scales without shifts, with all gradients, in three calls."""
    require("gate_residual_norm_modulate", impl, grad=True)
    mochi = pytest.importorskip("diffusers.models.transformers.transformer_mochi")
    block = MochiBranch(mochi.MochiTransformerBlock(32, 2, 16, 24)).requires_grad_()
    tensors = dict(x=torch.randn(2, 5, 32), temb=torch.randn(2, 32))
    tensors |= dict(attention=torch.randn(2, 5, 32), ff=torch.randn(2, 5, 32))
    grads = list(torch.randn(3, 2, 5, 32))
    ours, theirs = (outputs_and_grads(f, tensors, grads) for f in (partial(block.fused, impl=impl), block))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-5)


@EACH
def test_hunyuan_video_with_the_first_frame_given(impl, require):
    """Its token_replace blocks: the first tokens have rows of their own, chosen by an index instead of cut off."""
    require("gate_residual_norm_modulate", impl, grad=True)
    hunyuan = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    norm, first, S = hunyuan.HunyuanVideoTokenReplaceAdaLayerNormZero(32), 3, 8
    tensors = dict(x=torch.randn(2, S, 32), temb=torch.randn(2, 32), tr=torch.randn(2, 32), attn=torch.randn(2, S, 32))

    def theirs(x, temb, tr, attn):
        h, gate, shift, scale, _, tr_gate, tr_shift, tr_scale, _ = norm(x, temb, tr, first)
        (x0, x1), (y0, y1) = (t.split([first, S - first], 1) for t in (x, attn))
        x = torch.cat([x0 + y0 * tr_gate[:, None], x1 + y1 * gate[:, None]], 1)
        g0, g1 = F.layer_norm(x, [32], eps=1e-6).split([first, S - first], 1)
        g0, g1 = g0 * (1 + tr_scale[:, None]) + tr_shift[:, None], g1 * (1 + scale[:, None]) + shift[:, None]
        return h, x, torch.cat([g0, g1], 1)

    def ours(x, temb, tr, attn):
        six = torch.stack([norm.linear(norm.silu(t)) for t in (temb, tr)], 1).unflatten(-1, (6, 32))
        shift, scale, gate, shift_mlp, scale_mlp, _ = six.unbind(2)
        index = (torch.arange(S) < first).int().expand(2, S)
        h = norm_modulate(x, shift, scale, index=index, impl=impl)
        return h, *gate_residual_norm_modulate(x, attn, gate, shift_mlp, scale_mlp, index=index, impl=impl)

    grads = list(torch.randn(3, 2, S, 32))
    actual, expected = (outputs_and_grads(f, tensors, grads) for f in (ours, theirs))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=2e-5)


@EACH
def test_minimax_h3(impl, require):
    """Its rows of every time and modality, picked by token, RMS norms with weights, and one of each for all clips."""
    require("gate_residual_norm_modulate", impl, grad=True)
    minimax = pytest.importorskip("diffusers.models.transformers.transformer_minimax_h3")
    adaln, norm1, norm2 = (minimax.MiniMaxH3AdaLayerNormModulation(20, 32), *(torch.nn.RMSNorm(32, 1e-5) for _ in "12"))
    for norm in (norm1, norm2):
        torch.nn.init.normal_(norm.weight)
    index = torch.tensor([0, 0, 5, 5, 3, 1, 5, 0])  # of two times with three modalities
    tensors = dict(x=torch.randn(1, 8, 32), temb=torch.randn(2, 20), attn=torch.randn(1, 8, 32))

    def theirs(x, temb, attn):
        shift, scale, gate, shift_mlp, scale_mlp, _ = (t.index_select(0, index) for t in adaln(temb))
        h = norm1(x) * (1.0 + scale) + shift
        x = x + gate * attn
        return h, x, norm2(x) * (1.0 + scale_mlp) + shift_mlp

    def ours(x, temb, attn):
        shift, scale, gate, shift_mlp, scale_mlp, _ = adaln(temb)
        rule = dict(norm="rms", eps=1e-5, index=index.expand(len(x), -1), impl=impl)
        h = norm_modulate(x, shift, scale, weight=norm1.weight, **rule)
        return h, *gate_residual_norm_modulate(x, attn, gate, shift_mlp, scale_mlp, weight=norm2.weight, **rule)

    grads = list(torch.randn(3, 1, 8, 32))
    actual, expected = (outputs_and_grads(f, tensors, grads) for f in (ours, theirs))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=2e-5)


# ---- out= into a joint buffer


JOINT = {  # where a joint buffer [B, text + video, D] has the video's rows; a window on wider rows as well
    "video after text": lambda: torch.empty(2, 3 + 6, 24)[:, 3:],
    "video before text": lambda: torch.empty(2, 6 + 3, 24)[:, :6],
    "every second row": lambda: torch.empty(2, 12, 24)[:, ::2],
    "part of wider rows": lambda: torch.empty(2, 9, 80)[:, 3:, 40:64],
    "at an odd element": lambda: torch.empty(2, 9, 80)[:, 2:8, 41:65],
    "clips inside tokens": lambda: torch.empty(6, 2, 24).transpose(0, 1),
}


@EACH
@pytest.mark.parametrize("where", JOINT)
def test_results_are_written_into_a_joint_buffer(where, impl, require):
    """The same bits as alone, and nothing beside them; the sum goes to another joint buffer."""
    require("gate_residual_norm_modulate", impl)
    x, y = torch.randn(2, 2, 6, 24)
    gate, shift, scale = torch.randn(3, 2, 2, 24)
    index = torch.randint(2, (2, 6))
    calls = {
        norm_modulate: ((x, shift, scale), {}), gate_residual: ((x, y, gate), dict(y_norm="rms")),
        gate_residual_norm_modulate: ((x, y, gate, shift, scale), {}),
    }  # fmt: skip
    for function, (args, how) in calls.items():
        how = dict(**how, index=index, impl=impl)
        expected = function(*args, **how)
        expected = expected if isinstance(expected, tuple) else (expected,)
        views = [JOINT[where]() for _ in expected]
        wholes = [v._base.fill_(7) for v in views]
        results = function(*args, **how, out=tuple(views) if len(views) > 1 else views[0])
        for result, view, value, whole in zip(
            results if len(views) > 1 else (results,), views, expected, wholes, strict=True
        ):
            assert result is view and torch.equal(view, value)
            view.fill_(7)
            assert (whole == 7).all(), "beside the view"


@EACH
def test_text_and_video_meet_in_one_buffer(impl, require):
    """CogVideoX: one norm for both streams, rows for each, and their concatenation, without a cat."""
    require("norm_modulate", impl)
    x, text = torch.randn(2, 6, 24), torch.randn(2, 3, 24)
    y, text_y, rows, weight = torch.randn(2, 6, 24), torch.randn(2, 3, 24), torch.randn(6, 2, 24), torch.randn(24)
    how = dict(weight=weight, bias=rows[0, 0], impl=impl)
    streams = ((x, y, *rows[:3]), (text, text_y, *rows[3:]))
    parts = [gate_residual_norm_modulate(*stream, **how) for stream in reversed(streams)]
    sums, joint = torch.empty(2, 2, 9, 24)
    for (begin, end), stream in zip(((3, 9), (0, 3)), streams, strict=True):
        gate_residual_norm_modulate(*stream, **how, out=(sums[:, begin:end], joint[:, begin:end]))
    for actual, both in zip((sums, joint), zip(*parts, strict=True), strict=True):
        assert torch.equal(actual, torch.cat(both, 1))
