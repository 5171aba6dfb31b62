"""What is done to patched models without thinking of the patch: it goes well, or one error says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import output
from hosts.wan import clip, inputs, vae, wan

from sora_kernels.integrations import patch_model, patched, unpatch_model, verify_patch

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


def test_verification_inside_inference_mode_compares_gradients_too():
    model = wan(num_layers=1)
    patch_model(model)
    expected = verify_patch(model, *inputs(model))
    with torch.inference_mode():
        found = verify_patch(model, *inputs(model))
        assert torch.is_inference_mode_enabled()
    assert found == expected and found.left is None and len(found.gradients) > 20


@pytest.mark.parametrize("what", ["input", "weight"])
def test_verification_blames_nobody_where_the_host_itself_gives_no_numbers(what):
    model = wan(num_layers=1)
    batch = inputs(model)
    patch_model(model)
    changed = batch[0] if what == "input" else model.blocks[0].ffn.net[2].weight.data
    changed.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="the unpatched WanTransformer3DModel gives no finite output.sample"):
        verify_patch(model, *batch)
    unpatch_model(model)


def test_verification_still_finds_numbers_that_only_we_lose(monkeypatch):
    import sora_kernels.integrations.diffusers.wan_blocks as host

    original = host.gate_residual
    monkeypatch.setattr(host, "gate_residual", lambda *args, **kw: original(*args, **kw) * float("nan"))
    model = wan(num_layers=1)
    patch_model(model)
    found = verify_patch(model, *inputs(model))
    assert not found.ok and "forward" not in vars(model)


def test_gradients_that_the_host_loses_are_not_compared():
    model = wan(num_layers=1)
    patch_model(model)
    model.blocks[0].ffn.net[2].bias.register_hook(lambda grad: grad * float("nan"))
    found = verify_patch(model, *inputs(model))
    assert found.ok and found.left == "the unpatched model's are not finite" and not found.gradients


@pytest.mark.parametrize(("make", "batch"), [(lambda: wan(num_layers=1), inputs), (vae, clip)], ids=["Wan", "VAE"])
def test_a_model_moved_to_the_meta_device_runs_there_as_its_host_does(make, batch):
    model = make()
    batch = [t.to("meta") for t in batch(model)]
    patch_model(model)
    model.to("meta")
    ours = output(model, *batch)
    with pytest.raises(ValueError, match="verify_patch: the model must have its weights; .* is on the meta device"):
        verify_patch(model)
    unpatch_model(model)
    theirs = output(model, *batch)
    assert ours.is_meta and (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_a_processor_set_after_the_patch_stays_and_is_reported():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Silent(WanAttnProcessor):
        def __call__(self, *args, **kwargs):
            return torch.zeros_like(super().__call__(*args, **kwargs))

    model, plain = wan(), wan()
    first = patch_model(model)
    for m in (model, plain):
        m.blocks[1].attn2.set_processor(Silent())
    again = patch_model(model)
    assert not first.left and {(step.where, step.reason) for step in again.left} == {
        ("blocks.1.attn2", "its processor is a Silent, set after the patch")
    }
    assert verify_patch(model, *inputs(model)).ok and type(model.blocks[1].attn2.processor) is Silent
    unpatch_model(model)
    assert type(model.blocks[1].attn2.processor) is Silent and type(model.blocks[0].attn2.processor) is WanAttnProcessor
    assert torch.equal(output(model, *inputs(model)), output(plain, *inputs(plain)))


@pytest.mark.parametrize("act", [patch_model, unpatch_model, verify_patch], ids=lambda f: f.__name__)
def test_a_shallow_copy_of_a_patched_model_does_not_take_its_patch(act):
    model = wan(num_layers=1)
    plain = output(model, *inputs(model))
    patch_model(model)
    ours = output(model, *inputs(model))
    with pytest.raises(ValueError, match="this WanTransformer3DModel is a shallow copy of a patched one"):
        act(copy.copy(model))
    assert torch.equal(output(model, *inputs(model)), ours)
    unpatch_model(model)
    assert torch.equal(output(model, *inputs(model)), plain)


@pytest.mark.parametrize("first", [0, 1])
def test_modules_that_two_models_share_are_patched_with_the_first(first):
    """The second took them over, and the first could be unpatched no more."""
    models = wan(num_layers=1), wan(num_layers=1)
    models[1].blocks = models[0].blocks
    batch = inputs(models[0])
    plain = output(models[0], *batch)
    assert not patch_model(models[0]).left
    left = {step.where: step.reason for step in patch_model(models[1]).left}
    assert left["blocks.0"] == "this WanTransformerBlock is patched already, as a part of another model"
    assert left.keys() == {"blocks.0", "blocks.0.attn1", "blocks.0.attn2"}
    unpatch_model(models[first])
    torch.testing.assert_close(output(models[1 - first], *batch), plain, rtol=0, atol=5e-6)
    unpatch_model(models[1 - first])
    assert all(torch.equal(output(model, *batch), plain) for model in models)
    assert all("forward" not in vars(module) for model in models for module in model.modules())


def test_reasons_tell_an_adapters_layer_from_the_one_it_is_named_after():
    model = wan(num_layers=1)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["patch_embedding", "proj_out"]))
    theirs, its = "peft.tuners.lora.layer.Conv3d", "torch.nn.modules.conv.Conv3d"
    assert {step.where: step.reason for step in patch_model(model).left} == {
        "patch_embedding": f"{theirs} has a forward of its own, not that of {its}",
        "norm_out, proj_out": "proj_out is a peft.tuners.lora.layer.Linear, not Linear",
    }


def test_the_error_of_a_block_comes_through_where_a_later_hook_keeps_the_patch():
    """It was hidden by that of the undoing, which whoever catches the first one never expects."""
    model = wan(num_layers=1)
    with pytest.warns(UserWarning, match="hooked or changed after patching.*the model stays patched") as said:
        with pytest.raises(ZeroDivisionError):
            with patched(model):
                ours = model.blocks[0].forward
                model.blocks[0].forward = lambda *args: ours(*args)
                1 / 0  # noqa: B018
    assert said[0].filename == __file__
    model.blocks[0].forward = ours
    unpatch_model(model)


def test_a_block_that_ends_well_under_a_later_hook_raises_that_the_patch_stays():
    model = wan(num_layers=1)
    with pytest.raises(ValueError, match="hooked or changed after patching"):
        with patched(model):
            ours = model.blocks[0].forward
            model.blocks[0].forward = lambda *args: ours(*args)
    model.blocks[0].forward = ours
    unpatch_model(model)
