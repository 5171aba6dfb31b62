"""Checkpoints that keep their weights in fp8: what is loaded is scale * stored, and the rest is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_dit import HEADS_OF_128, inputs, original, wan

from sora_model import fp8
from sora_model.checkpoint import CheckpointError
from sora_model.dit import SoraDiT

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantised(kind, dtype=E4M3, prefix=""):
    """(a file's tensors, the weights that they stand for by diffusers' names); matrices of the blocks in fp8."""
    theirs = wan(**HEADS_OF_128)
    state, stood = {}, {}
    for name, value in theirs.state_dict().items():
        own, matrix = prefix + original(name), "blocks." in name and value.ndim == 2
        scale = torch.ones(1)
        if matrix and kind != "plain":
            most = value.abs().amax(1, keepdim=True) if kind == "rows" else value.abs().amax()
            scale = (most / torch.finfo(dtype).max).reshape(-1 if kind == "rows" else ())
        stored = value / scale.reshape(-1, 1) if matrix else value
        state[own] = stored.to(dtype) if matrix else value
        stood[name] = state[own].float() * scale.reshape(-1, 1) if matrix else value
        module = own.removesuffix(".weight")
        if matrix and kind in ("scale_weight", "rows"):
            state |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.ones(())}
        if matrix and kind == "weight_scale":
            state |= {f"{module}.weight_scale": scale, f"{module}.comfy_quant": note(str(dtype).removeprefix("torch."))}
    if kind in ("scale_weight", "rows"):
        state[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return state, stood


def note(kind):
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kind", ["plain", "scale_weight", "weight_scale", "rows"])
def test_a_file_gives_the_weights_that_it_stands_for(kind, dtype, tmp_path):
    state, stood = quantised(kind, dtype, prefix="model.diffusion_model.")
    save_file(state, tmp_path / "wan.safetensors")
    theirs = wan(**HEADS_OF_128)
    theirs.load_state_dict(stood)
    expected = SoraDiT.from_wan(theirs)
    model = SoraDiT.from_wan(tmp_path / "wan.safetensors", dtype=torch.float32)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    plain = SoraDiT.from_wan(wan(**HEADS_OF_128)).state_dict()
    assert any(not torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    half, wanted = SoraDiT.from_wan(tmp_path / "wan.safetensors"), expected.to_dtype(torch.bfloat16).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in half.state_dict().items())
    batch = inputs(theirs.config, (1, 2, 4))
    with torch.no_grad():
        assert half(batch[0].bfloat16(), batch[1], batch[2].bfloat16()).isfinite().all()


def test_a_module_whose_layers_are_stored_in_fp8():
    theirs = wan()
    theirs.enable_layerwise_casting(storage_dtype=E4M3, compute_dtype=torch.float32)
    batch = inputs(theirs.config, (2, 4, 6))
    with torch.no_grad():
        expected = theirs(*batch, return_dict=False)[0]
        actual = SoraDiT.from_wan(theirs, dtype=torch.float32)(*batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s.update({"blocks.0.self_attn.q.comfy_quant": note("nvfp4")}),
            "'blocks.0.self_attn.q' is quantised as 'nvfp4'; read are float8_e4m3fn and float8_e5m2: take the model",
        ),
        (
            lambda s: s.update({"blocks.0.self_attn.q.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}),
            r"is quantised as \[1, 2\]; read are",
        ),
        (
            lambda s: s.update({"blocks.0.self_attn.q.weight": torch.zeros(256, 256, dtype=torch.int8)}),
            "tensor 'blocks.0.self_attn.q.weight' is torch.int8; weights must be of",
        ),
        (
            lambda s: s.update({"blocks.0.self_attn.q.scale_weight": torch.ones(3)}),
            r"'blocks.0.self_attn.q.scale_weight' must be the scale of .*, one number or \[256\]; got \[3\]",
        ),
        (lambda s: s.update({"blocks.9.x.scale_weight": torch.ones(())}), "must be the scale of 'blocks.9.x.weight'"),
        (
            lambda s: s["blocks.0.self_attn.q.weight"].view(torch.uint8).fill_(0x7F),
            "'blocks.0.self_attn.q.weight' holds NaN or infinite values; the checkpoint is damaged",
        ),
        (
            lambda s: s.update({"blocks.0.self_attn.q.scale_weight": torch.tensor(float("nan"))}),
            "'blocks.0.self_attn.q.scale_weight' holds NaN or infinite values",
        ),
        (
            lambda s: s.update({"blocks.0.self_attn.q.weight_scale_2": torch.ones(())}),
            "lacks 0 .* and has 1 unknown ones .'blocks.0.self_attn.q.weight_scale_2'",
        ),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_name(change, said, tmp_path):
    state, _ = quantised("scale_weight")
    change(state)
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=said):
        SoraDiT.from_wan(tmp_path / "wan.safetensors")


def test_what_is_no_weight_is_not_counted():
    state, stood = quantised("weight_scale")
    assert len(fp8.weights(state)) == len(stood) < len(state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_checkpoint_with_a_transformer_in_fp8(prefix, tmp_path, monkeypatch):
    """In its own folder, with the config of its model; the estimate counts what it takes when it is widened."""
    pytest.importorskip("transformers")
    from test_model_pipeline import make_wan_directory

    from sora_model import machine
    from sora_model import wan as family
    from sora_model.pipeline import Sora

    folder = make_wan_directory(tmp_path / "wan")
    file = next((folder / "transformer").glob("*.safetensors"))
    state = load_file(file)
    matrices = {name for name, value in state.items() if value.ndim == 2 and "blocks." in name}
    before = {part.name: part for part in family.parts_of(folder)}["transformer"]
    scaled = {f"{prefix}{original(n)}": v.to(E4M3) if n in matrices else v for n, v in state.items()}
    scaled |= {f"{prefix}{original(n)}".replace(".weight", ".scale_weight"): torch.tensor(0.5) for n in matrices}
    save_file(scaled | {f"{prefix}scaled_fp8": torch.zeros(0, dtype=E4M3)}, file)
    part = {part.name: part for part in family.parts_of(folder)}["transformer"]
    assert part.parameters == before.parameters and part.bytes < before.bytes
    sora = Sora.from_pretrained(folder, device="cpu")
    weight = state["blocks.0.attn1.to_q.weight"]
    assert torch.equal(sora.dit.blocks[0].self_attn.q.weight, 0.5 * weight.to(E4M3).float())
    assert sora.generate("a red circle", steps=1, seconds=1 / 16, size=(16, 16)).frames.shape == (1, 16, 16, 3)
    needed = family.weights_in(family.parts_of(folder), torch.float32)
    monkeypatch.setattr(machine, "available", lambda device: needed - 1)
    with pytest.raises(machine.TooLargeError, match="dtype=torch.bfloat16, of .* would fit"):
        Sora.from_pretrained(folder, device="cpu")
