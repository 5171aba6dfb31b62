"""What "auto" does on a GPU that does not take the kernel it chose. The GPU is pretended: kernels refuse."""

from __future__ import annotations

import warnings

import pytest
import torch

from sora_kernels import _dispatch, _fallback, _library, gate_residual, norm_modulate
from sora_kernels.testing import outputs_and_grads

triton = pytest.importorskip("triton", reason="triton is not installed")
OUT_OF_RESOURCES = triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(op, impl, error)`: from now on that implementation raises it; gives the list of its attempts."""
    monkeypatch.setattr(_fallback, "_refused", set())
    monkeypatch.setattr(_fallback, "_warned", set())

    def refuse(op, impl, error):
        attempts = []

        def kernel(*args):
            attempts.append(args)
            raise error

        monkeypatch.setitem(_library._overloads[op], impl, kernel)
        return attempts

    return refuse


@pytest.fixture
def auto_takes(monkeypatch):
    def take(impl):
        monkeypatch.setattr(_dispatch, "choose", lambda *_, **__: impl)

    return take


def inputs(S=6):
    return dict(x=torch.randn(2, S, 8), shift=torch.randn(2, 8), scale=torch.randn(2, 8))


def test_the_next_implementation_runs_forward_and_backward_with_one_warning_each(refusing, auto_takes):
    attempts = [refusing(f"norm_modulate_{way}", "triton", OUT_OF_RESOURCES) for way in ("fwd", "bwd")]
    tensors, dout = inputs(), torch.randn(2, 6, 8)
    expected = outputs_and_grads(lambda **t: norm_modulate(**t, impl="reference"), tensors, [dout])
    auto_takes("triton_or_next")
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            results = outputs_and_grads(norm_modulate, tensors, [dout])
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert [len(calls) for calls in attempts] == [1, 1], "a call that was refused is not tried again"
    forward, backward = (str(w.message) for w in caught)
    assert "norm_modulate: the forward of impl='triton' does not run on this GPU (OutOfResources: " in forward
    assert "shared memory" in forward and "takes 'reference' instead" in forward and "the backward of" in backward


def test_other_sizes_are_tried_and_do_not_warn_again(refusing, auto_takes):
    attempts = refusing("norm_modulate_fwd", "triton", OUT_OF_RESOURCES)
    auto_takes("triton_or_next")
    with pytest.warns(RuntimeWarning) as caught:
        for S in (6, 6, 7):
            norm_modulate(**inputs(S))
    assert [args[0].shape[1] for args in attempts] == [6, 7] and len(caught) == 1


def test_a_host_library_gives_way_to_triton_and_triton_to_the_reference(refusing, auto_takes):
    refusing("spacetime_attention_fwd", "sdpa", RuntimeError("FlashAttention only supports Ampere GPUs or newer."))
    refusing("spacetime_attention_fwd", "triton", RuntimeError("PassManager::run failed"))
    q, k, v = torch.randn(3, 2, 5, 2, 8)
    out, lse = torch.full_like(q, float("nan")), torch.full((2, 2, 5), float("nan"))
    mode = (None, [], [], [1, 1, 1], [1, 1, 1], [0, 0, 0], 0, 0, False, 0.3)
    with pytest.warns(RuntimeWarning) as caught:
        _library.call("spacetime_attention_fwd", "sdpa_or_next")(q, k, v, *mode, out, lse)
    expected = torch.einsum("bqhe,bkhe->bhqk", q, k) * 0.3
    torch.testing.assert_close(lse, expected.logsumexp(-1))
    taken = [str(w.message).partition("takes ")[2].split()[0] for w in caught]
    assert taken == ["'triton'", "'reference'"]


ERRORS = {  # that are nobody's refusal
    "illegal address": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "want of memory": torch.OutOfMemoryError("CUDA out of memory; too many resources"),
    "a bug": ValueError("x: expected 3 axes"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_other_error_is_raised(name, refusing, auto_takes):
    refusing("gate_residual_fwd", "triton", ERRORS[name])
    auto_takes("triton_or_next")
    x = torch.randn(1, 3, 8)
    with warnings.catch_warnings(), pytest.raises(type(ERRORS[name])):
        warnings.simplefilter("error")
        gate_residual(x, x, x[0, 0])


def test_an_explicit_impl_raises_what_the_gpu_said(refusing, auto_takes):
    refusing("norm_modulate_fwd", "triton", OUT_OF_RESOURCES)
    auto_takes("triton")
    with pytest.raises(triton.runtime.errors.OutOfResources):
        norm_modulate(**inputs())


def test_a_compiled_graph_falls_back_as_well(refusing, auto_takes):
    auto_takes("triton_or_next")
    torch._dynamo.reset()
    compiled = torch.compile(norm_modulate, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    expected = norm_modulate(**tensors)  # in the interpreter
    torch.testing.assert_close(compiled(**tensors), expected)
    name = "sora_kernels::_norm_modulate_fwd_triton_or_next"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@pytest.mark.parametrize(
    "text, kind",
    [
        ("no kernel image is available for execution on the device", RuntimeError),
        ("CUDA error: too many resources requested for launch", RuntimeError),
        ("Triton Error [CUDA]: out of resources", RuntimeError),
        ("`ptxas` failed with error code 255", RuntimeError),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", RuntimeError),
        ("FIND was unable to find an engine to execute this computation", RuntimeError),
        ("No module named 'triton'", ImportError),
    ],
)
def test_what_counts_as_a_refusal(text, kind):
    assert _fallback.refusal(kind(f"{text}\n")) == f"{kind.__name__}: {text}"


def test_auto_takes_the_op_with_a_fallback_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(_dispatch, "_candidates", lambda *_: ("triton", "reference"))
    with torch._subclasses.FakeTensorMode():
        assert _dispatch.choose("norm_modulate", "auto", torch.empty(1, device="cuda")) == "triton_or_next"
        assert _dispatch.choose("norm_modulate", "auto", torch.empty(1)) == "triton"
