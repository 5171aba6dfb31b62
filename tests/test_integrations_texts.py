"""Padded texts, and what else the models of diffusers are called with besides what all share (tests/test_hosts.py)."""

from __future__ import annotations

import inspect

import hosts
import pytest
import torch
from hosts import assert_rounds_like, cogvideox, cosmos, exactly, ltx, ltx2, mochi, output, run

from sora_kernels.integrations import patch_model, unpatch_model
from sora_kernels.integrations.diffusers import common
from sora_kernels.testing import assert_matches_oracle

TEXTS = {"LTXVideo": (ltx.ltx, ltx.inputs), "LTX-2": (ltx2.ltx2, ltx2.inputs)}


@pytest.fixture(params=TEXTS)
def text(request):
    make, inputs = TEXTS[request.param]
    model = make()
    return model, inputs(model)


@pytest.fixture
def lens(monkeypatch):
    """The `kv_lens` of each attention that ours runs, None where there are none."""
    seen, attend = [], common.spacetime_attention

    def attention(q, k, v, kv_lens=None, **rules):
        seen.append(None if kv_lens is None else kv_lens.tolist())
        return attend(q, k, v, kv_lens=kv_lens, **rules)

    monkeypatch.setattr(common, "spacetime_attention", attention)
    return seen


def masked(inputs, change):
    return {key: change(value) if key.endswith("mask") else value for key, value in inputs.items()}


def assert_same_run(model, inputs):
    plain, exact = run(model, **inputs), exactly(model, **inputs)
    patch_model(model)
    assert_rounds_like(plain, run(model, **inputs), exact)


def test_masks_of_texts_become_lengths(text, lens):
    model, inputs = text
    patch_model(model)
    output(model, **inputs)
    assert [3, 4] in lens, lens
    attentions = sum(name.endswith("attn2") for name, _ in model.named_modules())
    assert sum(seen is not None for seen in lens) == attentions


def test_a_text_that_is_all_padding_is_attended_to_whole(text):
    model, inputs = text

    def empty(mask):
        return torch.stack([mask[0], torch.zeros_like(mask[1])])

    assert_same_run(model, masked(inputs, empty))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_masks_of_other_dtypes(text, kind, lens):
    model, inputs = text
    assert_same_run(model, masked(inputs, lambda mask: mask.to(kind)))
    assert ([3, 4] in lens) == (kind is torch.bool), "a mask of floats may hold weights between 0 and 1"


def test_a_chosen_backend_is_given_the_mask(text, lens):
    from diffusers.models.attention_dispatch import attention_backend

    model, inputs = text
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    with attention_backend("_native_math"):
        assert_matches_oracle(output(model, **inputs), exact, plain)
    assert not lens


@pytest.mark.parametrize("where", ["transformer_blocks.0", "transformer_blocks.0.attn2"])
def test_hooks_see_the_masks_that_they_see_without_the_patch(text, where):
    model, inputs = text
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    seen = []
    model.get_submodule(where).register_forward_pre_hook(lambda *given: seen.extend(given[2].items()), with_kwargs=True)
    assert_matches_oracle(output(model, **inputs), exact, plain)
    masks = [value for key, value in seen if key in ("attention_mask", "encoder_attention_mask")]
    assert [mask.shape for mask in masks] == [(2, 1, 5)]


def test_norms_that_were_hooked_later_are_run(text):
    model, inputs = text
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    calls = []
    for name, module in model.named_modules():
        if name.endswith(("attn2.norm_k", "norm2", "norm_out")):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert_matches_oracle(output(model, **inputs), exact, plain)
    assert len(calls) == sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", hosts.cases())
def test_a_patched_model_shows_the_signature_of_its_class(name):
    model = hosts.cases()[name].make()
    before = inspect.signature(model.forward)
    patch_model(model)
    assert inspect.signature(model.forward) == before


def test_mochi_attends_to_all_clips_at_once(lens):
    model = mochi.mochi()
    patch_model(model)
    output(model, **mochi.inputs(model))
    assert lens == [[12 + 3, 12 + 4]] * 2


@pytest.mark.parametrize("hooked", ["attn1.norm_added_k", "norm4_context", "norm1.norm"])
def test_mochi_runs_norms_that_were_hooked_later(hooked):
    model = mochi.mochi()
    inputs = mochi.inputs(model)
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    calls = []
    model.transformer_blocks[0].get_submodule(hooked).register_forward_hook(lambda *_: calls.append(1))
    assert_matches_oracle(output(model, **inputs), exact, plain)
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name in hosts.cases() if "KL" not in name])
def test_gradients_through_checkpoints_are_the_same(name):
    case = hosts.cases()[name]
    model = case.make()
    inputs = case.inputs(model)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    patch_model(model)
    expected = run(model, *args, **kwargs)
    model.enable_gradient_checkpointing()
    actual = run(model, *args, **kwargs)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_coordinates_get_their_gradients():
    model = ltx.ltx()
    inputs = ltx.inputs(model) | {"video_coords": torch.rand(2, 3, 12) * 9}
    assert_same_run(model, inputs)
    assert "input['video_coords']" in run(model, **inputs)


def test_clips_have_coordinates_of_their_own():
    model = ltx.ltx()
    coords = torch.stack([torch.rand(3, 12), torch.rand(3, 12) + 5])
    inputs = ltx.inputs(model) | {"video_coords": coords}
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    assert_matches_oracle(output(model, **inputs), exact, plain)


def test_projections_that_were_fused_before():
    model = cogvideox.cogvideox()
    inputs = cogvideox.inputs(model)
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    model.fuse_qkv_projections()
    report = patch_model(model)
    assert not report.left, report
    assert_matches_oracle(output(model, **inputs), exact, plain)
    unpatch_model(model)
    assert_matches_oracle(output(model, **inputs), exact, plain)


def test_residuals_of_a_controlnet():
    model = cosmos.cosmos(controlnet_block_every_n=1)
    inputs = cosmos.inputs(model) | {"block_controlnet_hidden_states": [torch.randn(2, 12, 48) for _ in range(2)]}
    assert_same_run(model, inputs)


def test_sound_and_video_apart():
    model = ltx2.ltx2()
    assert_same_run(model, ltx2.inputs(model) | {"isolate_modalities": True})


@pytest.mark.parametrize("perturbed", [[0.0, 1.0], [0.0, 0.0]])
def test_perturbed_attention(perturbed):
    model = ltx2.later()
    guidance = {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor(perturbed)}
    inputs = ltx2.of_later(model) | guidance
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    assert_matches_oracle(output(model, **inputs), exact, plain)
