"""LoRA files of every layout against diffusers and PEFT: the same changes of the same weights, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_dit import IMAGE, inputs, wan

from sora_model import lora
from sora_model.checkpoint import CheckpointError
from sora_model.dit import SoraDiT
from sora_model.pipeline import Sora

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SIZES = {"q": (48, 48), "k": (48, 48), "v": (48, 48), "o": (48, 48), "ffn.0": (56, 48), "ffn.2": (48, 56)}
RANK, ALPHA = 3, 5.0


def modules(image=False):
    """Wan's own names of the modules of two blocks that LoRAs change, and their sizes."""
    names = {f"blocks.{i}.{a}_attn.{m}": SIZES[m] for i in (0, 1) for a in ("self", "cross") for m in "qkvo"}
    names |= {f"blocks.{i}.{m}": SIZES[m] for i in (0, 1) for m in ("ffn.0", "ffn.2")}
    return names | {f"blocks.{i}.cross_attn.{m}": (48, 48) for i in (0, 1) for m in ("k_img", "v_img") if image}


def own_layout(key, image=False, alpha=True, biases=False, seed=0):
    """A file of Wan's own names; `key` makes a tensor's name of a module's."""
    torch.manual_seed(seed)
    state = {}
    for name, (rows, columns) in modules(image).items():
        state[f"{key(name)}.lora_down.weight"] = torch.randn(RANK, columns)
        state[f"{key(name)}.lora_up.weight"] = 0.1 * torch.randn(rows, RANK)
        if alpha:
            state[f"{key(name)}.alpha"] = torch.tensor(ALPHA)
        if biases:
            state[f"{key(name)}.diff_b"] = 0.1 * torch.randn(rows)
    return state


LAYOUTS = {  # state of a file; does the model see an image?
    "Wan's names": (own_layout("diffusion_model.{}".format), False),
    "Wan's names, an image": (own_layout("diffusion_model.{}".format, image=True), True),
    "Wan's names, no alpha, biases": (own_layout("diffusion_model.{}".format, alpha=False, biases=True), False),
    "flattened": (own_layout(lambda name: "lora_unet_" + name.replace(".", "_")), False),
    "flattened, an image": (own_layout(lambda name: "lora_unet_" + name.replace(".", "_"), image=True), True),
}


def ours(theirs):
    return SoraDiT.from_wan(theirs).requires_grad_(False)


def outputs(model, batch):
    latents, times, text, *image = batch
    with torch.no_grad():
        if isinstance(model, SoraDiT):
            return model(latents, times, text, image=image[0] if image else None)
        return model(latents, times, text, *image, return_dict=False)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_wan(layout, tmp_path):
    state, image = LAYOUTS[layout]
    save_file(state, tmp_path / "lora.safetensors")
    theirs = wan(**IMAGE if image else {})
    model = ours(theirs)
    batch = inputs(theirs.config, (2, 4, 6), length=512)
    before = outputs(model, batch)
    changes, second = lora.read(tmp_path / "lora.safetensors", model)
    loras = lora.LoRAs(model)
    loras.add(changes, 0.7)
    theirs.load_lora_adapter(diffusers.WanPipeline.lora_state_dict(dict(state)), prefix="transformer", adapter_name="a")
    theirs.set_adapters("a", 0.7)
    expected = outputs(theirs, batch)
    assert not second and (expected - before).abs().max() > 0.05
    torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_layout_of_diffusers_with_what_peft_says_beside_it(rslora, tmp_path):
    """Several files with weights; an alpha of its own for some modules."""
    theirs = wan()
    model = ours(theirs)
    batch = inputs(theirs.config, (2, 4, 6), length=5)
    loras = lora.LoRAs(model)
    for name, weight, targets in (("a", 0.7, ["to_q", "to_out.0", "ffn.net.2"]), ("b", -0.4, ["to_q", "proj_out"])):
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, alpha_pattern={"blocks.1.attn1.to_q": 2.0},
            use_rslora=rslora, init_lora_weights=False,
        )  # fmt: skip
        theirs.add_adapter(config, adapter_name=name)
        theirs.save_lora_adapter(tmp_path / name, adapter_name=name)
        state = load_file(next((tmp_path / name).glob("*.safetensors")))
        metadata = {"lora_adapter_metadata": prefixed(config)}
        save_file({f"transformer.{k}": v for k, v in state.items()}, tmp_path / f"{name}.safetensors", metadata)
        loras.add(lora.read(tmp_path / f"{name}.safetensors", model)[0], weight)
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    torch.testing.assert_close(outputs(model, batch), outputs(theirs, batch), rtol=0, atol=5e-5)


