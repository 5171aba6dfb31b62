"""LoRA on a patched Wan does what it does on a plain one, whichever came first, the adapters or the patch."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts.wan import inputs, wan

from sora_kernels.integrations import patch_model, unpatch_model, verify
from sora_kernels.testing import assert_matches_oracle

peft = pytest.importorskip("peft")

EVERYWHERE = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
TARGETS = {"blocks": EVERYWHERE, "blocks and proj_out": [*EVERYWHERE, "proj_out"]}


def adapt(model, targets="blocks", name="first", seed=2):
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS[targets]), adapter_name=name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f"lora_B.{name}." in key:
                p.copy_(0.3 * torch.randn(p.shape))


def forward(model, batch, **kwargs):
    with torch.no_grad():
        return model(*batch, return_dict=False, **kwargs)[0]


def scale(model, batch):
    return [forward(model, batch, attention_kwargs={"scale": s}) for s in (0.5, 0.0, 1.0)]


def weights(model, batch):
    adapt(model, "blocks", "second", 3)
    results = []
    for names, chosen in ((["first"], [0.4]), (["first", "second"], [0.4, 1.7]), (["second"], [1.0])):
        model.set_adapters(names, weights=chosen)
        results.append(forward(model, batch))
    return [*results, forward(model, batch, attention_kwargs={"scale": 0.5})]


def fusing(model, batch):
    model.fuse_lora(lora_scale=0.7)
    fused = forward(model, batch)
    model.unfuse_lora()
    return [fused, forward(model, batch)]


def switching(model, batch):
    model.disable_lora()
    without = forward(model, batch)
    model.enable_lora()
    return [without, forward(model, batch)]


def removing(model, batch):
    adapt(model, "blocks", "second", 3)
    model.delete_adapters("first")
    model.set_adapters("second")
    second = forward(model, batch)
    model.unload_lora()
    return [second, forward(model, batch)]


USES = (scale, weights, fusing, switching, removing)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("use", USES)
def test_adapters_on_a_patched_model_do_what_they_do_on_a_plain_one(use, targets):
    batch = inputs(wan())
    plain = wan()
    adapt(plain, targets)
    with verify._FloatMeansDouble():
        exact = use(copy.deepcopy(plain).double(), [t.double() for t in batch])
    expected = use(plain, batch)
    for patched_first in (True, False):
        model = wan()
        if patched_first:
            patch_model(model, strict=True)
        adapt(model, targets)
        if not patched_first:
            patch_model(model)
        results = use(model, batch)
        for actual, host, oracle in zip(results, expected, exact, strict=True):
            assert_matches_oracle(actual, oracle, host)
        assert not torch.equal(results[0], expected[0]), "the patch did nothing"
    bare = forward(wan(), batch)
    assert any(not torch.allclose(e, bare, atol=1e-2) for e in expected), "the adapters did nothing"


def test_an_adapter_saved_from_a_patched_model_loads_into_another(tmp_path):
    model, other = wan(), wan()
    batch = inputs(model)
    patch_model(model)
    adapt(model)
    model.save_lora_adapter(tmp_path, adapter_name="first")
    patch_model(other)
    other.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None, adapter_name="first")
    assert torch.equal(forward(other, batch), forward(model, batch))


def test_adapters_train_alike_with_gradient_checkpointing():
    def gradients(model, checkpointed=True):
        model.train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        out = model(*batch, return_dict=False)[0]
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True))

    batch = inputs(wan())
    model = wan()
    adapt(model)
    host = gradients(model)
    patch_model(model)
    ours = gradients(model)
    unpatch_model(model)
    batch = [t.double() for t in batch]
    with verify._FloatMeansDouble():
        model.disable_gradient_checkpointing()
        exact = gradients(copy.deepcopy(model).double(), checkpointed=False)
    assert len(exact) == 2 * 2 * len(EVERYWHERE) + 2 * 2 * 4 and all("lora" in name for name in exact)
    for kind in ("lora_A", "lora_B"):
        picked = [torch.cat([g[n].double().flatten() for n in exact if kind in n]) for g in (ours, exact, host)]
        assert_matches_oracle(*picked)
