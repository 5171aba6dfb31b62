"""A patched model under what others do to modules: hooks, offloading, FSDP, copies, replicas, attention contexts."""

from __future__ import annotations

import copy
import io
import types
from functools import partial

import hosts
import pytest
import torch
import torch.nn.functional as F
from hosts import assert_rounds_like, exactly, output, run
from hosts.wan import clip, inputs, vae, wan
from in_ranks import in_ranks
from test_integrations import spy

import sora_kernels
from sora_kernels.integrations import patch_model, unpatch_model
from sora_kernels.testing import assert_matches_oracle

accelerate = pytest.importorskip("accelerate")
diffusers = pytest.importorskip("diffusers")


HOSTS = {"transformer": (wan, inputs), "autoencoder": (vae, clip)}


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


# Offloading


def sequentially(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return [p for p in model.parameters() if p.device.type == "meta"]


def whole(model, folder):
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    return [model]


def in_groups(kind, model, folder):
    from diffusers.hooks import apply_group_offloading

    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type=kind, offload_to_disk_path=str(folder), **blocks)
    return list(folder.glob("*.safetensors"))


def cast_layer_by_layer(model, folder):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return [p for p in model.parameters() if p.dtype == torch.bfloat16]


OFFLOADING = {
    "sequential": sequentially, "model": whole, "leaf groups": partial(in_groups, "leaf_level"),
    "block groups": partial(in_groups, "block_level"), "layerwise casting": cast_layer_by_layer,
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", OFFLOADING)
def test_offloading(host, offload, when, tmp_path):
    if diffusers.__version__.startswith("0.40.") and "groups" in offload and not torch.accelerator.is_available():
        pytest.skip("diffusers 0.40 itself offloads groups on machines with an accelerator only")
    make, draw = host
    plain, model = make(), make()
    batch = draw(model)
    (tmp_path / "plain").mkdir()
    (tmp_path / "ours").mkdir()
    assert OFFLOADING[offload](plain, tmp_path / "plain"), "nothing was offloaded"
    expected = output(plain, *batch)
    if when == "after":
        patch_model(model)
    OFFLOADING[offload](model, tmp_path / "ours")
    if when == "before":
        patch_model(model)
    for _ in range(2):
        torch.testing.assert_close(output(model, *batch), expected, rtol=0, atol=1e-5)


def test_offloading_that_ended_leaves_the_patch_as_it_was(monkeypatch, host):
    make, draw = host
    model = make()
    batch = draw(model)
    plain = output(model, *batch)
    patch_model(model)
    patched = output(model, *batch)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    output(model, *batch)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    counts = {}
    spy(monkeypatch, counts)
    assert torch.equal(output(model, *batch), patched) and not torch.equal(patched, plain)
    if make is wan:
        assert counts["gate_residual"] == 2 and counts["qk_norm_rope"] == 4 and counts["final_layer"] == 1
    unpatch_model(model)
    assert torch.equal(output(model, *batch), plain)


# Hooks


def leaves(model):
    return {name: module for name, module in model.named_modules() if not list(module.children())}


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_every_module_fire_and_see_what_they_see_without_the_patch(host, when):
    make, draw = host

    def watch(model):
        seen = {}
        for name, module in leaves(model).items():
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
            module.register_forward_hook(lambda _, args, out, name=name: seen[name].append(out))
        return seen

    plain, model = make(), make()
    batch = draw(model)
    if when == "after":
        patch_model(model)
    theirs, ours = watch(plain), watch(model)
    if when == "before":
        assert any("has hooks" in step.reason for step in patch_model(model).left)
    torch.testing.assert_close(output(model, *batch), output(plain, *batch), rtol=0, atol=1e-5)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, values in theirs.items():
        assert len(ours[name]) == len(values), name
        for a, b in zip(ours[name], values, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.attn2.norm_k", "norm_out", "proj_out"])
def test_a_hook_that_changes_a_module_added_after_the_patch_has_its_effect(name):
    plain, model = wan(), wan()
    batch = inputs(model)
    patch_model(model)
    for m in (plain, model):
        m.get_submodule(name).register_forward_hook(lambda module, args, out: 1.5 * out)
    exact = copy.deepcopy(plain)
    assert_matches_oracle(output(model, *batch), exactly(exact, *batch)["output"], output(plain, *batch))


def test_backward_hooks_fire():
    model, seen = wan(), []
    patch_model(model)
    for name in ("blocks.0.norm2", "blocks.1.attn1.norm_q", "proj_out"):
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: seen.append(name))
    run(model, *inputs(model))
    assert seen == ["proj_out", "blocks.1.attn1.norm_q", "blocks.0.norm2"]


@pytest.mark.parametrize(
    ("make", "name"),
    [(wan, "blocks.0.norm2"), (wan, "blocks.0.attn1.norm_q"), (wan, "proj_out"), (vae, "decoder.nonlinearity"),
     (vae, "encoder.norm_out"), (vae, "decoder.mid_block.resnets.0.norm1")],
)  # fmt: skip
def test_a_forward_that_another_library_puts_in_after_the_patch_runs(make, name):
    draw = inputs if make is wan else clip
    plain, model = make(), make()
    batch = draw(model)
    patch_model(model)
    for m in (plain, model):
        module = m.get_submodule(name)
        module.forward = types.MethodType(lambda self, x: 1.5 * type(self).forward(self, x), module)
    torch.testing.assert_close(output(model, *batch), output(plain, *batch), rtol=0, atol=1e-5)


# Copies


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy])
def test_copies_are_patched_and_stand_alone(host, duplicate):
    make, draw = host
    model = make()
    batch = draw(model)
    plain = output(model, *batch)
    report = patch_model(model, strict=True)
    patched = output(model, *batch)
    twin = duplicate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    assert patch_model(twin) == report
    assert torch.equal(output(twin, *batch), patched) and not torch.equal(patched, plain)
    unpatch_model(twin)
    assert torch.equal(output(twin, *batch), plain)


