"""SoraDiT against diffusers' WanTransformer3DModel: the same weights give the same output and gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_kernels.testing import assert_matches_oracle, max_error
from sora_model import presets
from sora_model.attention import AttentionMode
from sora_model.checkpoint import CheckpointError
from sora_model.dit import DiTConfig, SoraDiT, own_name
from sora_model.memory import Memory

diffusers = pytest.importorskip("diffusers")

TINY = {
    "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
    "out_channels": 4, "text_dim": 20, "freq_dim": 32, "ffn_dim": 56, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
IMAGE = {"image_dim": 18, "added_kv_proj_dim": 48}  # diffusers takes the last 512 tokens for the text's
CASES = {  # config beyond TINY; latent grid; timesteps per; text tokens
    "heads of 24, an odd grid": ({}, (3, 6, 10), "clip", 7),
    "heads of 32, a timestep per token": ({"attention_head_dim": 32}, (5, 2, 6), "token", 5),
    "3 heads of 64": ({"attention_head_dim": 64, "num_attention_heads": 3}, (2, 6, 2), "clip", 3),
    "heads of 128": ({"attention_head_dim": 128, "num_layers": 1}, (1, 6, 14), "token", 2),
    "no norm before cross-attention": ({"cross_attn_norm": False}, (3, 2, 6), "clip", 4),
    "a patch in time, other channels out": (
        {"patch_size": [2, 3, 1], "out_channels": 6}, (4, 9, 5), "token", 6
    ),
    "one row": ({}, (1, 2, 10), "clip", 3),
    "an image": (IMAGE, (3, 6, 2), "clip", 512),
    "a first and a last image, each token in its place": (IMAGE | {"pos_embed_seq_len": 10}, (2, 2, 6), "token", 512),
    "an image in 36 channels, no norm before it": (
        IMAGE | {"in_channels": 36, "out_channels": 16, "cross_attn_norm": False, "num_layers": 1},
        (1, 6, 2), "clip", 512,
    ),
}


@contextlib.contextmanager
def float_means_double():
    """diffusers upcasts with `.float()`, which would bring an fp64 run down to fp32."""
    original = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = original


def wan(seed=0, **changes):
    """A tiny WanTransformer3DModel whose every weight, biases and norms included, is random."""
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(**TINY | changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.2 if p.ndim == 1 or "table" in name else 0.0)
    return model


def double(model):
    with float_means_double():
        oracle = diffusers.WanTransformer3DModel(**model.config).double()
    oracle.load_state_dict(model.state_dict())
    return oracle


def inputs(config, sizes, per="clip", length=7, batch=2, seed=1):
    torch.manual_seed(seed)
    patch = config.patch_size if hasattr(config, "patch_size") else config.patch
    tokens = [n // p for n, p in zip(sizes, patch, strict=True)]
    times = {"clip": (batch,), "frame": (batch, tokens[0]), "token": (batch, math.prod(tokens))}[per]
    return (
        torch.randn(batch, config.in_channels, *sizes),
        torch.rand(times) * 1000,
        torch.randn(batch, length, config.text_dim),
        *([torch.randn(batch, 10, config.image_dim)] if config.image_dim else []),
    )


def run(model, latents, timesteps, *context, **how):
    """Output and gradients of a fixed loss: {"output", "latents", "text", "image", <parameter>}.

    context: text, and an image's tokens where the model sees one, which are those of two for a place for each.
    """
    dtype = next(model.parameters()).dtype
    given = [t.detach().to(dtype).requires_grad_() for t in (latents, *context)]
    latents, text, image = (*given, None)[:3]
    if isinstance(model, SoraDiT):
        out = model(latents, timesteps, text, image=image, **how)
    else:
        pairs = image.unflatten(1, (2, -1)).flatten(0, 1) if model.config.pos_embed_seq_len else image
        out = model(latents, timesteps, text, pairs, return_dict=False)[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * weights).sum(), (*given, *parameters))
    names = [*("latents", "text", "image")[: len(given)], *map(own_name, names)]  # ours stay as they are
    return {"output": out.detach()} | dict(zip(names, grads, strict=True))


def assert_rounds_like(baseline, actual, oracle):
    """The project's error rule for the gradients of a whole model: per module, in the Euclidean norm.

    After some twenty operations chance decides which program errs more in its worst element, and a bias's
    gradient, a sum that may cancel, carries the errors of the weight's: they are taken together.
    """
    modules = {}
    for name in oracle:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    for module, names in modules.items():
        values, errors, plain = (
            torch.cat([t.flatten() for t in tensors]).norm().item()
            for tensors in (
                [oracle[n] for n in names],
                [actual[n].double() - oracle[n] for n in names],
                [baseline[n].double() - oracle[n] for n in names],
            )
        )
        bound = 2 * plain + torch.finfo(actual[names[0]].dtype).eps * values
        assert values > 0 and errors <= bound, f"{module}: {errors:.3e} exceeds {bound:.3e}, of {values:.3e}"


@pytest.mark.parametrize("case", CASES)
def test_same_output_and_gradients_as_wan(case):
    changes, sizes, per, length = CASES[case]
    theirs = wan(**changes)
    ours = SoraDiT.from_wan(theirs)
    batch = inputs(theirs.config, sizes, per, length)
    plain = run(theirs, *batch)
    with float_means_double():
        exact = run(double(theirs), *batch)
    assert all(value.dtype == torch.float64 for value in exact.values())
    for impl in ("auto", "reference"):
        result = run(ours, *batch, impl=impl)
        assert result.keys() == exact.keys()
        assert_matches_oracle(result["output"], exact["output"], plain["output"])
        assert_rounds_like(plain, result, exact)


@pytest.mark.parametrize("changes", [{}, IMAGE], ids=["text", "image"])
def test_half_precision_keeps_what_wan_keeps_in_fp32(tmp_path, changes):
    wan(**changes).save_pretrained(tmp_path)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = SoraDiT.from_wan(tmp_path, dtype=torch.bfloat16)
    dtypes = {own_name(name): p.dtype for name, p in theirs.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in ours.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    latents, timesteps, *context = inputs(theirs.config, (3, 6, 10), length=512 if changes else 7)
    latents, *context = (t.bfloat16() for t in (latents, *context))
    with float_means_double(), torch.no_grad():
        exact = double(theirs)(latents.double(), timesteps, *(t.double() for t in context)).sample
    with torch.no_grad():
        actual = ours(latents, timesteps, context[0], **({"image": context[1]} if changes else {}))
        assert_matches_oracle(actual, exact, theirs(latents, timesteps, *context).sample)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_saved_directory_gives_the_same_model_as_the_module(tmp_path, sharded):
    theirs = wan()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    read, taken = SoraDiT.from_wan(tmp_path), SoraDiT.from_wan(theirs)
    assert read.config == taken.config == DiTConfig.from_wan(theirs.config)
    assert read.state_dict().keys() == taken.state_dict().keys()
    assert all(torch.equal(value, taken.state_dict()[name]) for name, value in read.state_dict().items())
    assert all(p.requires_grad for p in read.parameters())


@pytest.mark.parametrize("layout", ["expanded", "channels last", "slices"])
def test_any_layout_of_a_batch(layout):
    """Latents, text and image of one clip for three timesteps; other strides; slices of larger tensors."""
    model = SoraDiT.from_wan(wan(**IMAGE, num_layers=1))
    latents, times, text, image = inputs(model.config, (3, 4, 6), length=5, batch=3)
    if layout == "expanded":
        latents, text, image = (t[:1].expand_as(t) for t in (latents, text, image))
    elif layout == "channels last":
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        text, image = (t.mT.contiguous().mT for t in (text, image))
    else:
        latents, text, image = (torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (latents, text, image))
    with torch.no_grad():
        clips = [[t[i : i + 1].clone() for t in (latents, times, text, image)] for i in range(3)]
        alone = torch.cat([model(*clip[:3], image=clip[3]) for clip in clips])
        torch.testing.assert_close(model(latents, times, text, image=image), alone, rtol=0, atol=2e-6)


def test_checkpointing_hands_the_image_on():
    models = [SoraDiT.from_wan(wan(**IMAGE)) for _ in range(2)]
    models[1].checkpointing = True
    batch = inputs(models[0].config, (1, 2, 4), length=3)
    results = [run(model, *batch) for model in models]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_what_older_image_to_video_files_hold_besides_is_left_out(tmp_path):
    """`norm_added_q` normalises nothing: diffusers ignores it too."""
    theirs = wan(**IMAGE)
    theirs.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    state = load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}
    save_file(state, file, metadata={"format": "pt"})
    read, taken = SoraDiT.from_wan(tmp_path).state_dict(), SoraDiT.from_wan(theirs).state_dict()
    assert read.keys() == taken.keys() and all(torch.equal(value, taken[name]) for name, value in read.items())


ORIGINAL = {  # how Wan's own files name what diffusers names otherwise; in this order
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img", "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2", "norm2": "norm3", "proj_out": "head.head",
}  # fmt: skip
HEADS_OF_128 = {"attention_head_dim": 128, "num_layers": 2, "ffn_dim": 24, "text_dim": 12}
SEES = {"image_dim": 18, "added_kv_proj_dim": 256}


def original(name):
    for theirs, own in ORIGINAL.items():
        name = name.replace(theirs, own)
    return "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("changes", [{}, SEES, SEES | {"pos_embed_seq_len": 10}, {"cross_attn_norm": False}], ids=str)
def test_wans_own_files_are_the_same_model(changes, prefix, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    theirs = wan(**HEADS_OF_128 | changes)
    state = {prefix + original(name): value for name, value in theirs.state_dict().items()}
    other = convert_wan_transformer_to_diffusers(dict(state)).keys() ^ theirs.state_dict().keys()
    assert other <= {"img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"}  # which diffusers forgets
    save_file(state, tmp_path / "wan.safetensors")
    expected = SoraDiT.from_wan(theirs)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2, "model_type": "t2v"}))
    for read in (SoraDiT.from_wan(tmp_path / "wan.safetensors"), SoraDiT.from_wan(tmp_path)):
        assert read.config == expected.config
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in read.state_dict().items())


def test_weights_of_a_file_are_mapped_not_copied(tmp_path):
    wan().save_pretrained(tmp_path)
    model = SoraDiT.from_wan(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) <= file.stat().st_size
    before = file.read_bytes()
    with torch.no_grad():
        model.head.weight.zero_()
    assert file.read_bytes() == before, "what is written to the weights stays out of the file"


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ({"a": torch.zeros(2)}, ValueError, "not the weights of a Wan transformer: 'patch_embedding.weight' is miss"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, CheckpointError, "is a LoRA, .* load the model"),
    ],
)
def test_files_of_something_else(state, error, said, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(error, match=said):
        SoraDiT.from_wan(tmp_path / "a.safetensors")


def test_weights_are_copied_from_the_module():
    theirs = wan()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    with torch.no_grad():
        for p in SoraDiT.from_wan(theirs).parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("per", ["clip", "frame"])
def test_a_timestep_shared_by_tokens_equals_one_for_each_token(per):
    model = SoraDiT.from_wan(wan())
    latents, timesteps, text = inputs(model.config, (3, 4, 6), per)
    each = timesteps.reshape(2, -1, 1).expand(2, -1, 18 if per == "clip" else 6).reshape(2, 18)
    with torch.no_grad():
        shared, exact = model(latents, timesteps, text), model.double()(latents.double(), each, text.double())
    assert max_error(shared, exact) <= 32 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_padded_text_is_not_seen():
    model = SoraDiT.from_wan(wan())
    latents, timesteps, text = inputs(model.config, (1, 4, 4), length=5)
    padded = torch.cat([text, 1e4 * torch.ones(2, 3, model.config.text_dim)], 1).requires_grad_()
    lens = torch.tensor([5, 2])
    out = model(latents, timesteps, padded, lens)
    alone = [model(latents[i : i + 1], timesteps[i : i + 1], text[i : i + 1, : lens[i]]) for i in range(2)]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=2e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), padded)
    assert grad[0, :5].abs().min() > 0 and grad[1, :2].abs().min() > 0
    assert torch.count_nonzero(grad[0, 5:]) == torch.count_nonzero(grad[1, 2:]) == 0


def reach(model, mode, sizes=(4, 6, 6)):
    """[S, S] booleans: does the output at token i depend on the latents at token j?"""
    latents, timesteps, text = inputs(model.config, sizes, batch=1)
    out = model(latents.requires_grad_(), timesteps, text, attention=mode)
    cells = [n // p for n, p in zip(sizes, model.config.patch, strict=True)]
    patched = [axis for pair in zip(cells, model.config.patch, strict=True) for axis in pair]

    def tokens(t):
        return t.abs().sum(1).reshape(patched).sum((1, 3, 5)).flatten()

    total = out.sum(1).reshape(patched).sum((1, 3, 5)).flatten()
    return torch.stack([tokens(torch.autograd.grad(y, latents, retain_graph=True)[0]) > 0 for y in total])


def test_tokens_depend_on_those_that_the_attention_mode_lets_them_see():
    model = SoraDiT.from_wan(wan(num_layers=1))
    S, frame = 4 * 3 * 3, torch.arange(36) // 9
    assert torch.equal(reach(model, AttentionMode((1, 1, 1))), torch.eye(S, dtype=torch.bool))
    assert torch.equal(reach(model, AttentionMode(causal="frame")), frame[:, None] >= frame)
    assert torch.equal(reach(model, AttentionMode((1, 3, 3))), frame[:, None] == frame)
    sink = AttentionMode((1, 3, 3), causal="frame", sink=1)
    assert torch.equal(reach(model, sink), (frame[:, None] == frame) | (frame == 0))
    assert reach(model, None).all()


def test_a_window_as_large_as_the_clip_is_full_attention():
    model = SoraDiT.from_wan(wan())
    batch = inputs(model.config, (3, 4, 6))
    full, windowed = model(*batch), model(*batch, attention=AttentionMode((9, 9, 9), stride=(1, 2, 2)))
    torch.testing.assert_close(windowed, full, rtol=0, atol=2e-6)
    configured = SoraDiT(dataclasses.replace(model.config, attention=AttentionMode(causal=2)))
    configured.load_state_dict(model.state_dict())
    assert torch.equal(configured(*batch), model(*batch, attention=AttentionMode(causal=2)))
    assert not torch.equal(configured(*batch), full)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("full", AttentionMode()),
        ("window=3x4x5", AttentionMode((3, 4, 5))),
        ("window=3x4x5, stride=1x2x2,causal=2,sink=1", AttentionMode((3, 4, 5), (1, 2, 2), 2, 1)),
        ("causal=frame", AttentionMode(causal="frame")),
    ],
)
def test_attention_modes_are_read_from_text(text, mode):
    assert AttentionMode.parse(text) == mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "attention must be 'full', or settings such as .* got ''"),
        ("window", "got 'window'"),
        ("window=3x4", "got 'window=3x4'"),
        ("windows=3x4x5", "got 'windows=3x4x5'"),
        ("window=3x4x-5", "got 'window=3x4x-5'"),
        ("window=0x4x5", r"window must be three integers \(t, h, w\) of at least 1; got \(0, 4, 5\)"),
        ("causal=0", "causal must be 'frame' or a number of frames; got 0"),
        ("window=3x3x3,sink=frame", "sink must be a number of frames; got 'frame'"),
        ("stride=1x2x2", "stride and sink belong to a window"),
        ("causal=frame,sink=1", "stride and sink belong to a window"),
    ],
)
def test_bad_attention_modes(text, message):
    with pytest.raises(ValueError, match=message):
        AttentionMode.parse(text)


def test_impl_reaches_every_op(monkeypatch):
    from sora_model import context, dit

    seen = {}
    in_dit = "final_layer", "gate_residual", "gate_residual_norm_modulate", "norm_modulate", "patch_embed3d"
    for module, names in ((dit, in_dit), (context, ("qk_norm_rope", "spacetime_attention"))):
        for name in names:
            original = getattr(module, name)

            def spy(*args, place=(module, name), original=original, **kwargs):
                seen.setdefault(place, set()).add(kwargs["impl"])
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, spy)
    model = SoraDiT.from_wan(wan())
    model(*inputs(model.config, (1, 2, 2)), impl="reference")
    assert len(seen) == 7 and set.union(*seen.values()) == {"reference"}
    with pytest.raises(ValueError, match="impl"):
        model(*inputs(model.config, (1, 2, 2)), impl="fastest")


def test_initialisation_is_that_of_wan():
    torch.manual_seed(0)
    config = dataclasses.replace(presets.DIT["toy"], layers=1)
    for image in ({"image_dim": 18}, {"image_dim": 18, "image_tokens": 10}):
        other = dataclasses.replace(config, **image)
        assert sum(p.numel() for p in SoraDiT(other).parameters()) == other.parameters
    model = SoraDiT(config)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == config.parameters
    for name, p in parameters.items():
        if name.startswith("head.") or name.endswith("bias"):
            assert torch.count_nonzero(p) == 0, name
        elif name.endswith("table"):
            assert p.std().item() == pytest.approx(config.dim**-0.5, rel=0.1), name
        elif "embedding.0" in name or "embedding.2" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif p.ndim > 1:
            fans = p.shape[0] + p[0].numel()
            assert p.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.05), name
            assert p.abs().max() <= (6 / fans) ** 0.5, name
        else:
            assert torch.equal(p, torch.ones_like(p)), name
    batch = inputs(config, (2, 4, 4))
    assert torch.count_nonzero(model(*batch)) == 0
    torch.nn.init.normal_(model.head.weight)
    grads = torch.autograd.grad(model(*batch).square().sum(), list(parameters.values()))
    assert all(grad.abs().max() > 0 for grad in grads)


def test_training_from_scratch_fits_a_batch():
    torch.manual_seed(0)
    model = SoraDiT(DiTConfig(24, 2, layers=1, ffn_dim=48, in_channels=4, out_channels=4, text_dim=8))
    batch = inputs(model.config, (2, 4, 4))
    target = torch.randn_like(batch[0])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (model(*batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiles_without_a_graph_break():
    model = SoraDiT.from_wan(wan(num_layers=1))
    batch = inputs(model.config, (2, 4, 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(*batch)
    torch.testing.assert_close(out, model(*batch), rtol=0, atol=2e-6)
    weight = model.blocks[0].self_attn.q.weight
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    (eager,) = torch.autograd.grad(model(*batch).square().sum(), weight)
    torch.testing.assert_close(grad, eager, rtol=0, atol=1e-5 * eager.abs().max().item())


def test_an_empty_batch_gives_an_empty_clip():
    model = SoraDiT.from_wan(wan())
    assert model(*inputs(model.config, (2, 4, 4), batch=0)).shape == (0, 4, 2, 4, 4)


def test_config_survives_json():
    tiny = DiTConfig.from_wan(TINY)
    windowed = dataclasses.replace(tiny, attention=AttentionMode((3, 4, 4), sink=1))
    for config in (*presets.DIT.values(), tiny, windowed):
        again = DiTConfig(**json.loads(json.dumps(config.to_dict())))
        assert again == config and hash(again) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 5


def test_presets_are_the_public_models():
    image = dict(image_dim=1280, in_channels=36)
    assert round(dataclasses.replace(presets.DIT["wan2.1-14b"], **image).parameters / 1e9, 2) == 16.39
    billions = {"wan2.1-1.3b": 1.42, "wan2.1-14b": 14.29, "wan2.2-5b": 5.0}
    assert {name: round(presets.DIT[name].parameters / 1e9, 2) for name in billions} == billions
    for name, shape in presets.SHAPES.items():
        assert shape.rope is None or 0 < 2 * sum(shape.rope) <= shape.head_width, name
        assert all(shape.tokens(clip) > 0 for clip in shape.clips), name
    assert presets.SHAPES["wan2.1-1.3b"].tokens("480x832x81") == 32760
    assert presets.SHAPES["hunyuan-13b"].tokens("720x1280x129") == 118800
    with pytest.raises(ValueError, match="clip must be one of 480x832x81, 720x1280x81; got '4k'"):
        presets.SHAPES["wan2.1-14b"].tokens("4k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim must be a whole number from 1"),
        ({"layers": -1}, "layers must be"),
        ({"ffn_dim": 10**12}, "ffn_dim must be"),
        ({"heads": 2.0}, "heads must be"),
        ({"dim": 50}, "heads x an even head width"),
        ({"dim": 6}, "heads x an even head width"),
        ({"freq_dim": 7}, "freq_dim must be even"),
        ({"patch": (1, 2)}, "patch must be three integers"),
        ({"patch": 2}, "patch must be three integers"),
        ({"patch": (1, 2, 0)}, "patch must be a whole number"),
        ({"eps": 0.0}, "eps must be a number from"),
        ({"attention": {"windows": (1, 2, 2)}}, "attention has no setting 'windows'"),
        ({"attention": {"window": [1, 2]}}, "window must be three integers"),
        ({"dim": 2**19, "layers": 1000}, "no model has 2,[0-9,]* parameters"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{"dim": 48, "heads": 4, "layers": 1, "ffn_dim": 8} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_dim": 1280}, "added_kv_proj_dim must be the model's width 48 .* got None with image_dim=1280"),
        ({"added_kv_proj_dim": 48}, "added_kv_proj_dim must be .* got 48 with image_dim=None"),
        ({"image_dim": 18, "added_kv_proj_dim": 40}, "added_kv_proj_dim must be .* got 40 with image_dim=18"),
        ({"pos_embed_seq_len": 514}, "image_tokens=514 needs an image_dim"),
        ({"image_tokens": 514}, "image_tokens=514 is no field"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be"),
        ({"patch_size": None}, "patch must be"),
        ({"num_attention_heads": "2"}, "num_attention_heads must be a whole number"),
        ({"attention_head_dim": None}, "attention_head_dim must be a whole number"),
        ({"num_frame_per_block": 2}, "num_frame_per_block=2 is no field of a WanTransformer3DModel"),
        ({"rope_temporal_skip_len": 8}, "rope_temporal_skip_len=8 is no field"),
        ({"dim": 96}, "dim=96 is no field"),
        ({"attention": {"window": [1, 2, 3]}}, "attention=.* is no field"),
        ({"_class_name": "ChronoEditTransformer3DModel"}, "but of a ChronoEditTransformer3DModel"),
    ],
)
def test_wan_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_wan(TINY | change)


class OwnWan(diffusers.WanTransformer3DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class PlainWan(diffusers.WanTransformer3DModel):
    pass


LOOK_ALIKES = {  # same names and shapes of weights as Wan
    "SkyReelsV2Transformer3DModel": {}, "SkyReelsV2Transformer3DModel causal": {"num_frame_per_block": 2},
    "ChronoEditTransformer3DModel": {},
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_models_that_resemble_wan_are_refused_as_modules_and_as_directories(name, tmp_path):
    kind = name.split()[0]
    theirs = getattr(diffusers, kind)(**TINY | LOOK_ALIKES[name])
    assert theirs.state_dict().keys() == wan().state_dict().keys()
    with pytest.raises(ValueError, match=f"is a {kind}, not a WanTransformer3DModel"):
        SoraDiT.from_wan(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"not the config of a WanTransformer3DModel, but of a {kind}"):
        SoraDiT.from_wan(tmp_path)


def test_subclasses_of_wan_are_taken_unless_they_compute_something_else():
    assert SoraDiT.from_wan(PlainWan(**TINY)).config == DiTConfig.from_wan(TINY)
    with pytest.raises(ValueError, match="is a OwnWan, which has a forward of its own"):
        SoraDiT.from_wan(OwnWan(**TINY))
    with pytest.raises(ValueError, match="is a Linear, not a WanTransformer3DModel"):
        SoraDiT.from_wan(torch.nn.Linear(2, 2))


def test_foreign_configs_and_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not the config of a WanTransformer3DModel, but of a AutoencoderKLWan"):
        DiTConfig.from_wan({"_class_name": "AutoencoderKLWan", "base_dim": 96})
    with pytest.raises(ValueError, match="not the config of a WanTransformer3DModel: it lacks num_att"):
        DiTConfig.from_wan({"base_dim": 96})
    with pytest.raises(CheckpointError, match="not a folder"):
        SoraDiT.from_wan(tmp_path / "nowhere")
    wan().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"ffn_dim": 57}, r"'blocks.0.ffn.0.weight' should have the shape \(57, 48\) .*, but has \(56, 48\)"),
        ({"num_layers": 3}, r"lacks 27 of the \d+ .* \(('blocks.2.[^']*', ){10}\.\.\.\) and has 0 unknown"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=said):
            SoraDiT.from_wan(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        SoraDiT.from_wan(tmp_path)
    with pytest.raises(TypeError, match="dtype must be"):
        SoraDiT.from_wan(wan(), dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": torch.zeros(1, 4, 2, 4)}, ValueError, r"be \[B, 4, T, H, W\]; got \[1, 4, 2, 4\]"),
        ({"latents": torch.zeros(1, 3, 2, 4, 4)}, ValueError, "latents must be"),
        ({"latents": torch.zeros(1, 4, 2, 5, 4)}, ValueError, "5 rows, which patches of 2 do not .* 4 or 6"),
        ({"latents": torch.zeros(1, 4, 2, 4, 1)}, ValueError, "1 columns, which patches of 2 do not .*; 2"),
        ({"latents": torch.zeros(1, 4, 0, 4, 4)}, ValueError, "0 frames"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4).half()}, TypeError, "must be torch.float32 like the"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4, device="meta")}, ValueError, "latents must be on cpu"),
        ({"latents": [0.0]}, TypeError, "latents must be a tensor; got list"),
        ({"timesteps": torch.zeros(2)}, ValueError, r"\[1\], frame \[1, 2\] or token \[1, 8\]; got \[2\]"),
        ({"timesteps": torch.zeros(1, 4)}, ValueError, "timesteps must be one for each"),
        ({"timesteps": torch.zeros(1).bfloat16()}, TypeError, "timesteps must be fp32, fp64 or integers"),
        ({"timesteps": 500}, TypeError, "timesteps must be a tensor"),
        ({"text": torch.zeros(1, 3, 21)}, ValueError, r"must be \[1, L, 20\]; got \[1, 3, 21\]"),
        ({"text": torch.zeros(2, 3, 20)}, ValueError, "text must be"),
        ({"text": torch.zeros(1, 3, 20).double()}, TypeError, "text must be torch.float32"),
        ({"text_lens": torch.zeros(1)}, ValueError, r"text_lens must be \[1\] integers"),
        ({"text_lens": torch.zeros(3).long()}, ValueError, "text_lens must be"),
        ({"image": torch.zeros(1, 5, 18)}, ValueError, r"image must be None: this model sees none; got \[1, 5, 18\]"),
    ],
)
def test_bad_input(change, error, message):
    latents, timesteps, text = torch.zeros(1, 4, 2, 4, 4), torch.zeros(1), torch.zeros(1, 3, 20)
    given = {"latents": latents, "timesteps": timesteps, "text": text}
    model = SoraDiT(DiTConfig.from_wan(TINY | {"num_layers": 1}))
    assert model(**given).shape == (1, 4, 2, 4, 4)
    with pytest.raises(error, match=message):
        model(**given | change)


@pytest.mark.parametrize(
    ("image", "tokens", "message"),
    [
        (None, None, r"image must be \[1, I, 18\]: this model sees one; got None"),
        (torch.zeros(1, 5, 17), None, r"image must be \[1, 5, 18\]; got \[1, 5, 17\]"),
        (torch.zeros(2, 5, 18), None, r"image must be \[1, 5, 18\]; got \[2, 5, 18\]"),
        (torch.zeros(5, 18), None, r"image must be \[1, I, 18\]; got \[5, 18\]"),
        (torch.zeros(1, 5, 18), 10, r"image must be \[1, 10, 18\]; got \[1, 5, 18\]"),
    ],
)
def test_bad_images(image, tokens, message):
    model = SoraDiT(DiTConfig.from_wan(TINY | IMAGE | {"num_layers": 1, "pos_embed_seq_len": tokens}))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1), torch.zeros(1, 3, 20), image=image)


# --- frame after frame ---


def streamed(model, x, times, text, chunks, **memory):
    """What the model makes of a clip's frames in chunks, each remembered."""
    held, parts, at = Memory(**memory), [], 0
    for frames in chunks:
        piece, t = x[:, :, at : at + frames], times[:, at : at + frames]
        again = model(piece, t, text, memory=held)
        parts.append(model(piece, t, text, memory=held, remember=True))
        assert torch.equal(again, parts[-1])
        at += frames
    return torch.cat(parts, 2), held


