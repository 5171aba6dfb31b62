"""Training of a checkpoint on the procedural world: first the VAE, then the transformer with its text encoder.

    sora train vae --run out/train/vae
    sora train dit --run out/train/dit --vae out/train/vae --checkpoint out/toy

What both depend on is a `Recipe`. Clips are drawn, rendered and coded as they are needed, each step's from the seed and
the step alone: no clip comes twice, and a run that was stopped goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks, files, flow, world
from .attention import AttentionMode
from .checkpoint import check_fits, fingerprint, load_into, read_json, read_part, write_json, write_tensors
from .conditioning import Known, draw_mask, token_times
from .dit import SoraDiT
from .fit import fit
from .frames import to_video
from .machine import choose_device
from .pipeline import Sora
from .ranks import Ranks, told_of_loss
from .recipe import Recipe
from .safety import credentials
from .steps import generator_of, read_log
from .text import WordTextConfig, WordTextEncoder
from .vae import AttentionBlock, CausalVAE, Decoder, Downsample, Encoder, ResidualBlock, Upsample, VAEConfig
from .world.data import Bucket, WorldData
from .world.render import paint

_VALIDATION_SEED = 10**12
_DECODING = "post_quant_conv", "decoder"


def vae_batch(recipe: Recipe, step: int) -> Tensor:
    """Videos of a VAE training step: uint8 `[B, T, H, W, 3]`.

    Of one frame for the first tenth of the steps and then of 5 or 9, from anywhere in the first six seconds of a clip.
    Three in four batches are windows of half the height and width around a thing, from four times as many clips: there
    is what has to be learnt.
    """
    settings = recipe.vae_fit
    generator = generator_of(settings.seed, step)
    narrow, long = (torch.rand(2, generator=generator) < torch.tensor([0.75, 0.3])).tolist()
    frames = 1 if step < settings.steps // 10 else recipe.vae.fitting(9 if long else 5)
    data = WorldData(settings.batch * (4 if narrow else 1), recipe.buckets, recipe.scenes, settings.seed)
    bucket = data.bucket(step)
    starts = (6 * torch.rand(data.batch, generator=generator)).tolist()
    videos = []
    for start, (seed, _, kind) in zip(starts, data.drawn(step, data.batch), strict=True):
        scene = world.draw(seed, scene=kind, aspect=bucket.size[1] / bucket.size[0])
        state = scene.state(start + np.arange(frames) / bucket.fps)
        video = paint(scene, state, bucket.size)
        if narrow:
            window = np.array(bucket.size) // 2
            things = state.position[frames // 2] * min(bucket.size)
            thing = things[int(torch.randint(len(things), (), generator=generator))][::-1]
            shift = torch.randint(-10, 11, (2,), generator=generator).numpy()
            y, x = np.clip(np.rint(thing - window / 2).astype(int) + shift, 0, np.array(bucket.size) - window)
            video = video[:, y : y + window[0], x : x + window[1]]
        videos.append(video)
    return torch.from_numpy(np.stack(videos))


@torch.no_grad()
def start_direct(vae: CausalVAE) -> None:
    """Initialises a VAE so that a coarse picture passes straight through it.

    Every convolution on the way starts as an orthogonal map of the channels at the newest frame and the centre
    pixel, one over time as the identity (a clip's first frame goes around those), plus 0.3 of the default noise;
    every branch beside the way starts small. After 150 steps this is worth 7 dB over the default. The posterior
    starts narrow, lest the decoder must first learn through noise.
    """
    for module in vae.modules():
        way: list[nn.Conv3d | None] = []
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(0.1)
            module.conv2.bias.zero_()
            way = [module.conv_shortcut]
        elif isinstance(module, AttentionBlock):
            module.proj.weight.mul_(0.1)
        elif isinstance(module, Downsample | Upsample):
            way = [module.resample, module.time_conv]
        elif isinstance(module, Encoder | Decoder):
            way = [module.conv_in, module.conv_out]
        elif isinstance(module, CausalVAE):
            way = [module.quant_conv, module.post_quant_conv]
        for conv in filter(None, way):
            out_channels, in_channels, _, height, width = conv.weight.shape
            if (height, width) == (1, 1) and conv.kernel_size[0] > 1:
                mix = torch.eye(in_channels).repeat(out_channels // in_channels, 1)
            else:
                mix = nn.init.orthogonal_(torch.empty(out_channels, in_channels))
            conv.weight.mul_(0.3)[:, :, -1, height // 2, width // 2] += mix.to(conv.weight)
            conv.bias.zero_()
    vae.quant_conv.bias[vae.config.z_dim :] = -8


def train_vae(
    run: str | Path,
    recipe: Recipe,
    *,
    start: CausalVAE | None = None,
    decoder: bool = False,
    measured: int = 64,
    device: str | torch.device = "cpu",
    impl: str = "auto",
) -> CausalVAE:
    """Trains the VAE on clips of the world: L1 + MSE on pixels in [-1, 1] and 1e-6 of the KL divergence.

    Then takes the mean and standard deviation of each latent channel over `measured` other clips, and writes
    `run/model.safetensors` and `run/config.json`.

    start    weights to begin with instead of random ones, of the same sizes
    decoder  trains what decodes alone: latents and their statistics stay those of `start`, and so does whatever a
             transformer has learnt of them
    """
    if decoder and start is None:
        raise ValueError("the decoder alone is trained for the latents of a given VAE; give one by start= (--start)")
    device, settings = choose_device(device), recipe.vae_fit
    torch.manual_seed(settings.seed)
    vae = CausalVAE(recipe.vae, impl=impl).to(device, torch.float32)
    if start is None:
        start_direct(vae)
    else:
        load_into(vae, start.state_dict(), "start")
    trained: nn.Module = vae
    if decoder:
        vae.set_latent_statistics(start.config.latents_mean, start.config.latents_std)
        trained = nn.ModuleDict({name: getattr(vae.requires_grad_(False), name) for name in _DECODING})
        trained.requires_grad_(True)

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        video = vae_batch(recipe, step)
        latents = (len(video), *vae.config.latent_shape(*video.shape[1:4]))
        return video, flow.draw_noise(latents, generator=generator_of(settings.seed + 1, step))

    def loss_of(video: Tensor, noise: Tensor) -> Tensor:
        video, noise = to_video(video.to(device)), noise.to(device)
        mean, logvar = vae.encode(video)
        error = vae.decode(mean + torch.exp(0.5 * logvar) * noise, clamp=False) - video
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 1e-6 * divergence

    made_with = {
        "recipe": recipe.only("vae", "buckets", "scenes"),
        "start": start and fingerprint(start),
        "decoder": decoder,
    }
    weights = fit(trained, batch_at, loss_of, settings, run, label="VAE", made_with=made_with)
    load_into(trained, weights, str(run))
    if Ranks().rank:  # the first of several processes writes
        return vae.eval()
    if not decoder:
        seeds = range(_VALIDATION_SEED, _VALIDATION_SEED + measured)
        vae.set_latent_statistics(*latent_statistics(vae, recipe.buckets[0], seeds))
    write_tensors(Path(run) / "model.safetensors", vae.state_dict())
    write_json(Path(run) / "config.json", dataclasses.asdict(vae.config))
    return vae.eval()


@torch.no_grad()
def latent_statistics(vae: CausalVAE, bucket: Bucket, seeds: range) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents of the world's clips with these seeds."""
    device, sums = next(vae.parameters()).device, []
    for seed in seeds:
        clip = world.sample(seed, frames=bucket.frames, size=bucket.size, fps=bucket.fps)
        z = vae.encode(to_video(clip.video[None]).to(device))[0].double()
        sums.append(torch.stack([z.mean((0, 2, 3, 4)), z.square().mean((0, 2, 3, 4))]))
    mean, square = torch.stack(sums).mean(0)
    return mean.tolist(), (square - mean.square()).sqrt().tolist()


def load_vae(run: str | Path) -> CausalVAE:
    """The VAE that `train_vae` wrote."""
    return read_part(Path(run), CausalVAE, VAEConfig)


def train_dit(
    run: str | Path,
    vae: CausalVAE,
    recipe: Recipe,
    *,
    start: tuple[SoraDiT, WordTextEncoder] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    shard: bool = False,
    cp: int = 1,
    accumulate: int = 1,
    impl: str = "auto",
    on_save: Callable[[SoraDiT, WordTextEncoder, int], None] | None = None,
) -> tuple[SoraDiT, WordTextEncoder]:
    """Trains the transformer and its text encoder on the latents of the world's clips.

    Loss: mean square error of the velocity, where the clip is not known beforehand, at logit-normal times. Each clip
    of a batch is used `recipe.draws` times, with other noise, times and known cells (`conditioning.draw_mask`); in a
    share `recipe.apart` each frame has a time of its own, and in a share `recipe.causal` of the steps frames see
    earlier ones only, so that the same weights make a clip at once or go on frame by frame. A tenth of the captions is
    dropped and 3 % of the words are forgotten.

    start          weights to begin with instead of random ones, of the same sizes
    dtype          in which the transformer and Muon compute; parameters, their average and the optimiser stay in fp32
    checkpointing  less memory for more work, as `SoraDiT` has it
    shard          divides weights and optimiser among the processes of the run (`sharded.fit`); so do the next two
    cp             processes that share the tokens of a clip
    accumulate     parts that a process works off its clips in: less memory
    Every save also calls `on_save(dit, text, step)` with the averaged weights. Of several processes (`fit`) the first
    alone saves and returns these; the others return the weights of the last step.
    """
    run, device, settings = Path(run), choose_device(device), recipe.dit_fit
    asked = {"checkpointing": checkpointing, "shard": shard, "cp": cp, "accumulate": accumulate}
    asked |= {f"dit.{name}": value for name, value in dataclasses.asdict(recipe.dit).items()}
    with told_of_loss("before the first step"):  # they would wait for each other in meshes of other sizes
        Ranks().agree({"what is trained": "DiT"} | asked)
    if device.type != "cpu" or dtype != torch.float32 or checkpointing:  # a GPU needs one thread, functional calls too
        settings = dataclasses.replace(settings, workers=1)
    vae = vae.to(device).requires_grad_(False)

    def make() -> nn.ModuleDict:
        torch.manual_seed(settings.seed)
        words = WordTextConfig(words=world.VOCABULARY, dim=recipe.dit.text_dim, **recipe.text)
        model = nn.ModuleDict({"dit": SoraDiT(recipe.dit, checkpointing=checkpointing), "text": WordTextEncoder(words)})
        for embedding in (model["dit"].text_embedding, model["dit"].time_embedding):
            for layer in (embedding[0], embedding[2]):
                nn.init.xavier_uniform_(layer.weight)
        return model

    mesh, begun = None, dict(zip(("dit", "text"), start or (), strict=False))
    if shard or (cp, accumulate) != (1, 1):
        from . import deferred, parallel, sharded  # they take seconds to import

        checks.whole("cp", cp, 1, 2**20)
        checks.whole("accumulate", accumulate, 1, 2**20)
        mesh = sharded.mesh_of(device, cp, recipe.dit.heads)
        model, values = deferred.build(make)
    else:
        model = make()
    for name, part in begun.items():
        (load_into if mesh is None else check_fits)(model[name], part.state_dict(), f"start: {name}")
    if mesh is None:
        model.to(device, torch.float32)
    else:
        given = {f"{name}.{key}": value for name, part in begun.items() for key, value in part.named_parameters()}
        values |= {name: partial(value.detach().to, torch.float32) for name, value in given.items()}
        sharded.shard(model["dit"], model["text"], device=device, dtype=dtype)
        deferred.fill(model, values, device)
    data = WorldData(settings.batch, recipe.buckets, recipe.scenes, settings.seed)
    patch, draws, kinds = recipe.dit.patch, recipe.draws, {name: type(part) for name, part in model.items()}

    def batch_at(step: int) -> tuple[Tensor, ...]:
        """Of B clips: uint8 videos, and of each draw the tokens of a caption, noise, times and what is known."""
        generator = generator_of(settings.seed, step)
        video, captions, _ = data.at(step)
        B, latents = len(video), vae.config.latent_shape(*video.shape[1:4])
        ids = model["text"].tokenize([caption for caption in captions for _ in range(draws)])
        ids = model["text"].forget(ids, words=0.03, prompts=0.1, generator=generator)
        noise = flow.draw_noise((B, draws, *latents), generator=generator)
        times = flow.sample_times(B * draws * latents[1], generator=generator, shift=recipe.shift)
        times = times.view(B, draws, latents[1])
        apart = torch.rand(B, draws, 1, generator=generator) < recipe.apart
        times = torch.where(apart, times, times[..., :1])
        grid = tuple(n // p for n, p in zip(latents[1:], patch, strict=True))
        masks = torch.stack([draw_mask(grid, generator=generator) for _ in range(B * draws)])
        causal = torch.rand((), generator=generator) < recipe.causal
        return video, ids.view(B, draws, -1), noise, times, masks.view(B, draws, *grid), causal.expand(B)

    def loss_of(video: Tensor, ids: Tensor, noise: Tensor, t: Tensor, tokens: Tensor, causal: Tensor) -> Tensor:
        with torch.no_grad():
            x0 = vae.normalize(vae.encode(to_video(video.to(device)))[0])
        x0 = x0.repeat_interleave(draws, 0)
        ids, noise, t, mask = (value.to(device).flatten(0, 1) for value in (ids, noise, t, tokens))
        for axis, size in enumerate(patch, 1):
            mask = mask.repeat_interleave(size, axis)
        mask = mask[:, None]  # [N, 1, T', H', W']
        x = Known(x0, mask).hold(flow.interpolate(x0, noise, t))
        text, lens = model["text"](ids)
        mode = AttentionMode(causal="frame") if causal[0] else None
        inputs = x.to(dtype), flow.TIME_SCALE * token_times(t, mask, patch), text.to(dtype), lens
        dit, how = model["dit"], {"attention": mode, "impl": impl}
        with parallel.over(dit, mesh["ring", "ulysses"]) if cp > 1 else nullcontext():
            if mesh is not None or dtype == torch.float32:
                v = dit(*inputs, **how)
            else:
                v = functional_call(dit, dit.weights_in(dtype), inputs, how)
        error = (v.float() - flow.velocity_target(x0, noise)).square().masked_fill(mask, 0)
        drawn = (~mask).flatten(1).sum(1) * x0.shape[1]
        return (error.flatten(1).sum(1) / drawn).mean()

    def save(step: int, weights: dict[str, Tensor]) -> None:
        for name in ("dit", "text"):
            copy = kinds[name](model[name].config)
            begins = f"{name}."
            mine = {key.removeprefix(begins): value for key, value in weights.items() if key.startswith(begins)}
            load_into(copy, mine, str(run))
            kept[name] = copy.eval().to(device)  # where the VAE is, with which `on_save` may generate
        if on_save is not None:
            on_save(kept["dit"], kept["text"], step)

    kept: dict[str, nn.Module] = {}
    names = ("dit", "text", "buckets", "scenes", "draws", "causal", "apart", "shift")
    made_with = {
        "recipe": recipe.only(*names),
        "vae": fingerprint(vae),
        "start": [fingerprint(part) for part in start or ()],
        "dtype": str(dtype),
    }
    matrices = [name for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2]
    how = dict(label="DiT", matrices=matrices, dtype=dtype, made_with=made_with, on_save=save)
    if mesh is None:
        fit(model, batch_at, loss_of, settings, run, **how)
    else:
        sharded.fit(model, batch_at, loss_of, settings, run, mesh=mesh, accumulate=accumulate, **how)
    return kept.get("dit", model["dit"]), kept.get("text", model["text"])


def write_sheet(path: str | Path, sora: Sora, prompts: Sequence[str], *, impl: str = "auto") -> None:
    """A PNG, signed, of what the model makes of prompts, a row each, of every fourth frame; 10 steps, seed 0."""
    from PIL import Image

    clips = [sora.generate(prompt, steps=10, impl=impl).frames[::4] for prompt in prompts]
    rows = [np.concatenate(list(frames), axis=1) for frames in clips]
    files.make_folder(Path(path).parent)
    with files.write_atomically(path) as part:
        seal = credentials.sealer(Path(path).name, "image/png")
        with files.naming(path):
            Image.fromarray(np.concatenate(rows)).save(part, format="PNG")
        if seal is not None:
            seal(part, credentials.Origin.of(sora.folder, prompt="\n".join(prompts), seed=0, steps=10))


def write_record(folder: str | Path, *, vae: str | Path, dit: str | Path, command: list[str], step: int) -> None:
    """Writes how a checkpoint was trained beside it: `training.json`, both logs, and the loss curves if matplotlib
    is there."""
    folder = Path(folder)
    files.make_folder(folder)
    record: dict[str, Any] = {"command": command, "step": step, "torch": torch.__version__, "threads": os.cpu_count()}
    curves = {}
    for name, run in (("vae", Path(vae)), ("dit", Path(dit))):
        if not (run / "settings.json").exists():  # weights of which no run is there
            record[name] = str(run)
            continue
        record[name] = read_json(run / "settings.json")
        rows = read_log(run)
        files.write_bytes(folder / f"{name}_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        curves[name] = [row["step"] for row in rows], [row["loss"] for row in rows]
    write_json(folder / "training.json", record)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, (steps, losses)) in zip(panels, curves.items(), strict=True):
        width = max(1, len(losses) // 100)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid") if losses else []
        axes.plot(steps, losses, linewidth=0.4, alpha=0.4)
        axes.plot(steps[width - 1 :], smooth, linewidth=1.4)
        axes.set(title=f"{name} loss", xlabel="step", yscale="log")
    with files.write_atomically(folder / "loss_curve.svg") as part, files.naming(folder / "loss_curve.svg"):
        figure.savefig(part, format="svg")
