"""Checkpoints that keep their weights in fp8: what is loaded is scale * stored, and the rest is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_dit import HEADS_OF_128, inputs, original, wan

from sora_model import fp8, lora
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
    """In its own folder, with the config of its model; the estimate counts what it takes."""
    pytest.importorskip("transformers")
    from test_model_pipeline import make_wan_directory

    from sora_model import machine
    from sora_model import wan as family
    from sora_model.pipeline import Sora

    folder = make_wan_directory(tmp_path / "wan")
    file = next((folder / "transformer").glob("*.safetensors"))
    state = load_file(file)
    in_fp8 = {name for name, value in state.items() if value.ndim == 2 and "blocks." in name}
    before = {part.name: part for part in family.parts_of(folder)}["transformer"]
    scaled = {f"{prefix}{original(n)}": v.to(E4M3) if n in in_fp8 else v for n, v in state.items()}
    scaled |= {f"{prefix}{original(n)}".replace(".weight", ".scale_weight"): torch.tensor(0.5) for n in in_fp8}
    save_file(scaled | {f"{prefix}scaled_fp8": torch.zeros(0, dtype=E4M3)}, file)
    part = {part.name: part for part in family.parts_of(folder)}["transformer"]
    assert part.parameters == before.parameters and part.bytes < before.bytes
    sora = Sora.from_pretrained(folder, device="cpu")
    weight, linear = state["blocks.0.attn1.to_q.weight"], sora.dit.blocks[0].self_attn.q
    assert torch.equal(linear.wide(linear.weight, torch.float32), 0.5 * weight.to(E4M3).float())
    assert sora.generate("a red circle", steps=1, seconds=1 / 16, size=(16, 16)).frames.shape == (1, 16, 16, 3)
    needed = family.weights_in(family.parts_of(folder), torch.float32)
    monkeypatch.setattr(machine, "available", lambda device: needed - 1)
    with pytest.raises(machine.TooLargeError, match="dtype=torch.bfloat16, of .* would fit"):
        Sora.from_pretrained(folder, device="cpu")


# --- kept in fp8 ---


def loaded(file, **how):
    """The same weights kept in fp8, and widened as they are read."""
    return [SoraDiT.from_wan(file, keep_fp8=keep, **how) for keep in (True, False)]


@pytest.fixture
def file(tmp_path):
    save_file(quantised("scale_weight")[0], tmp_path / "wan.safetensors")
    return tmp_path / "wan.safetensors"


def ran(model):
    """The velocity, and the gradients of the latents and of a bias."""
    dtype = model.patch_embedding.weight.dtype
    latents, times, text = inputs(wan(**HEADS_OF_128).config, (1, 2, 4))
    latents = latents.to(dtype).requires_grad_()
    model.zero_grad()
    out = model(latents, times, text.to(dtype))
    out.float().square().sum().backward()
    return out.detach(), latents.grad, model.blocks[0].ffn[0].bias.grad


def assert_same(actual, expected):
    for one, other in zip(ran(actual), ran(expected), strict=True):
        assert torch.equal(one, other) and other.abs().max() > 0


def matrices(model):
    return [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "stored"), [("plain", E4M3), ("plain", E5M2), ("rows", E4M3), ("weight_scale", E5M2)])
def test_kept_weights_compute_to_the_bit_what_widened_ones_do(kind, stored, dtype, tmp_path):
    save_file(quantised(kind, stored)[0], tmp_path / "wan.safetensors")
    kept, wide = loaded(tmp_path / "wan.safetensors", dtype=dtype)
    assert len(matrices(kept)) == len(fp8.kept(kept)) == 20 and not fp8.kept(wide)
    for checkpointing in (False, True):
        kept.checkpointing = wide.checkpointing = checkpointing
        assert_same(kept, wide)
    assert {w.dtype for w in matrices(kept)} == {stored}, "nothing is left widened"


def test_converted_they_are_widened_with_their_scales_or_stay(file):
    kept, wide = loaded(file, dtype=torch.float32)
    assert_same(kept.to_dtype(torch.bfloat16), wide.to_dtype(torch.bfloat16))
    assert {w.dtype for w in matrices(kept)} == {E4M3}
    kept, wide = loaded(file, dtype=torch.float32)
    for convert in (torch.nn.Module.double, torch.nn.Module.float):
        assert_same(convert(kept), convert(wide))
    assert not fp8.kept(kept) and not any("scale" in name for name in kept.state_dict())


def test_what_is_saved_of_them_is_read_again(file, tmp_path):
    kept, wide = loaded(file)
    save_file(kept.state_dict(), tmp_path / "again.safetensors")
    for model in loaded(tmp_path / "again.safetensors"):
        assert_same(model, wide)


def test_they_take_no_gradients(file):
    kept = SoraDiT.from_wan(file, keep_fp8=True)
    assert not any(w.requires_grad for w in matrices(kept))
    with pytest.raises(TypeError, match="kept in fp8 takes no gradient: load the model by SoraDiT.from_wan"):
        ran(kept.requires_grad_())


def lora_of(model, *whole):
    """Changes of every matrix of the blocks."""
    torch.manual_seed(3)
    changes = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and name.startswith("blocks."):
            half = lora.Change(0.1 * torch.randn(len(p), 2), 0.1 * torch.randn(2, p.shape[1]), 0.5)
            changes[name] = lora.Change(whole=0.1 * torch.randn(p.shape)) if name in whole else half
    return changes


def test_a_lora_is_beside_them_unless_it_is_to_be_merged(file):
    kept, wide = loaded(file)
    before, plain = {name: value.clone() for name, value in kept.state_dict().items()}, ran(kept)[0]
    whole = "blocks.0.ffn.0.weight"
    changes = lora_of(kept, whole)
    for merge, beside in ((None, False), (False, False), (True, True)):
        loras, others = lora.LoRAs(kept), lora.LoRAs(wide)
        for weight in (0.5, -0.2):
            loras.add(changes, weight, merge=merge)
            others.add(changes, weight, merge=beside)
        assert len(fp8.kept(kept)) == (0 if merge else 19), "of a whole difference none is kept apart"
        assert kept.get_parameter(whole).dtype == torch.bfloat16
        assert_same(kept, wide)
        loras.weigh((1, 2)), others.weigh((1, 2))
        assert_same(kept, wide)
        assert not torch.equal(ran(kept)[0], plain)
        loras.clear(), others.clear()
        assert before.keys() == kept.state_dict().keys()
        for name, value in kept.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value.float(), before[name].float()), name


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint whose transformer's matrices are in fp8, with a scale for each row."""
    pytest.importorskip("transformers")
    from test_model_pipeline import make_wan_directory

    folder = make_wan_directory(tmp_path / "wan")
    path = next((folder / "transformer").glob("*.safetensors"))
    state = {}
    for name, value in load_file(path).items():
        matrix = value.ndim == 2 and "blocks." in name
        state[original(name)] = value.to(E4M3) if matrix else value
        state |= {original(name).replace(".weight", ".scale_weight"): torch.rand(len(value)) + 0.5} if matrix else {}
    save_file(state, path)
    return folder


