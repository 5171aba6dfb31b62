"""The backend "sora" of diffusers' attention dispatch: one process and several, forward and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from in_ranks import in_ranks

from sora_kernels.integrations import _host, diffusers_attention
from sora_kernels.testing import assert_matches_oracle

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch as dispatch  # noqa: E402


def wan(layers=2):
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=[1, 2, 2], num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=32, ffn_dim=56, num_layers=layers, rope_max_seq_len=64,
    )  # fmt: skip


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 2, 4, 6), torch.rand(2) * 1000, torch.randn(2, 4, 20)


def output(model, *args):
    with torch.no_grad():
        return model(*args, return_dict=False)[0]


def run(model, x, *rest):
    """Output and gradients of a fixed loss: {"output", "x", "<parameter>": its gradient}."""
    x = x.detach().requires_grad_()
    out = model(x, *rest, return_dict=False)[0]
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * weights).sum(), (x, *parameters))
    return {"output": out.detach()} | dict(zip(("x", *names), grads, strict=True))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    diffusers_attention.register()


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries that the backend was given."""
    backends, shapes = dispatch._AttentionBackendRegistry._backends, []
    name = dispatch.AttentionBackendName("sora")
    original = backends[name]
    monkeypatch.setitem(backends, name, lambda **kw: shapes.append(tuple(kw["query"].shape)) or original(**kw))
    return shapes


def assert_close(ours, plain):
    """fp32 against fp32 through the same layers, whose attention alone is summed in another order."""
    for name, expected in plain.items():
        error, largest = (ours[name] - expected).abs().max(), expected.abs().max()
        assert error <= 1e-5 * largest + 1e-6, f"{name}: error {error:.1e} of values up to {largest:.1e}"


def test_registering_twice_is_registering_once():
    names = dispatch.AttentionBackendName
    before = list(names), len(dispatch._AttentionBackendRegistry._backends)
    diffusers_attention.register()
    assert (list(names), len(dispatch._AttentionBackendRegistry._backends)) == before
    assert names("sora") is names.SORA is names["SORA"] and names.SORA == "sora" and names.SORA.name == "SORA"
    assert names.NATIVE.value == "native" and list(names).count(names.SORA) == 1


def test_outputs_and_every_gradient_of_a_model(calls):
    model = wan()
    batch = inputs()
    plain = run(model, *batch)
    assert not calls
    model.set_attention_backend("sora")
    ours = run(model, *batch)
    assert len(calls) == 4  # two blocks, self- and cross-attention
    assert_close(ours, plain)
    again = run(model, *batch)
    assert all(torch.equal(again[name], value) for name, value in ours.items())


def test_the_context_manager(calls):
    model = wan()
    batch = inputs()
    plain = output(model, *batch)
    with diffusers.attention_backend("sora"):
        torch.testing.assert_close(output(model, *batch), plain, rtol=1e-4, atol=2e-5)
    assert len(calls) == 4
    output(model, *batch)
    assert len(calls) == 4


def test_the_environment():
    script = """
from sora_kernels.integrations import diffusers_attention
diffusers_attention.register()
from diffusers.models import attention_dispatch as dispatch
name, function = dispatch._AttentionBackendRegistry.get_active_backend()
assert name is dispatch.AttentionBackendName.SORA and function is diffusers_attention._attention
"""
    environment = os.environ | {"DIFFUSERS_ATTN_BACKEND": "sora"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_compiled_without_a_graph_break():
    model = wan(layers=1)
    model.set_attention_backend("sora")
    batch = inputs()
    plain = run(model, *batch)
    torch._dynamo.reset()
    assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager"), *batch), {"output": plain["output"]})
    parameters = dict(model.named_parameters())
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    compiled = run(model, *batch)
    assert parameters.keys() <= compiled.keys()
    assert_close(compiled, plain)


def attend(q, k, v, **how):
    return dispatch.dispatch_attention_fn(q, k, v, backend="sora", **how)


def tensors(B=2, Sq=7, Sk=9, H=4, Hk=4, E=16):
    return torch.randn(B, Sq, H, E), torch.randn(B, Sk, Hk, E), torch.randn(B, Sk, Hk, E)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({}, {}),
        ({}, {"scale": 0.3}),
        ({"Sk": 7}, {"is_causal": True}),
        ({"Hk": 2}, {"enable_gqa": True}),
        ({}, {"attn_mask": "prefix"}),
        ({}, {"attn_mask": "scattered"}),
        ({"Hk": 2}, {"attn_mask": "one for all", "enable_gqa": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_host_may_ask_for(sizes, how, dtype):
    q, k, v = (t.to(dtype) for t in tensors(**sizes))
    masks = {
        "prefix": (torch.arange(9) < torch.tensor([[4], [9]]))[:, None, None],
        "scattered": torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1, 1, 1, 0]]).bool()[:, None, None],
        "one for all": torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0, 0]]).bool()[:, None, None],
    }
    if "attn_mask" in how:
        how = how | {"attn_mask": masks[how["attn_mask"]]}
    grad = torch.randn_like(q)
    results = {}
    for name, backend, kind in (("ours", "sora", dtype), ("plain", "native", dtype), ("exact", "native", torch.double)):
        leaves = [t.to(kind).requires_grad_() for t in (q, k, v)]
        out = dispatch.dispatch_attention_fn(*leaves, backend=dispatch.AttentionBackendName(backend), **how)
        results[name] = (out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind)))
    for name, *values in zip(("output", "dq", "dk", "dv"), *results.values(), strict=True):
        ours, plain, exact = values
        assert_matches_oracle(ours, exact, plain, name)