def prefixed(config):
    """As a pipeline of diffusers saves it."""
    kept = {k: v for k, v in config.to_dict().items() if isinstance(v, dict | int | float | bool | str)}
    return json.dumps({f"transformer.{name}": value for name, value in kept.items()})


def test_the_weights_come_back_to_the_bit(tmp_path):
    """In half precision, where a sum and its difference are not the number before."""
    save_file(LAYOUTS["Wan's names"][0], tmp_path / "lora.safetensors")
    model = ours(wan()).to_dtype(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loras = lora.LoRAs(model)
    changes, _ = lora.read(tmp_path / "lora.safetensors", model)
    loras.add(changes, 0.5)
    loras.add(changes, 0.5)
    once = lora.LoRAs(again := ours(wan()).to_dtype(torch.bfloat16))
    once.add(changes, 1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, before[name]) == (name not in changes), name
    loras.clear()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_apart_it_computes_what_merged_weights_do(layout, tmp_path):
    """Output and gradients, of several files with weights, which may change; and nothing of it is left behind."""
    _, image = LAYOUTS[layout]
    model, merged = (SoraDiT.from_wan(wan(**IMAGE if image else {})) for _ in range(2))
    batch = inputs(wan(**IMAGE if image else {}).config, (2, 4, 6), length=512)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = outputs(model, batch)
    apart, together = lora.LoRAs(model), lora.LoRAs(merged)
    for seed, weight in ((0, 0.7), (1, -0.4)):
        state = LAYOUTS[layout][0] | head()
        state = {k: v if k.endswith("alpha") else v + seed * 0.01 * torch.randn_like(v) for k, v in state.items()}
        save_file(state, tmp_path / "lora.safetensors")
        changes, _ = lora.read(tmp_path / "lora.safetensors", model)
        apart.add(changes, weight, merge=False)
        together.add(changes, weight)
    changed = {n for n, value in before.items() if not torch.equal(value, model.state_dict()[n])}
    assert changed == {"head.weight"} | {n for n in changes if n.endswith("bias")}, "a branch leaves the weights be"
    for weights in (None, (0.2, 0.3)):
        if weights:
            apart.weigh(weights), together.weigh(weights)
        results, gradients = [], []
        for part in (model, merged):
            part.zero_grad()
            latents = batch[0].clone().requires_grad_()
            out = part(latents, *batch[1:3], image=batch[3] if image else None)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            results.append(out.detach())
            own = {name: p.grad for name, p in part.named_parameters() if "branches" not in name}
            gradients.append({"latents": latents.grad} | own)
        assert (results[0] - plain).abs().max() > 0.02
        torch.testing.assert_close(*results, rtol=0, atol=2e-5)
        for name, wanted in gradients[1].items():
            near(gradients[0][name], wanted)
        branch, linear = model.blocks[1].ffn[0].branches[1], merged.blocks[1].ffn[0]
        scale = branch.weight * branch.scale
        near(branch.up.grad, scale * linear.weight.grad @ branch.down.detach().T)
        near(branch.down.grad, scale * branch.up.detach().T @ linear.weight.grad)
    apart.clear()
    assert model.state_dict().keys() == before.keys() and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def head():
    """Of a layer whose weight is read by an operation, beside which no branch can be."""
    return {"diffusion_model.head.head.lora_down.weight": torch.ones(2, 48), "diffusion_model.head.head.lora_up.weight":
            torch.full((16, 2), 0.1)}  # fmt: skip


def test_kept_apart_in_half_precision_and_with_checkpointing(tmp_path):
    save_file(LAYOUTS["Wan's names"][0], tmp_path / "lora.safetensors")
    model = SoraDiT.from_wan(wan())
    batch = inputs(wan().config, (2, 4, 6), length=5)
    changes, _ = lora.read(tmp_path / "lora.safetensors", model)
    lora.LoRAs(model).add(changes, 0.5, merge=False)
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(*batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert any("branches" in name for name in gradients[0])
    for name, wanted in gradients[0].items():
        assert torch.equal(gradients[1][name], wanted), name
    with torch.no_grad():
        exact = model(*batch)
        half = model.to_dtype(torch.bfloat16)(batch[0].bfloat16(), batch[1], batch[2].bfloat16())
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_whole_differences_of_any_weight(tmp_path):
    model = ours(wan(**IMAGE, pos_embed_seq_len=10))
    names = {
        "head.head.diff": "head.weight", "blocks.1.norm3.diff": "blocks.1.cross_norm.weight",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q", "blocks.0.modulation.diff": "blocks.0.table",
        "img_emb.proj.4.diff_b": "image_embedding.norm_out.bias", "patch_embedding.diff": "patch_embedding.weight",
        "head.modulation.diff": "head_table", "img_emb.emb_pos.diff": "image_embedding.place",
        "blocks.0.cross_attn.norm_k_img.diff": "blocks.0.cross_attn.norm_k_image",
    }  # fmt: skip
    wholes = {key: torch.randn(model.get_parameter(name).shape) for key, name in names.items()}
    save_file({f"diffusion_model.{k}": v for k, v in wholes.items()}, tmp_path / "lora.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora.LoRAs(model).add(lora.read(tmp_path / "lora.safetensors", model)[0], 0.5)
    for key, name in names.items():
        torch.testing.assert_close(model.get_parameter(name), before[name] + 0.5 * wholes[key])


def halves(name, rows=48, columns=48, rank=RANK, other=None):
    down, up = torch.zeros(rank, columns), torch.zeros(rows, other or rank)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": torch.zeros(2)}, "holds no LoRA of this model: its first tensor is 'a'"),
        ({"blocks.0.self_attn.q.weight": torch.zeros(48, 48)}, "holds no LoRA of this model"),
        (
            halves("transformer.blocks.0.attn1.to_q") | halves("transformer.blocks.7.attn1.to_q"),
            "changes 2 weights that are unknown here: transformer.blocks.7.attn1.to_q.lora_A.weight, ",
        ),
        (
            halves("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.dora_scale": torch.zeros(48)},
            "changes 1 weights that are unknown here: blocks.0.self_attn.q.dora_scale",
        ),
        (halves("blocks.0.self_attn.q", rows=64), r"changes 'blocks.0.self_attn.q.weight', which is \(48, 48\) here"),
        (halves("blocks.0.ffn.0", rows=48, columns=56), r"changes 'blocks.0.ffn.0.weight', which is \(56, 48\) here"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(3, 48)}, "halves of .* that do not go together"),
        (halves("blocks.0.self_attn.q", other=4), "halves of the LoRA of 'blocks.0.self_attn.q' that do not go"),
        (halves("blocks.0.self_attn.q", rank=0), "halves of the LoRA of 'blocks.0.self_attn.q' that do not go"),
        (
            {f"blocks.0.self_attn.q.lora_{half}.weight": torch.zeros(3) for half in "AB"},
            "halves of the LoRA of 'blocks.0.self_attn.q' that do not go",
        ),
        (
            halves("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.alpha": torch.ones(2)},
            r"the alpha of 'blocks.0.self_attn.q' must be a number; got \[1.0, 1.0\]",
        ),
        (
            halves("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.alpha": torch.tensor(float("nan"))},
            "'blocks.0.self_attn.q.alpha' holds NaN or infinite values; the checkpoint is damaged",
        ),
        ({}, "holds no LoRA of this model: its first tensor is ''"),
    ],
)
def test_files_that_are_refused(state, said, tmp_path):
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=said):
        lora.read(tmp_path / "lora.safetensors", ours(wan()))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; expected a file"):
        lora.read(tmp_path, ours(wan()))