@pytest.fixture(scope="module")
def streaming():
    torch.manual_seed(0)
    model = SoraDiT(DiTConfig(dim=24, heads=2, layers=3, ffn_dim=32, in_channels=3, out_channels=3, text_dim=8))
    for name, p in model.named_parameters():
        if "head" in name or p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False), torch.randn(2, 3, 9, 4, 6), 1000 * torch.rand(2, 9), torch.randn(2, 4, 8)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("chunks", "memory"),
    [((1,) * 9, {"window": 9}), ((4, 5), {"window": 9}), ((2, 3, 4), {"window": 7, "sink": 2}), ((9,), {"window": 1})],
)
def test_a_clip_in_chunks_is_the_causal_clip(streaming, chunks, memory, impl):
    """While nothing is forgotten, whatever is kept as a sink."""
    model, x, times, text = streaming
    whole = model(x, times, text, attention=AttentionMode(causal="frame"), impl=impl)
    parts, held = streamed(lambda *a, **k: model(*a, impl=impl, **k), x, times, text, chunks, **memory)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5 * whole.abs().max().item())
    assert held.frames == 9


@pytest.mark.parametrize("sink", [0, 1, 2])
def test_what_is_forgotten_is_not_seen_and_the_sink_lies_just_before_the_window(streaming, sink):
    """The last frame, of one layer: as in a clip of nothing but the sink, the window and itself."""
    model, x, times, text = streaming
    shallow = SoraDiT(dataclasses.replace(model.config, layers=1)).requires_grad_(False)
    shallow.load_state_dict({name: value for name, value in model.state_dict().items() if name in shallow.state_dict()})
    parts, held = streamed(shallow, x, times, text, (1,) * 9, window=3, sink=sink)
    seen = [*range(sink), 5, 6, 7, 8]
    alone = shallow(x[:, :, seen], times[:, seen], text, attention=AttentionMode(causal="frame"))
    torch.testing.assert_close(parts[:, :, -1], alone[:, :, -1], rtol=0, atol=2e-5 * alone.abs().max().item())
    changed = x.clone()
    changed[:, :, sink:5] += 1
    other, _ = streamed(shallow, changed, times, text, (1,) * 9, window=3, sink=sink)
    assert torch.equal(other[:, :, -1], parts[:, :, -1])
    assert held.layer(0).keys.shape[1] == 3 * 6 and held.layer(0).sink_keys.shape[1] == sink * 6


def test_memory_does_not_grow(streaming):
    model, x, times, text = streaming
    held, sizes = Memory(window=3, sink=1), []
    for _ in range(40):
        model(x[:, :, :2], times[:, :2], text, memory=held, remember=True)
        sizes.append(held.layer(2).keys.untyped_storage().nbytes() + held.layer(2).values.untyped_storage().nbytes())
    assert held.frames == 80 and max(sizes[2:]) == sizes[-1] == sizes[2]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, *a: model(*a, remember=True), "remember needs a memory"),
        (lambda *_: Memory(window=0), "window must be a whole number from 1 to 1048576; got 0"),
        (lambda *_: Memory(window=1, sink=-1), "sink must be a whole number"),
    ],
)
def test_memories_that_cannot_be(streaming, call, said):
    model, x, times, text = streaming
    with pytest.raises(ValueError, match=said):
        call(model, x, times, text)
