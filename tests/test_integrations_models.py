"""What is peculiar to one family of patched models; tests/test_hosts.py checks what all of them share."""

from __future__ import annotations

import copy
from functools import partial

import hosts
import pytest
import torch
from hosts import exactly, output
from hosts.wan import IMAGE, forcing_inputs, image_inputs, wan

from sora_kernels.integrations import patch_model
from sora_kernels.integrations.diffusers import common
from sora_kernels.testing import assert_matches_oracle

attention_backend = pytest.importorskip("diffusers.models.attention_dispatch").attention_backend
forcing = partial(wan, "SkyReelsV2", num_layers=2, num_frame_per_block=2, inject_sample_info=True)


def watch(monkeypatch, name):
    """The keyword arguments of each call of a function that `common` calls."""
    calls, original = [], getattr(common, name)

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(common, name, watched)
    return calls


def test_a_block_causal_mask_is_never_made(monkeypatch):
    model = forcing()
    ours, theirs = watch(monkeypatch, "spacetime_attention"), watch(monkeypatch, "dispatch_attention_fn")
    patch_model(model)
    output(model, *forcing_inputs(model))
    assert [call.get("causal") for call in ours] == [2, None] * 2 and ours[0]["grid"] == (4, 2, 2)
    assert not theirs


@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.attn1", "blocks.0.attn1.norm_k"])
def test_a_hook_sees_the_block_causal_mask_that_it_sees_without_the_patch(where):
    model, seen = forcing(), []
    batch = forcing_inputs(model)
    plain, exact = output(model, *batch), exactly(model, *batch)["output"]
    patch_model(model)
    model.get_submodule(where).register_forward_pre_hook(lambda _, args: seen.extend(args))
    assert_matches_oracle(output(model, *batch), exact, plain)
    if "norm" not in where:
        assert any(isinstance(mask, torch.Tensor) and mask.shape == (1, 1, 16, 16) for mask in seen)


def test_the_attention_to_an_image_takes_fused_projections():
    model = wan(num_layers=1, **IMAGE)
    batch = image_inputs(model)
    plain, exact = output(model, *batch), exactly(model, *batch)["output"]
    model.fuse_qkv_projections()
    patch_model(model)
    assert_matches_oracle(output(model, *batch), exact, plain)


@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo Framepack", "HunyuanVideo-1.5"])
def test_a_padded_text_comes_as_its_length_and_no_mask_is_made(name, monkeypatch):
    case = hosts.cases()[name]
    model = case.make()
    ours, theirs = watch(monkeypatch, "spacetime_attention"), watch(monkeypatch, "dispatch_attention_fn")
    patch_model(model)
    output(model, **case.inputs(model))
    lens = [call["kv_lens"] for call in ours]
    assert len(lens) == case.steps["spacetime_attention"] and not theirs
    assert all(torch.equal(a, lens[0]) for a in lens) and lens[0].tolist()[0] != lens[0].tolist()[1]


@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo-1.5"])
def test_an_attention_backend_gets_the_mask_that_a_length_stands_for(name, monkeypatch):
    case = hosts.cases()[name]
    model = case.make()
    batch = case.inputs(model)
    plain, exact = output(model, **batch), exactly(model, **batch)["output"]
    patch_model(model)
    ours, theirs = watch(monkeypatch, "spacetime_attention"), watch(monkeypatch, "dispatch_attention_fn")
    with attention_backend("_native_math"):
        assert_matches_oracle(output(model, **batch), exact, plain)
    assert not ours and all(call["attn_mask"].dtype == torch.bool for call in theirs)
    assert len(theirs) == case.steps["spacetime_attention"]


TIME, TEXT = ("timestep",), ("encoder_hidden_states",)
IMAGES = *TEXT, "encoder_hidden_states_image"
SHARED = [(name, TIME) for name in ("Wan", "SkyReels-V2", "HunyuanVideo-1.5", "CogVideoX", "Cosmos", "Mochi")]
SHARED += [("Wan", TEXT), ("Wan with an image", IMAGES), ("Cosmos", TEXT)]


@pytest.mark.parametrize(("name", "shared"), SHARED, ids=lambda value: value if isinstance(value, str) else value[0])
def test_one_time_or_text_serves_all_clips(name, shared):
    case = hosts.cases()[name]
    model = case.make()
    inputs = case.inputs(model)
    if not isinstance(inputs, dict):
        inputs = dict(zip(("hidden_states", *TIME, *IMAGES), inputs, strict=False))
    inputs |= {name: inputs[name][:1] for name in shared}
    plain, exact = output(model, **inputs), exactly(model, **inputs)["output"]
    patch_model(model)
    assert_matches_oracle(output(model, **inputs), exact, plain)


@pytest.mark.parametrize(
    ("name", "where"),
    [("HunyuanVideo-1.5", "transformer_blocks"), ("AutoencoderKLHunyuanVideo15", "decoder.mid_block.resnets")],
)
def test_repeated_blocks_with_parts_that_are_replaced_compile_once(name, where):
    case = hosts.cases()[name]
    model = case.make()
    blocks = model.get_submodule(where)
    blocks.append(copy.deepcopy(blocks[0]))
    inputs = case.inputs(model)
    inputs = inputs if isinstance(inputs, dict) else {"sample": inputs[0]}
    patch_model(model)
    eager = output(model, **inputs)
    torch.compiler.reset()
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(output(model, **inputs), eager, rtol=0, atol=2e-6)
