"""ComfyUI's attention door, by a stand-in of its register and wrapper: layouts, masks, containers, override."""

from __future__ import annotations

import functools
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from sora_kernels.integrations import comfyui
from sora_kernels.testing import assert_matches_oracle


class Container:
    """As the host's AttentionTensorContainer: a tensor that one owner takes out."""

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "taken twice"
        return tensor


def stand_in():
    """The parts of comfy.ldm.modules.attention that the door has, as they behave there."""
    host = types.ModuleType("comfy.ldm.modules.attention")
    host.REGISTERED_ATTENTION_FUNCTIONS = {}

    def register_attention_function(name, func):
        if name not in host.REGISTERED_ATTENTION_FUNCTIONS:
            host.REGISTERED_ATTENTION_FUNCTIONS[name] = func
        else:
            logging.warning(f"Attention function {name} already registered, skipping registration.")

    def wrap_attn(func):
        @functools.wraps(func)
        def wrapper(q, k, v, *args, **kwargs):
            called = func
            if "_inside_attn_wrapper" not in kwargs:
                kwargs["_inside_attn_wrapper"] = True
                override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
                called = func if override is None else functools.partial(override, func)
            if not hasattr(called, "container_function"):
                q, k, v = (t.take() if isinstance(t, Container) else t for t in (q, k, v))
            return called(q, k, v, *args, **kwargs)

        return wrapper

    @wrap_attn
    def attention_pytorch(
        q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        b, dim_head = q.shape[0], q.shape[-1] if skip_reshape else q.shape[-1] // heads
        if not skip_reshape:
            q, k, v = (t.view(b, -1, t.shape[-1] // dim_head, dim_head).transpose(1, 2) for t in (q, k, v))
        if mask is not None and mask.ndim == 2:
            mask = mask.unsqueeze(0)
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        given = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **given)
        return out if skip_output_reshape else out.transpose(1, 2).reshape(b, -1, heads * dim_head)

    for function in (register_attention_function, wrap_attn, attention_pytorch):
        setattr(host, function.__name__, function)
    return host


@pytest.fixture
def host(monkeypatch):
    host = stand_in()
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", host)
    comfyui.register()
    comfyui._warn_once.cache_clear()
    return host


@pytest.fixture
def ours(monkeypatch):
    """How often our attention was called."""
    calls, original = [], comfyui.spacetime_attention
    monkeypatch.setattr(comfyui, "spacetime_attention", lambda *a, **kw: calls.append(1) or original(*a, **kw))
    return calls


def drawn(dtype, heads_first, kv_heads=4):
    shapes = (2, 7, 4, 16), (2, 9, kv_heads, 16), (2, 9, kv_heads, 16)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return [t.transpose(1, 2) if heads_first else t.flatten(2) for t in tensors]


MASKS = {
    "none": None,
    "of keys": torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1, 1, 1, 0]]).bool()[:, None],
    "of keys, one for all": torch.tensor([[[[1, 1, 0, 1, 1, 1, 0, 0, 0]]]]).bool(),
}
LAYOUTS = {}, {"skip_reshape": True}, {"skip_reshape": True, "skip_output_reshape": True}


@pytest.mark.parametrize("through", ["register", "override"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_layouts_and_masks(host, ours, dtype, layout, mask, through):
    results, tensors = {}, drawn(dtype, layout.get("skip_reshape", False), kv_heads=2)
    function, options = host.REGISTERED_ATTENTION_FUNCTIONS["sora"], {}
    if through == "override":
        function, options = host.attention_pytorch, {"optimized_attention_override": comfyui.override}
    how = {"mask": MASKS[mask], "scale": 0.3, "enable_gqa": True, "low_precision_attention": False} | layout
    runs = ("ours", function, options, False), ("plain", host.attention_pytorch, {}, False), (
        "exact", host.attention_pytorch, {}, True)  # fmt: skip
    for name, run, transformer_options, double in runs:
        leaves = [(t.double() if double else t).detach().requires_grad_() for t in tensors]
        out = run(*leaves, 4, transformer_options=transformer_options, **how)
        results[name] = (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert len(ours) == 1
    for name, *values in zip(("output", "dq", "dk", "dv"), *results.values(), strict=True):
        actual, plain, exact = values
        assert_matches_oracle(actual, exact, plain, name)


def test_tensors_in_containers(host, ours):
    q, k, v = drawn(torch.float32, True)
    expected = host.attention_pytorch(q, k, v, 4, skip_reshape=True)
    for call in (
        lambda *t: host.REGISTERED_ATTENTION_FUNCTIONS["sora"](*t, 4, skip_reshape=True),
        lambda *t: comfyui.attention_sora(*t, 4, skip_reshape=True),  # by a caller without the wrapper
    ):
        torch.testing.assert_close(call(*map(Container, (q, k, v))), expected)
    assert len(ours) == 2


@pytest.mark.parametrize("through", ["register", "override"])
def test_what_is_not_served_is_the_hosts_with_one_warning(host, ours, through, caplog):
    q, k, v = drawn(torch.float32, False)
    added, pairs = torch.randn(2, 7, 9), torch.ones(7, 9).bool().tril()
    for mask in (added, added, pairs):
        expected = host.attention_pytorch(q, k, v, 4, mask=mask)
        if through == "override":
            options = {"optimized_attention_override": comfyui.override}
            out = host.attention_pytorch(q, k, v, 4, mask=mask, transformer_options=options)
        else:
            out = host.REGISTERED_ATTENTION_FUNCTIONS["sora"](q, k, v, 4, mask=mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert not ours
    assert [record.message.count("left to ComfyUI") for record in caplog.records] == [1, 1]


def test_twice_is_once(host, caplog):
    function = host.REGISTERED_ATTENTION_FUNCTIONS["sora"]
    comfyui.register()
    assert host.REGISTERED_ATTENTION_FUNCTIONS == {"sora": function} and not caplog.records


def test_a_missing_or_old_host_is_named(host, monkeypatch):
    del host.wrap_attn
    with pytest.raises(ImportError, match="this ComfyUI is older than wrap_attn: update it"):
        comfyui.register()
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", None)
    with pytest.raises(ImportError, match="needs ComfyUI's register of attention functions.*call it in a custom node"):
        comfyui.register()