def replicate(model, factor):
    """As torch.nn.parallel.replicate does on several GPUs, with weights multiplied on the way."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, replicas[child])
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.detach() * factor)
    return replicas[model]


def test_replicas_run_on_their_own_weights(host):
    make, draw = host
    model, other = make(), make()
    batch = draw(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
    for m in (model, other):
        patch_model(m, strict=True)
    before = output(model, *batch)
    replica = replicate(model, 1.25)
    if make is wan:
        replica.condition_embedder = other.condition_embedder  # looks for a parameter, of which replicas have none
    assert torch.equal(output(replica, *batch), output(other, *batch))
    assert torch.equal(output(model, *batch), before)


# Processes


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "units",
    ["blocks", "norm_out", "patch_embedding proj_out", "blocks.0.norm2 blocks.1.attn1.norm_q blocks.1.attn2.norm_k"],
)
def test_fsdp_units_anywhere(mesh, units, when):
    from torch.distributed.fsdp import fully_shard

    model = wan()
    batch = inputs(model)
    plain, exact = run(model, *batch), exactly(model, *batch)
    if when == "before":
        patch_model(model)
    for unit in list(model.blocks) if units == "blocks" else map(model.get_submodule, units.split()):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if when == "after":
        patch_model(model)
    out = model(*batch, return_dict=False)[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    ours = {"output": out.detach()} | {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_rounds_like(*({name: results[name] for name in ours} for results in (plain, ours, exact)))


SHARDED = ["LTXVideo", "HunyuanVideo-1.5"]


def _sharded(rank, folder):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for name in SHARDED:
        case = hosts.cases()[name]
        model = case.make()
        batch = case.inputs(model)
        patch_model(model)
        for blocks in case.compiled:
            for block in model.get_submodule(blocks):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        out = model(**batch, return_dict=False)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        ours = {"output": out.detach()}
        ours |= {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
        torch.save((ours, len(patch_model(model).replaced)), f"{folder}/{name} {rank}.pt")


def test_fsdp_of_two_processes_and_other_families(tmp_path):
    in_ranks(_sharded, 2, tmp_path)
    for name in SHARDED:
        case = hosts.cases()[name]
        model = case.make()
        batch = case.inputs(model)
        plain, exact = run(model, **batch), exactly(model, **batch)
        for rank in range(2):
            ours, replaced = torch.load(tmp_path / f"{name} {rank}.pt")
            assert replaced == sum(case.steps.values()) and len(ours) > 20
            assert_rounds_like(*({key: results[key] for key in ours} for results in (plain, ours, exact)))


def test_torchs_context_parallel_is_refused_or_served_and_never_silently_wrong(mesh, monkeypatch):
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel._attention import _replaced_functions

    model = wan()
    batch = inputs(model)
    patch_model(model)
    patched, q, calls = output(model, *batch), torch.randn(1, 8, 2, 16), []
    original = F.scaled_dot_product_attention
    with context_parallel(mesh, buffers=[q.clone()], buffer_seq_dims=[1]):
        with pytest.raises(RuntimeError, match="spacetime_attention: called inside torch's context_parallel"):
            sora_kernels.spacetime_attention(q, q, q)

    def distributed(*args, **kwargs):  # in the place of torch's, which needs minutes on a CPU
        calls.append(args)
        return original(*args, **kwargs)

    with monkeypatch.context() as replaced:
        replaced.setattr(F, "scaled_dot_product_attention", distributed)
        sora_kernels.spacetime_attention(q, q, q)  # another library's replacement is no reason to refuse
        replaced.setitem(_replaced_functions, distributed, ("scaled_dot_product_attention", original))
        torch.testing.assert_close(output(model, *batch), patched, rtol=0, atol=1e-5)
    assert len(calls) == 4
    assert torch.equal(output(model, *batch), patched) and len(calls) == 4


def _attend_in_parallel(rank, folder):
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options

    _cp_options.enable_load_balance = False
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    x = torch.load(f"{folder}/x.pt")
    model = wan()
    patch_model(model)
    attn = model.blocks[0].attn1
    with torch.no_grad(), context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):
        torch.save(attn(x, None, None, None), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_a_patched_attention_inside_torchs_context_parallel_sees_every_ranks_tokens(tmp_path):
    x = torch.randn(1, 8, 48)
    torch.save(x, tmp_path / "x.pt")
    in_ranks(_attend_in_parallel, 2, tmp_path)
    out = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], 1)
    with torch.no_grad():
        torch.testing.assert_close(out, wan().blocks[0].attn1(x, None, None, None), rtol=0, atol=1e-5)


# Attention backends of diffusers


def test_an_attention_backend_of_the_context_is_honoured(monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    counts, calls = {}, []
    spy(monkeypatch, counts)
    model = wan()
    batch = inputs(model)
    plain = output(model, *batch)
    patch_model(model)
    name = dispatch.AttentionBackendName._NATIVE_MATH
    original = dispatch._AttentionBackendRegistry._backends[name]
    monkeypatch.setitem(
        dispatch._AttentionBackendRegistry._backends, name, lambda **kw: calls.append(name) or original(**kw)
    )
    with diffusers.attention_backend("_native_math"):
        torch.testing.assert_close(output(model, *batch), plain, rtol=0, atol=1e-5)
    assert len(calls) == 4 and "spacetime_attention" not in counts
    output(model, *batch)
    assert len(calls) == 4 and counts["spacetime_attention"] == 4


def test_a_backend_set_while_patched_is_kept_when_the_patch_is_undone():
    model = wan()
    patch_model(model)
    model.blocks[0].attn1.processor._attention_backend = "_native_math"
    unpatch_model(model)
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