@pytest.mark.parametrize("alpha", ["a", None, [1], float("nan"), 1e300])
def test_what_is_no_alpha_is_refused_or_means_none(alpha, tmp_path):
    notes = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha, "transformer.alpha_pattern": [1]})}
    save_file(halves("transformer.blocks.0.attn1.to_q"), tmp_path / "lora.safetensors", notes)
    if alpha is None:
        return lora.read(tmp_path / "lora.safetensors", ours(wan()))
    with pytest.raises(CheckpointError, match="lora_alpha must be a number from"):
        lora.read(tmp_path / "lora.safetensors", ours(wan()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)), ("a.safetensors:0.8", ("a.safetensors", 0.8, None)),
        ("dir/a:-1", ("dir/a", -1.0, None)), ("a:0.5:low", ("a", 0.5, "low")), ("a:high", ("a", 1.0, "high")),
        ("C:/a.safetensors", ("C:/a.safetensors", 1.0, None)),
    ],
)  # fmt: skip
def test_what_the_command_is_told(text, expected):
    assert lora.parse(text) == expected


class Checkpoint(Sora):
    """Of transformers alone."""

    def __init__(self, dit, second=None):
        self.dit, self.second, self._turns = dit, second, None
        self._loras = [lora.LoRAs(part) for part in (dit, second) if part is not None]


