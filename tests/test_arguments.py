"""Every argument of every public function with a value of a wrong type gives one error naming it; what is cached."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import randn
from torch._subclasses.fake_tensor import FakeTensorMode

import sora_kernels
from sora_kernels import attention_plan


def calls() -> dict[str, dict]:
    """Of every public function a call with all its arguments, or several that have them between them."""
    torch.manual_seed(0)
    vectors = dict(weight=randn(8), bias=randn(8), shift_table=randn(8), scale_table=randn(8))
    index = torch.tensor([[0, 2, 1, 1, 0, 2], [2, 2, 2, 0, 0, 0]])
    heads = dict(q=randn(2, 9, 2, 8), k=randn(2, 9, 2, 8), v=randn(2, 9, 2, 8))
    mode = dict(grid=(2, 2, 2), window=(1, 2, 1), stride=(1, 2, 1), causal="frame", sink=1, text_len=1, text_at="end")
    rules = dict(**mode, kv_lens=torch.tensor([5, 9]), scale=0.5)
    lists = dict(grids=[(1, 2, 2), (1, 2, 2)], window=[(1, 1, 1), (1, 2, 2)], stride=[(1, 1, 1), (1, 2, 1)],
                 dilation=(1, 2, 1))  # fmt: skip
    conv = dict(x=randn(2, 4, 2, 4, 4), weight=randn(6, 4, 3, 3, 3), bias=randn(6))
    out, lse = sora_kernels.attention_forward(**heads, **rules)
    return {
        "norm_modulate": dict(
            x=randn(2, 6, 8), shift=randn(2, 3, 8), scale=randn(2, 1, 8), norm="layer", eps=1e-6, out=randn(2, 6, 8),
            rounding="once",
            **vectors,
        ),
        "norm_modulate with an index": dict(x=randn(2, 6, 8), shift=randn(3, 8), scale=randn(2, 3, 8), index=index),
        "gate_residual": dict(
            x=randn(2, 6, 8), y=randn(2, 6, 8), gate=randn(2, 3, 8), gate_table=randn(8), out=randn(2, 6, 8),
            rounding="once", y_norm="rms", eps=1e-6,
        ),
        "gate_residual with an index": dict(x=randn(2, 6, 8), y=randn(2, 6, 8), gate=randn(3, 8), index=index),
        "gate_residual_norm_modulate": dict(
            x=randn(2, 6, 8), y=randn(2, 6, 8), gate=randn(2, 3, 8), shift=randn(2, 3, 8), scale=randn(2, 1, 8),
            norm="layer", gate_table=randn(8), eps=1e-6, out=(randn(2, 6, 8), randn(2, 6, 8)), rounding="once",
            y_norm="layer", **vectors,
        ),
        "gate_residual_norm_modulate with an index": dict(
            x=randn(2, 6, 8), y=randn(2, 6, 8), gate=randn(3, 8), shift=randn(3, 8), scale=randn(2, 3, 8), index=index
        ),
        "qk_norm_rope": dict(
            q=heads["q"], k=heads["k"], q_weight=randn(8), k_weight=randn(8), q_bias=randn(8), k_bias=randn(8),
            norm="layer", across="head", grid=(2, 2, 2), split=(1, 1, 1), theta=1e4, interleaved=True, rotary_dim=6,
            origin=(0, 0, 0), text_len=1, text_at="end", eps=1e-6, rounding="host",
            out=(randn(2, 9, 2, 8), randn(2, 9, 2, 8)),
        ),
        "qk_norm_rope with freqs": dict(q=heads["q"], k=heads["k"], freqs=(randn(8, 3), randn(8, 3)),
                                        k_freqs=(randn(2, 8, 1, 3), randn(2, 8, 1, 3)), rotary_dim=6, text_len=1),
        "qk_norm_rope on ranks": dict(q=heads["q"], k=heads["k"], across="width", stats=randn(2, 18).square(), width=32,
                                      grid=(3, 2, 2), tokens=(2, 11)),
        "qk_norm_stats": dict(q=heads["q"], k=heads["k"]),
        "patch_embed3d": dict(video=randn(2, 3, 2, 4, 4), weight=randn(5, 3, 1, 2, 2), bias=randn(5), pos=randn(8, 5)),
        "unpatchify3d": dict(tokens=randn(2, 8, 12), grid=(2, 2, 2), patch=(1, 2, 2), channels=3),
        "final_layer": dict(
            x=randn(2, 8, 6), shift=randn(2, 2, 6), scale=randn(2, 6), weight=randn(12, 6), bias=randn(12),
            grid=(2, 2, 2), patch=(1, 2, 2), norm="layer", eps=1e-6,
        ),
        "video_to_uint8": dict(video=randn(2, 8, 2, 4, 4), patch=(1, 2, 2)),
        "embed_watermark": dict(frames=torch.full((1, 2, 4, 4, 3), 99, dtype=torch.uint8), tile=randn(3, 5)),
        "spacetime_attention": dict(**heads, **rules, return_lse=True, deterministic=True),
        "spacetime_attention with lists": dict(**{name: t[:1, :8] for name, t in heads.items()}, **lists),
        "attention_forward": dict(**heads, **rules, out_dtype=torch.float32),
        "attention_forward with lists": dict(**{name: t[:1, :8] for name, t in heads.items()}, **lists),
        "attention_backward": dict(
            dout=randn(2, 9, 2, 8), **heads, out=out, lse=lse, dlse=randn(2, 2, 9), **rules, deterministic=True,
            out_dtype=torch.float32,
        ),
        "attention_backward with lists": dict(
            dout=randn(1, 8, 2, 8), **{name: t[:1, :8] for name, t in heads.items()}, out=randn(1, 8, 2, 8),
            lse=randn(1, 2, 8), **lists,
        ),
        "attention_plan": dict(
            q_len=9, k_len=9, **mode, padded=True, tile=64, key_tile=(1, 4, 4), transposed=False, device="cpu"
        ),
        "attention_plan with lists": dict(q_len=8, **lists),
        "gate_heads": dict(x=randn(2, 6, 2, 8), gate=randn(2, 6, 2), scale=1.0),
        "merge_attention": dict(a=(randn(2, 6, 2, 8), randn(2, 2, 6)), b=(randn(2, 6, 2, 8), randn(2, 2, 6))),
        "norm_silu": dict(x=randn(2, 4, 2, 3, 3), weight=randn(4), bias=randn(4), norm="group", groups=2, eps=1e-6),
        "causal_conv3d": dict(
            **conv, stride=(1, 1, 1), padding="replicate", cache=randn(2, 4, 2, 4, 4), residual=randn(2, 6, 2, 4, 4),
            norm_weight=randn(6), norm_eps=1e-6, return_raw=True,
        ),
        "upsample_conv3d": dict(**conv, factor=(2, 2, 2), cache=randn(2, 4, 1, 4, 4)),
        "downsample_conv3d": dict(**conv, factor=(2, 2, 2), cache=randn(2, 4, 1, 4, 4)),
    }  # fmt: skip


CALLS = calls()
NUMBERS = {"eps", "norm_eps", "theta", "scale"}
FLAGS = {"interleaved", "return_lse", "return_raw", "padded", "transposed", "deterministic"}
WITHOUT_IMPL = {"attention_plan", "merge_attention"}


def function_of(name: str):
    return getattr(sora_kernels, name.split()[0])


def test_every_argument_has_a_value_here():
    for function in set(sora_kernels.__all__) - {"Unavailable"}:
        given = {argument for name, call in CALLS.items() if name.split()[0] == function for argument in call}
        assert given == set(inspect.signature(getattr(sora_kernels, function)).parameters) - {"impl"}, function


def wrong(valid: object, argument: str, optional: bool) -> dict[str, object]:
    """Values of types that the argument, for which `valid` serves, does not take."""
    t = valid if isinstance(valid, torch.Tensor) else randn(3)
    is_number = argument in NUMBERS and not isinstance(valid, torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these kinds are deprecated
        values = {
            "a string": "banana", "a list": [1.5, "x"], "a dict": {}, "an object": object(), "nan": float("nan"),
            "an array": np.zeros(3), "a Boolean of NumPy": np.bool_(True),
            "of integers": t.float() if t.dtype is torch.int64 else t.long(), "of Booleans": t.bool(),
            "complex": t.to(torch.complex64), "sparse": t.float().to_sparse(), "of no axes": torch.tensor(1.0),
            "quantized": torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([randn(2, 3), randn(1, 3)]),
            "nested, jagged": torch.nested.nested_tensor([randn(2, 3), randn(1, 3)], layout=torch.jagged),
        }  # fmt: skip
        if t.ndim == 4:
            values["of oneDNN"] = t.to_mkldnn()
    if not optional:
        values["None"] = None
    if not is_number:
        values |= {"a float": 1.5, "a float of NumPy": np.float64(0.5)}
    if argument not in FLAGS:
        values["a Boolean"] = True
    return values


@pytest.mark.parametrize("name", CALLS)
def test_a_value_of_a_wrong_type_is_named(name):
    function, call = function_of(name), CALLS[name]
    parameters = inspect.signature(function).parameters
    for argument in [*call, *({"impl"} - set(call) if "impl" in parameters else ())]:
        rows = ("gate", "shift", "scale") if name.startswith(("norm_modulate", "gate_residual", "final_layer")) else ()
        optional = parameters[argument].default is None or argument in rows
        for kind, value in wrong(call.get(argument), argument, optional).items():
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**{**call, argument: value})
            message = str(caught.value)
            assert message.startswith(f"{name.split()[0]}: ") and argument in message, (argument, kind, message)


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_are_numbers(name):
    def translated(value):
        if isinstance(value, tuple | list):
            return type(value)([translated(v) for v in value])
        if isinstance(value, bool | str) or not isinstance(value, int | float):
            return value
        return np.int64(value) if isinstance(value, int) else np.float64(value)

    function, call = function_of(name), CALLS[name]
    expected, actual = (function(**c) for c in (call, {k: translated(v) for k, v in call.items()}))
    if "plan" in name:
        assert str(actual) == str(expected)
        return
    pairs = zip(*(r if isinstance(r, tuple | list) else (r,) for r in (actual, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_not_a_pair_is_named():
    t = randn(2, 6, 2, 8)
    for freqs in (t, (t,), (t, t, t), (None, t), (torch.tensor(1.0), torch.tensor(1.0)), ("a", "b"), [1, 2]):
        with pytest.raises((TypeError, ValueError), match=r"qk_norm_rope: freqs"):
            sora_kernels.qk_norm_rope(t, t, freqs=freqs)
        with pytest.raises((TypeError, ValueError), match=r"qk_norm_rope: k_freqs"):
            sora_kernels.qk_norm_rope(t, t, freqs=(randn(6, 4), randn(6, 4)), k_freqs=freqs)
    for pair in (t, (t,), (t, t), (None, None), [1, 2]):
        with pytest.raises((TypeError, ValueError), match=r"merge_attention: .*\ba\b"):
            sora_kernels.merge_attention(pair, (t, t))
    x = randn(2, 6, 8)
    for out in (x, (x,), (x, None), [x, x], (x, x)):
        with pytest.raises((TypeError, ValueError), match=r"gate_residual_norm_modulate: out"):
            sora_kernels.gate_residual_norm_modulate(x, x, x, x, x, out=out)


def contexts():
    """In which tensors are made that no later call could use: without values, of a transform, never to be saved."""

    def transformed(build):
        torch.func.grad(lambda x: (build(), x.sum())[1])(torch.ones(2))

    def inside(context):
        def run(build):
            with context():
                build()

        return run

    return {
        "FakeTensorMode": inside(FakeTensorMode),
        "inference_mode": inside(torch.inference_mode),
        "meta device": inside(lambda: torch.device("meta")),
        "torch.func": transformed,
    }


def is_plain(t: torch.Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
    return type(t) is torch.Tensor and t.is_cpu and not t.is_inference() and not wrapped


@pytest.mark.parametrize("context", contexts())
@pytest.mark.parametrize("window", [None, (1, 2, 1), [(1, 2, 1), (3, 1, 2)]], ids=str)
def test_a_plan_is_kept_only_if_its_tensors_are_plain(window, context):
    frames = 20 + list(contexts()).index(context)  # a plan that no other test has asked for

    def build() -> list[torch.Tensor]:
        plans = attention_plan(frames * 4, grid=(frames, 2, 2), window=window)
        return [plan.rows for _, plan in plans] if isinstance(plans, tuple) else [plans.rows]

    contexts()[context](build)
    first, second = build(), build()
    assert all(is_plain(t) for t in first)
    assert all(a is b for a, b in zip(first, second, strict=True)), "a plain one is kept"


@pytest.mark.parametrize("context", contexts())
def test_rotary_steps_are_kept_only_if_plain(context):
    kernels = pytest.importorskip("sora_kernels.qknorm_rope.kernels")
    theta = 77.0 + list(contexts()).index(context)  # as above

    def build() -> torch.Tensor:
        return kernels.steps((2, 1, 1), theta, torch.device("cpu"))

    contexts()[context](build)
    first = build()
    assert is_plain(first)
    assert build() is first, "a plain one is kept"