def test_a_checkpoint_keeps_them_with_offloading_and_a_lora(folder, tmp_path, monkeypatch):
    """The same frames as of weights that are widened as they are read; and nothing is widened but what runs."""
    from sora_model.pipeline import Sora

    names = {f"{name}.lora_{half}.weight" for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2") for half in "AB"}
    rows = {"blocks.0.self_attn.q.lora_B.weight": (24, 2), "blocks.0.self_attn.q.lora_A.weight": (2, 24),
            "blocks.1.ffn.2.lora_B.weight": (24, 2), "blocks.1.ffn.2.lora_A.weight": (2, 48)}  # fmt: skip
    torch.manual_seed(5)
    save_file({name: torch.randn(rows[name]) for name in sorted(names)}, tmp_path / "lora.safetensors")
    load, frames = SoraDiT.from_wan, []
    for keep, offload in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(SoraDiT, "from_wan", lambda *a, keep_fp8, keep=keep, **how: load(*a, keep_fp8=keep, **how))
        sora = Sora.from_pretrained(folder, device="cpu", offload=offload)
        assert len(fp8.kept(sora.dit)) == (20 if keep else 0)
        for merge in (None, True) if keep else (False, True):
            sora.load_lora(tmp_path / "lora.safetensors", 0.5, merge=merge)
            how = dict(steps=2, seconds=5 / 16, size=(32, 32), guidance=3.0)
            frames.append([sora.generate("a red circle", **how).frames])
            assert len(fp8.kept(sora.dit)) == (0 if not keep else 20 if merge is None else 18)
            sora.unload_loras()
        frames.append(sora.generate("a red circle", **how).frames)
    apart, merged, plain = frames[:3]
    for at in (3, 6):
        for actual, expected in zip(frames[at : at + 3], (apart, merged, plain), strict=True):
            assert (actual == expected if isinstance(actual, np.ndarray) else actual[0] == expected[0]).all()
    assert (apart[0] != plain).any()


def test_what_they_take_is_what_is_counted(folder, capsys, monkeypatch):
    from sora_model import machine
    from sora_model import wan as family
    from sora_model.cli import info
    from sora_model.pipeline import Sora

    part = family.parts_of(folder)[0]
    sora = Sora.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    assert part.fp8 == sum(w.nbytes for w in fp8.kept(sora.dit)) == sum(w.numel() for w in matrices(sora.dit))
    others = [p for p in sora.dit.parameters() if p.dtype not in (E4M3, torch.bfloat16)]  # what Wan keeps in fp32
    held = sum(p.nbytes for p in sora.dit.parameters()) - sum(p.nbytes // 2 for p in others)
    assert family.weights_in([part], torch.bfloat16) == held + part.room and part.room == 8 * 24 * 48
    free = family.weights_in(family.parts_of(folder), torch.bfloat16)
    monkeypatch.setattr(machine, "available", lambda device: free - 1)
    with pytest.raises(machine.TooLargeError, match="use a smaller model"):
        Sora.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(machine, "available", lambda device: 1 << 40)
    plan = lambda: sora._memory(5, 32, 32, "auto", False, 1 << 30)[1]  # noqa: E731
    room = plan()
    for linear in (m for m in sora.dit.modules() if isinstance(m, fp8.Linear)):
        linear.to(torch.bfloat16)
    assert room - plan() in (0, part.room), "of the stage that takes most"
    info(str(folder))
    assert f"of its parameters {part.fp8:,} stay in fp8" in " ".join(capsys.readouterr().out.split())