@pytest.mark.parametrize(
    ("prefixes", "expert", "changed"),
    [
        (("",), "high", (True, False)), (("",), "low", (False, True)), (("",), "both", (True, True)),
        (("transformer.", "transformer_2."), None, (True, True)), (("transformer_2.",), None, (False, True)),
    ],
)  # fmt: skip
def test_each_expert_has_its_own(prefixes, expert, changed, tmp_path):
    state = {}
    for prefix in prefixes:
        state |= own_layout(f"{prefix}{{}}".format)
    save_file(state, tmp_path / "lora.safetensors")
    sora = Checkpoint(ours(wan()), ours(wan(seed=1)))
    before = [part.blocks[0].ffn[0].weight.clone() for part in (sora.dit, sora.second)]
    sora.load_lora(tmp_path / "lora.safetensors", 0.5, expert=expert)
    after = [part.blocks[0].ffn[0].weight for part in (sora.dit, sora.second)]
    assert tuple(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) == changed
    sora.unload_loras()
    after = [part.blocks[0].ffn[0].weight for part in (sora.dit, sora.second)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_experts_that_are_refused(tmp_path):
    save_file(own_layout("{}".format), tmp_path / "one.safetensors")
    save_file(own_layout("transformer_2.{}".format), tmp_path / "two.safetensors")
    one, two = Checkpoint(ours(wan())), Checkpoint(ours(wan()), ours(wan()))
    for sora, file, expert, said in (
        (one, "one", "low", "this checkpoint has one transformer; got expert='low'"),
        (one, "two", None, "this checkpoint has one transformer"),
        (two, "one", None, "expert must be 'high', 'low' or 'both': .* got None"),
        (two, "two", "low", "expert must be None: the file names both"),
    ):
        with pytest.raises(ValueError, match=said):
            sora.load_lora(tmp_path / f"{file}.safetensors", expert=expert)
    with pytest.raises(TypeError, match="weight must be a number"):
        one.load_lora(tmp_path / "one.safetensors", "1")


@pytest.mark.parametrize("merge", [True, False])
def test_weights_of_files_are_changed_later(merge, tmp_path):
    save_file(own_layout("{}".format), tmp_path / "a.safetensors")
    save_file(own_layout("{}".format, seed=1), tmp_path / "b.safetensors")
    batch = inputs(wan().config, (2, 4, 6), length=5)
    one, two = (Checkpoint(ours(wan()), ours(wan(seed=1))) for _ in range(2))
    for sora, weights in ((one, (0.1, 0.2)), (two, (0.9, -0.3))):
        for file, weight, expert in zip("ab", weights, ("high", "both"), strict=True):
            sora.load_lora(tmp_path / f"{file}.safetensors", weight, expert=expert, merge=merge)
    one.weigh_loras(0.9, -0.3)
    for name in ("dit", "second"):
        assert torch.equal(outputs(getattr(one, name), batch), outputs(getattr(two, name), batch))
    with pytest.raises(ValueError, match="weights must be 2, one for each LoRA that is loaded; got 1"):
        one.weigh_loras(1.0)
    with pytest.raises(ValueError, match="merge must be true or false; got 'no'"):
        one.load_lora(tmp_path / "a.safetensors", expert="both", merge="no")


def test_the_command_merges_each_file_and_hands_the_rest_on(tiny_checkpoint, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sora_model.cli import app

    told = []
    monkeypatch.setattr(Sora, "load_lora", lambda self, file, weight, *, expert: told.append((file, weight, expert)))
    asked = ("negative", "shift", "guidance")
    monkeypatch.setattr(Sora, "generate_to", lambda self, *_, **how: told.append(tuple(how[name] for name in asked)))
    where = ["--weights", str(tiny_checkpoint), "--out", str(tmp_path / "a.mp4")]
    options = ["--lora", "x:0.5", "--lora", "y:1:low", "--negative", "a square", "--shift", "4"]
    result = CliRunner().invoke(app, ["generate", "a red circle", *where, *options, "--guidance", "4.0,3.0"])
    assert result.exit_code == 0 and told == [("x", 0.5, None), ("y", 1.0, "low"), ("a square", 4.0, (4.0, 3.0))]
