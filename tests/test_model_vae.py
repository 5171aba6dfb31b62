"""CausalVAE against diffusers' AutoencoderKLWan, streaming against one shot, and bad input."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_model
from sora_kernels import Unavailable
from sora_kernels.testing import assert_matches_oracle
from sora_model.checkpoint import CheckpointError
from sora_model.vae import CausalVAE, VAECache, VAEConfig, _wan_state

TINY = VAEConfig(base_dim=4, z_dim=2, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True))
WAN22 = dict(
    num_res_blocks=1, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
    temperal_downsample=[False, True, True],
)  # fmt: skip
CASES = {  # config of AutoencoderKLWan; latent height and width; frames
    "Wan's shape": (dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1), (1, 3), 5),
    "an image": (dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1), (2, 1), 1),
    "two blocks, nine frames": (
        dict(base_dim=6, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=2, temperal_downsample=[True, True]), (3, 5), 9,
    ),
    "no time": (dict(base_dim=4, z_dim=2, dim_mult=[1, 3], num_res_blocks=1, temperal_downsample=[False]), (5, 3), 5),
    "a wider decoder": (
        dict(
            base_dim=4, decoder_base_dim=8, z_dim=5, dim_mult=[2, 1, 2], num_res_blocks=1,
            temperal_downsample=[True, True], in_channels=4, out_channels=4,
        ),
        (3, 2), 5,
    ),
    "Wan 2.2's shape": (dict(base_dim=4, decoder_base_dim=6, z_dim=6, dim_mult=[1, 2, 4, 4], **WAN22), (1, 3), 9),
    "Wan 2.2, an image": (dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], **WAN22), (2, 1), 1),
    "Wan 2.2, other widths": (
        WAN22 | dict(base_dim=6, z_dim=3, dim_mult=[1, 4, 2], temperal_downsample=[True, True], num_res_blocks=2),
        (3, 5), 5,
    ),
}  # fmt: skip


def wan(config, seed=0):
    """An AutoencoderKLWan with random weights, the gammas of its norms included."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    z_dim = config["z_dim"]
    statistics = {"latents_mean": [0.1 * i for i in range(z_dim)], "latents_std": [1.0 + i for i in range(z_dim)]}
    model = diffusers.AutoencoderKLWan(**{**statistics, **config}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    return model


def video_for(vae, latent_size, frames, batch=1, seed=0):
    s = vae.config.spatial_factor
    g = torch.Generator().manual_seed(seed)
    shape = (batch, vae.config.in_channels, frames, *(n * s for n in latent_size))
    return torch.rand(shape, generator=g) * 2 - 1


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return CausalVAE(TINY)


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return CausalVAE(dataclasses.replace(TINY, residual=True, patch=2, z_dim=3))


def close(actual, expected, tolerance=2e-5):
    """Equal up to the rounding of a deep fp32 network: a few hundred eps of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_patches_fold_pixels_into_channels_as_wan_22_does(tiny):
    """The layers see what diffusers' `patchify` makes of the frames, and the frames are its `unpatchify` of theirs."""
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, patch=2)
    vae = CausalVAE(config)
    inner = CausalVAE(dataclasses.replace(TINY, in_channels=12, out_channels=12))
    inner.load_state_dict(vae.state_dict())
    video = video_for(vae, (2, 3), 5)
    assert vae.config.spatial_factor == 8 and vae.config.latent_shape(5, 16, 24) == (2, 3, 2, 3)
    with torch.no_grad():
        mean, _ = vae.encode(video)
        assert torch.equal(mean, inner.encode(module.patchify(video, 2))[0])
        decoded = vae.decode(mean, clamp=False)
        assert torch.equal(decoded, module.unpatchify(inner.decode(mean, clamp=False), 2))
        close(torch.cat(list(vae.decode_stream(mean, clamp=False)), 2), decoded)
    with pytest.raises(ValueError, match="VAEConfig: patch must be a whole number from 1 to 16; got 0"):
        dataclasses.replace(TINY, patch=0)
    with pytest.raises(ValueError, match="height of a video must be a multiple of 8; got 12"):
        vae.encode(video[..., :12, :])