def test_the_log_sum_exp_in_the_layout_of_the_host():
    q, k, v = tensors()
    out, lse = attend(q, k, v, attention_kwargs={"return_lse": True})
    expected = (torch.einsum("bqhe,bkhe->bqhk", q, k) * 16**-0.5).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(out, attend(q, k, v))


def test_a_mask_of_keys_is_compiled_whole():
    q, k, v = tensors()
    mask = torch.rand(2, 9) < 0.5
    expected = attend(q, k, v, attn_mask=mask)
    assert torch.equal(expected, attend(q, k, v, attn_mask=mask[:, None, None]))
    compiled = torch.compile(lambda *args: attend(*args[:3], attn_mask=args[3]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0; got 0.1"),
        ({"is_causal": True}, "is_causal needs as many keys as queries; got 9 and 7"),
        ({"attn_mask": torch.zeros(2, 9)}, r"attn_mask must be boolean.*got torch.float32 \[2, 9\]"),
        ({"attn_mask": torch.ones(2, 1, 7, 9).bool()}, r"\[2, 1, 1, 9\].*got torch.bool \[2, 1, 7, 9\]"),
        ({"attn_mask": torch.ones(2, 4, 1, 9).bool()}, "Use the backend 'native' for this model"),
        ({"attn_mask": torch.ones(2, 8).bool()}, r"got torch.bool \[2, 8\]"),
    ],
    ids=str,
)
def test_what_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        attend(*tensors(), **how)


def test_ring_training_is_refused_where_the_host_computes_it_wrong(monkeypatch):
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2, ulysses_degree=1))
    monkeypatch.setattr(_host, "release", lambda distribution: (0, 39, 0))
    q, k, v = (t.requires_grad_() for t in tensors())
    with pytest.raises(ValueError, match="wrong gradients before diffusers 0.41; found 0.39.0. Train with ulysses"):
        attend(q, k, v, parallel_config=config)
    with pytest.raises(ValueError, match="attn_mask must be None under context parallelism"):
        attend(q, k, v, attn_mask=torch.ones(2, 9).bool(), parallel_config=config)


def test_a_missing_or_old_host_is_named(monkeypatch):
    monkeypatch.setattr(_host, "release", lambda distribution: (0, 30, 1))
    with pytest.raises(ImportError, match="needs diffusers >= 0.36 for an attention backend; found 0.30.1: pip"):
        diffusers_attention.register()
    monkeypatch.setattr(_host, "release", lambda distribution: ())
    with pytest.raises(ImportError, match="needs nothing_at_all >= 1 for a door; it is not installed: pip install -U"):
        _host.require("nothing_at_all", "nothing_at_all", "1", "a door")


# Context parallelism: each schedule in processes of its own, against one process


def _in_parallel(rank, folder, degrees):
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # the host takes the rank modulo this, which is 0 on a CPU machine
    diffusers_attention.register()
    for degree in degrees:
        model = wan()
        model.set_attention_backend("sora")
        model.enable_parallelism(config=ContextParallelConfig(**degree))
        ours = run(model, *inputs())
        for name, value in ours.items():
            if name != "output":  # of which the loss of each rank knows its own tokens
                torch.distributed.all_reduce(value)
        if rank == 0:
            torch.save(ours, f"{folder}/{'_'.join(degree)}.pt")


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(2, [{"ring_degree": 2}, {"ulysses_degree": 2}]), (4, [{"ring_degree": 2, "ulysses_degree": 2}])],
    ids=["ring and Ulysses", "both"],
)
def test_context_parallel_gives_what_one_process_gives(tmp_path, world, degrees):
    if _host.release("diffusers") < (0, 41):
        degrees = [degree for degree in degrees if "ring_degree" not in degree]
        if not degrees:
            pytest.skip("ring attention of diffusers before 0.41 has wrong gradients, and training by it is refused")
    model = wan()
    plain = run(model, *inputs())
    in_ranks(_in_parallel, world, tmp_path, degrees)
    for degree in degrees:
        assert_close(torch.load(tmp_path / f"{'_'.join(degree)}.pt"), plain)