def run(model, video):
    """Posterior, reconstruction and all gradients, those of the parameters under their names in CausalVAE."""
    x = video.clone().requires_grad_()
    model.zero_grad()
    if isinstance(model, CausalVAE):
        mean, logvar = model.encode(x)
        decoded = model.decode(mean)
    else:
        posterior = model.encode(x).latent_dist
        mean, logvar, decoded = posterior.mean, posterior.logvar, model.decode(posterior.mean).sample
    (decoded.sin().sum() + mean.sin().sum() + logvar.sin().sum()).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"mean": mean, "logvar": logvar, "decoded": decoded, "grad video": x.grad}, grads


@pytest.mark.parametrize("case", CASES)
def test_same_function_as_diffusers(case, monkeypatch):
    """Encode, decode and every gradient: the same in fp64, and at rounding level in fp32."""
    config, size, frames = CASES[case]
    theirs = wan(config)
    ours = CausalVAE.from_wan(theirs)
    video = video_for(ours, size, frames)
    shapes = {name: value.shape for name, value in ours.named_parameters()}
    actual, baseline = run(ours, video), run(theirs, video)
    double = CausalVAE.from_wan(theirs.double())
    double = run(double, video.double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # diffusers upsamples in fp32, fp64 or not
    oracle = run(theirs, video.double())
    widest = 27 * max(shape[0] for shape in shapes.values())  # how many values an element of the last layers sums
    for name, value in oracle[0].items():
        close(double[0][name], value, 1e-12)
        if name != "grad video":
            assert_matches_oracle(actual[0][name], value, baseline[0][name], name, terms=widest)
    # which gradient of norms of four channels errs most is luck: diffusers' own reach 400 eps over a few seeds
    expected = _wan_state(oracle[1], shapes) | {"video": oracle[0]["grad video"]}
    for results, tolerance in ((double, 1e-11), (actual, 1024 * torch.finfo(torch.float32).eps)):
        grads = results[1] | {"video": results[0]["grad video"]}
        assert grads.keys() == expected.keys()
        for name, value in expected.items():
            close(grads[name].double(), value, tolerance)


def test_clamped_like_diffusers():
    theirs = wan(CASES["no time"][0])
    ours = CausalVAE.from_wan(theirs)
    with torch.no_grad():
        for model in (theirs.decoder, ours.decoder):
            model.conv_out.weight.mul_(30)
        latents = torch.randn(1, 2, 2, 3, 3)
        close(ours.decode(latents), theirs.decode(latents).sample)
        free = ours.decode(latents, clamp=False)
    assert ours.decode(latents).abs().max() == 1 and free.abs().max() > 1
    assert torch.equal(free.clamp(-1, 1), ours.decode(latents))


def test_from_a_directory(tmp_path):
    theirs = wan(CASES["two blocks, nine frames"][0])
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = CausalVAE.from_wan(theirs)
    for folder in ("one", "shards"):
        vae = CausalVAE.from_wan(tmp_path / folder)
        assert vae.config == expected.config
        assert vae.config.latents_std == (1.0, 2.0, 3.0)
        for (name, a), b in zip(vae.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    theirs.double().quant_conv.weight.data.add_(1e-12)
    assert torch.equal(CausalVAE.from_wan(theirs).quant_conv.weight, theirs.quant_conv.weight), "fp64 stays fp64"
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in CausalVAE.from_wan(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_defaults_are_those_of_wan():
    """127 million parameters, of which 53.6 in the encoder, and every name and shape of a Wan 2.1 checkpoint."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs, ours = diffusers.AutoencoderKLWan(), CausalVAE()
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    state = _wan_state(theirs.state_dict(), shapes)
    assert {name: value.shape for name, value in state.items()} == shapes
    assert sum(p.numel() for p in ours.parameters()) == 126_892_531
    assert ours.config.spatial_factor == 8 and ours.config.temporal_factor == 4


def test_the_size_of_wan_22():
    """705 million parameters, and every name and shape."""
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(base_dim=160, decoder_base_dim=256, z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**sizes, **WAN22 | dict(num_res_blocks=2))
        ours = CausalVAE(VAEConfig(base_dim=160, decoder_base_dim=256, z_dim=48, residual=True, patch=2))
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    state = _wan_state(theirs.state_dict(), shapes)
    assert {name: value.shape for name, value in state.items()} == shapes
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6) == 705
    assert ours.config.spatial_factor == 16 and ours.config.latent_shape(121, 704, 1280) == (48, 31, 44, 80)


ORIGINAL = {  # how Wan's own files name the layers of a residual block and of the ends
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
    "conv_shortcut": "shortcut", "conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2",
    "quant_conv": "conv1", "post_quant_conv": "conv2",
}  # fmt: skip


def original(name, nested):
    """The name in Wan's own files of a tensor of an AutoencoderKLWan; `nested`: as 2.2 has its levels."""
    parts = [ORIGINAL.get(part, part) for part in name.split(".")]
    name = ".".join(parts)
    for theirs, own in (("resnets.0", "middle.0"), ("attentions.0", "middle.1"), ("resnets.1", "middle.2")):
        name = name.replace(f"mid_block.{theirs}", own)

    def placed(match):
        kind, level, layer, place = match[1], int(match[2]), match[3], int(match[4] or 0)
        place += 0 if layer == "resnets" else {"down": 2, "up": 3}[kind]
        return f"{kind}samples.{level}.{kind}samples.{place}" if nested else f"{kind}samples.{4 * level + place}"

    name = re.sub(r"(down|up)_blocks\.(\d+)\.(resnets|\w+samplers?)(?:\.(\d+)(?=\.))?", placed, name)
    return name.replace("down_blocks", "downsamples")


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_wans_own_file_is_the_same_vae(version, tmp_path):
    """Also in what the file does not say: the statistics of the latents, by diffusers' defaults for 2.1."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    config = dict(base_dim=4, num_res_blocks=2)
    if version == "2.2":
        config = WAN22 | config | dict(z_dim=48, decoder_base_dim=6, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**config)
    state = {original(name, version == "2.2"): value for name, value in theirs.state_dict().items()}
    assert len(state) == len(theirs.state_dict())
    if version == "2.1":
        assert convert_wan_vae_to_diffusers(dict(state)).keys() == theirs.state_dict().keys()
    save_file(state, tmp_path / "vae.safetensors")
    ours, expected = CausalVAE.from_wan(tmp_path / "vae.safetensors"), CausalVAE.from_wan(theirs)
    statistics = dict(latents_mean=ours.config.latents_mean, latents_std=ours.config.latents_std)
    assert ours.config == (expected.config if version == "2.1" else dataclasses.replace(expected.config, **statistics))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in ours.state_dict().items())
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors holds no VAE of Wan: 'encoder.conv_in.weight' is"):
        CausalVAE.from_wan(tmp_path / "other.safetensors")


@pytest.mark.parametrize("form", ["tiny", "residual"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_streams_equal_one_shot(form, chunk, request):
    tiny = request.getfixturevalue(form)
    video = video_for(tiny, (3, 2), 13, batch=2)
    with torch.no_grad():
        mean, logvar = tiny.encode(video)
        encoded = list(tiny.encode_stream(video, chunk=chunk))
        frames = list(tiny.decode_stream(mean, chunk=chunk))
        whole = tiny.decode(mean)
    latent_frames = 7  # 1 + 12 / 2
    sizes = [min(chunk, latent_frames - start) for start in range(0, latent_frames, chunk)]
    assert [m.shape[2] for m, _ in encoded] == sizes
    assert [f.shape[2] for f in frames] == [2 * n - (i == 0) for i, n in enumerate(sizes)]
    close(torch.cat([m for m, _ in encoded], 2), mean)
    close(torch.cat([v for _, v in encoded], 2), logvar)
    close(torch.cat(frames, 2), whole)


def test_a_stream_takes_pieces_of_any_length(tiny):
    video = video_for(tiny, (2, 3), 9)
    with torch.no_grad():
        mean, _ = tiny.encode(video)
        from_frames = torch.cat([m for m, _ in tiny.encode_stream(video.split(1, 2))], 2)
        from_pieces = torch.cat([m for m, _ in tiny.encode_stream(video.split([4, 2, 3], 2))], 2)
        decoded = torch.cat(list(tiny.decode_stream(mean.split([2, 3], 2))), 2)
        close(decoded, tiny.decode(mean))
    assert torch.equal(from_frames, from_pieces)
    close(from_frames, mean)


def test_the_cache_is_the_only_state(tiny):
    """Two clips, interleaved; a chunk decoded twice from the same cache; a clip left and taken up again."""
    latents = torch.randn(2, 1, 2, 4, 2, 3)
    with torch.no_grad():
        alone = [list(tiny.decode_stream(z)) for z in latents]
        caches = [None, None]
        for i in range(4):
            for clip in (0, 1):
                before = caches[clip]
                frames, caches[clip] = tiny.decode_chunk(latents[clip][:, :, i : i + 1], before)
                again, _ = tiny.decode_chunk(latents[clip][:, :, i : i + 1], before)
                assert torch.equal(frames, alone[clip][i]) and torch.equal(frames, again)
        _, cache = tiny.decode_chunk(latents[0][:, :, :2])
        resumed = list(tiny.decode_stream(latents[0][:, :, 2:], cache))
    for a, b in zip(resumed, alone[0][2:], strict=True):
        close(a, b)


def test_the_cache_does_not_grow(tiny):
    def size(cache):
        return sum(t.untyped_storage().nbytes() for t in cache.tensors)

    with torch.no_grad():
        _, first = tiny.decode_chunk(torch.randn(1, 2, 1, 2, 2))
        _, later = tiny.decode_chunk(torch.randn(1, 2, 5, 2, 2), first)
        _, last = tiny.decode_chunk(torch.randn(1, 2, 1, 2, 2), later)
    assert size(first) == size(later) == size(last)


def test_later_frames_do_not_touch_earlier_ones(tiny):
    video = video_for(tiny, (2, 2), 9)
    changed = video.clone()
    changed[:, :, 5:] = -changed[:, :, 5:]
    with torch.no_grad():
        (a, _), (b, _) = tiny.encode(video), tiny.encode(changed)
        assert torch.equal(a[:, :, :3], b[:, :, :3]) and not torch.equal(a[:, :, 3], b[:, :, 3])
        close(tiny.encode(video[:, :, :1])[0], a[:, :, :1])
        c, d = tiny.decode(a), tiny.decode(b)
        assert torch.equal(c[:, :, :5], d[:, :, :5]) and not torch.equal(c[:, :, 5], d[:, :, 5])


@pytest.mark.parametrize("form", ["tiny", "residual"])
def test_gradients_through_a_stream(form, request):
    tiny = request.getfixturevalue(form)
    latents = torch.randn(1, tiny.config.z_dim, 3, 2, 3)

    def grads(decode):
        z = latents.clone().requires_grad_()
        tiny.zero_grad()
        decode(z).sin().sum().backward()
        return z.grad, tiny.decoder.up_blocks[0].upsampler.time_conv.weight.grad, tiny.decoder.conv_in.weight.grad

    for streamed, whole in zip(
        grads(lambda z: torch.cat(list(tiny.decode_stream(z)), 2)), grads(tiny.decode), strict=True
    ):
        close(streamed, whole, 2e-4)


def test_training_reaches_every_parameter(tiny):
    video = video_for(tiny, (2, 2), 5, batch=2)
    tiny.zero_grad()
    recon, mean, logvar = tiny(video)
    ((recon - video).square().mean() + (mean.square() + logvar.exp() - logvar).mean()).backward()
    assert [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_forward_draws_from_the_posterior(tiny):
    video = video_for(tiny, (2, 2), 5)
    with torch.no_grad():
        mean, logvar = tiny.encode(video)
        recon, same_mean, _ = tiny(video, sample=False)
        assert torch.equal(same_mean, mean)
        assert torch.equal(recon, tiny.decode(mean, clamp=False))
        g = torch.Generator().manual_seed(3)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        drawn = tiny(video, generator=g)[0]
        assert torch.equal(drawn, tiny.decode(mean + (0.5 * logvar).exp() * noise, clamp=False))


def test_latent_statistics():
    vae = CausalVAE(dataclasses.replace(TINY, latents_mean=(1.0, -2.0), latents_std=(0.5, 4.0)))
    z = torch.randn(2, 2, 3, 1, 1)
    expected = (z - torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)) / torch.tensor([0.5, 4.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(vae.normalize(z), expected)
    torch.testing.assert_close(vae.denormalize(vae.normalize(z)), z)
    vae.set_latent_statistics((0.0, 0.0), torch.tensor([2.0, 2.0]))
    assert vae.config.latents_std == (2.0, 2.0)
    torch.testing.assert_close(vae.normalize(z), z / 2)
    assert not any("latents" in name for name in vae.state_dict()), "the config holds them"


def test_config_round_trip():
    config = dataclasses.replace(TINY, latents_mean=(0.1, 0.2), latents_std=(1.5, 1e-3))
    assert VAEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_reference_and_auto_agree(tiny):
    video = video_for(tiny, (2, 3), 5)
    reference = CausalVAE(TINY, impl="reference")
    reference.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        close(tiny.encode(video)[0], reference.encode(video)[0])
        latents = tiny.encode(video)[0]
        close(tiny.decode(latents), reference.decode(latents))
    with pytest.raises(Unavailable, match="cuda"):
        CausalVAE(TINY, impl="cuda").decode(latents)


def test_the_shipped_checkpoint_decodes_alike_in_every_implementation():
    folder = pathlib.Path(sora_model.__file__).parent / "checkpoints" / "toy" / "vae"
    config = VAEConfig(**json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    latents = torch.randn(1, config.z_dim, 3, 4, 6)
    decoded = {}
    for impl in ("auto", "reference"):
        vae = CausalVAE(config, impl=impl)
        vae.load_state_dict(state)
        with torch.no_grad():
            decoded[impl] = vae.decode(latents, clamp=False)
            close(torch.cat(list(vae.decode_stream(latents, clamp=False)), 2), decoded[impl])
    close(decoded["auto"], decoded["reference"])


def test_half_precision(tiny):
    video = video_for(tiny, (2, 2), 5)
    half = CausalVAE(TINY).to(torch.bfloat16)
    half.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        expected = tiny(video, sample=False)[0]
        actual = half(video.bfloat16(), sample=False)[0]
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


Z = torch.zeros(1, 2, 3, 2, 2)
BAD = {
    "frames": (lambda v: v.encode(torch.zeros(1, 3, 6, 8, 8)), r"2n\+1 frames; got 6; 5 or 7 would fit"),
    "height": (lambda v: v.encode(torch.zeros(1, 3, 5, 6, 8)), "height.*multiple of 4; got 6; 4 or 8 would fit"),
    "width": (lambda v: v.encode(torch.zeros(1, 3, 5, 8, 3)), "width.*multiple of 4; got 3; 4 would fit"),
    "channels": (lambda v: v.encode(torch.zeros(1, 4, 5, 8, 8)), r"video must be a tensor \[B, 3, T, H, W\].*4, 5"),
    "rank": (lambda v: v.encode(torch.zeros(3, 5, 8, 8)), r"video must be a tensor \[B, 3, T, H, W\]"),
    "not a tensor": (lambda v: v.decode([1, 2]), "latents must be a tensor.*got list"),
    "no frames": (lambda v: v.decode(Z[:, :, :0]), "none of them 0"),
    "latent channels": (lambda v: v.decode(torch.zeros(1, 3, 1, 2, 2)), r"latents must be a tensor \[B, 2, T, H, W\]"),
    "dtype": (lambda v: v.decode(Z.double()), r"latents must be torch.float32.*got torch.float64"),
    "device": (lambda v: v.decode(Z.to("meta")), "latents must be torch.float32 on cpu.*on meta"),
    "a later chunk": (
        lambda v: v.encode_chunk(torch.zeros(1, 3, 3, 8, 8), v.encode_chunk(torch.zeros(1, 3, 1, 8, 8))[2]),
        "a multiple of 2 frames; got 3",
    ),
    "a stream's end": (lambda v: list(v.encode_stream(torch.zeros(1, 3, 4, 8, 8))), "a multiple of 2 frames; got 1"),
    "chunk 0": (lambda v: list(v.decode_stream(Z, chunk=0)), "chunk must be at least 1"),
    "cache of the encoder": (
        lambda v: v.decode_chunk(Z, v.encode_chunk(torch.zeros(1, 3, 1, 8, 8))[2]), "got that of encode_chunk",
    ),
    "cache a list": (lambda v: v.decode_chunk(Z, [Z]), "VAECache.*got list"),
    "cache of another size": (
        lambda v: v.decode_chunk(torch.zeros(1, 2, 1, 3, 3), v.decode_chunk(Z)[1]),
        r"had the batch, height and width \[1, 2, 2\], this one has \[1, 3, 3\]; a clip keeps its size",
    ),
    "widths": (lambda v: VAEConfig(base_dim=0), "base_dim must be a whole number from 1 to 4096; got 0"),
    "absurd widths": (lambda v: VAEConfig(base_dim=10**9), "from 1 to 4096; got 1000000000"),
    "absurd sizes": (lambda v: VAEConfig(base_dim=4000), "no VAE has .* parameters; give smaller sizes"),
    "half a channel": (lambda v: VAEConfig(z_dim=1.5), "z_dim must be a whole number.*got 1.5"),
    "levels": (lambda v: VAEConfig(dim_mult=(1, 2)), r"temporal_downsample must be 1 booleans"),
    "factors": (lambda v: VAEConfig(temporal_downsample=(1, 2, 3)), "3 booleans"),
    "odd widths": (lambda v: VAEConfig(base_dim=3, dim_mult=(1, 1), temporal_downsample=(True,)), "must be even"),
    "levels of a shortcut": (
        lambda v: VAEConfig(residual=True, dim_mult=(1, 2, 3, 4)), r"must divide each other, .* got dim_mult=\(1, 2, 3",
    ),
    "statistics": (lambda v: VAEConfig(latents_mean=(1.0,)), "latents_mean must be 16 numbers"),
    "std": (lambda v: v.set_latent_statistics(None, (1.0, 0.0)), "latents_std must be a number from 1e-10"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tiny, case):
    call, message = BAD[case]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(tiny)


def test_the_cache_is_its_kind_and_tensors(tiny):
    with torch.no_grad():
        _, cache = tiny.decode_chunk(Z)
    assert isinstance(cache, VAECache) and cache.kind == "decode"
    assert all(not t.requires_grad for t in cache.tensors)


def test_checkpoints_of_something_else(tmp_path):
    config = CASES["no time"][0]
    theirs = wan(config)

    def saved(name, **changes):
        folder = tmp_path / name
        theirs.save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))
        return folder

    for name, changes, message in (
        ("residual", {"is_residual": True, "dim_mult": [1, 1]}, "lacks .* of the .* expected tensors"),
        ("residual levels", {"is_residual": True}, "levels must divide each other"),
        ("nonsense for a flag", {"is_residual": "yes"}, "residual must be true or false; got 'yes'"),
        ("patches", {"patch_size": 2}, "in_channels must be a multiple of 4, patches of 2 pixels a side; got 3"),
        ("nonsense for a patch", {"patch_size": "2"}, "patch must be a whole number from 1 to 16; got '2'"),
        ("attention", {"attn_scales": [0.5]}, "attn_scales"),
        ("other", {"_class_name": "AutoencoderKL"}, "is a AutoencoderKL; .* takes an AutoencoderKLWan"),
        ("unknown", {"clip_output": True}, "clip_output=True is no field of a AutoencoderKLWan"),
        ("wider", {"base_dim": 8}, "should have the shape"),
        ("deeper", {"num_res_blocks": 2}, "lacks .* of the"),
        ("nonsense", {"dim_mult": "wide"}, "does not describe a VAEConfig"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CausalVAE.from_wan(saved(name, **changes))
    folder = saved("truncated")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        CausalVAE.from_wan(folder)
    with pytest.raises(CheckpointError, match="pickle"):
        CausalVAE.from_wan(tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match="is not a folder"):
        CausalVAE.from_wan(tmp_path / "missing")
    own = type("OwnVAE", (type(theirs),), {"_decode": lambda self, z, return_dict=True: z})
    theirs.__class__ = own
    with pytest.raises(CheckpointError, match="is a OwnVAE, which has a _decode of its own"):
        CausalVAE.from_wan(theirs)
    with pytest.raises(CheckpointError, match="is a Linear"):
        CausalVAE.from_wan(torch.nn.Linear(2, 2))
