"""Training of the toy checkpoint on the procedural world: first the VAE, then the transformer with its text encoder.

    sora train vae --run out/train/vae
    sora train dit --run out/train/dit --vae out/train/vae --checkpoint out/toy
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from . import files, flow, world
from .checkpoint import (
    CheckpointError,
    fingerprint,
    load_into,
    read_json,
    read_metadata,
    read_part,
    read_tensors,
    write_json,
    write_tensors,
)
from .dit import DiTConfig, SoraDiT
from .fit import Settings, fit, generator_of, read_log, torch_threads
from .machine import choose_device
from .pipeline import Defaults
from .presets import DIT
from .text import WordTextConfig, WordTextEncoder
from .vae import AttentionBlock, CausalVAE, Decoder, Downsample, Encoder, ResidualBlock, Upsample, VAEConfig

FRAMES, SIZE, FPS = 17, (64, 64), 8.0
TOY_DEFAULTS = Defaults(frames=FRAMES, size=SIZE, fps=FPS, steps=20, guidance=5.0, shift=3.0)
_VALIDATION_SEED = 10**12

TOY_VAE: dict[str, Any] = dict(base_dim=12, z_dim=8, num_res_blocks=1)
TOY_TEXT: dict[str, Any] = dict(layers=1, heads=4, max_tokens=32)
VAE_SETTINGS = Settings(steps=2300, batch=8, lr=7e-4, save_every=100, weight_decay=0.0)
DIT_SETTINGS = Settings(steps=3700, batch=32, lr=1e-3, warmup=200, decay=0.65, ema=0.998, save_every=250)


def to_video(frames: np.ndarray | Tensor) -> Tensor:
    """uint8 `[B, T, H, W, 3]` -> fp32 `[B, 3, T, H, W]` in [-1, 1]."""
    return torch.as_tensor(frames).movedim(-1, 1).float().div_(127.5).sub_(1)


def vae_batch(settings: Settings, step: int) -> Tensor:
    """Videos of a VAE training step: fp32 `[B, 3, T, H, W]`.

    T is 1 for the first tenth of the steps and then 5, 9 or 17, as a rule in windows of half the height and width near
    the object: most of the learning for a quarter of the price. The last fifth takes whole frames and 17 of them in
    turn.
    """
    generator = generator_of(settings.seed, step)
    draw = torch.rand(1, generator=generator, dtype=torch.float32).item()
    last = step >= settings.steps - settings.steps // 5
    whole = last and draw < 0.5
    half = max(1, settings.batch // 2)
    if step < settings.steps // 10:
        frames, clips = 1, 2 * settings.batch
    elif last:
        frames, clips = 5 if whole else FRAMES, half
    else:
        frames = 5 if draw < 0.65 else 9 if draw < 0.95 else FRAMES
        clips = settings.batch if frames == 5 else half
    starts = torch.randint(0, FRAMES - frames + 1, (clips,), generator=generator).tolist()
    first = ((settings.seed << 32) + step) * 64
    samples = [world.sample(first + i) for i in range(clips)]
    videos = [sample.video[start : start + frames] for sample, start in zip(samples, starts, strict=True)]
    if not whole:
        window = np.array(SIZE) // 2
        shift = torch.randint(-10, 11, (clips, 2), generator=generator).numpy()
        for i, sample in enumerate(samples):
            centre = sample.pixels[starts[i] + frames // 2, 0, ::-1]
            y, x = np.clip(np.rint(centre - window / 2).astype(int) + shift[i], 0, np.array(SIZE) - window)
            videos[i] = videos[i][:, y : y + window[0], x : x + window[1]]
    return to_video(np.stack(videos))


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
    settings: Settings = VAE_SETTINGS,
    config: VAEConfig | None = None,
    *,
    measured: int = 64,
    device: str | torch.device = "cpu",
    impl: str = "auto",
) -> CausalVAE:
    """Trains the VAE on clips of the world: L1 + MSE on pixels in [-1, 1] and 1e-6 of the KL divergence.

    Then takes the mean and standard deviation of each latent channel over `measured` other clips, and writes
    `run/model.safetensors` and `run/config.json`.
    """
    device = choose_device(device)
    torch.manual_seed(settings.seed)
    vae = CausalVAE(config or VAEConfig(**TOY_VAE), impl=impl).to(device, torch.float32)
    start_direct(vae)

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        video = vae_batch(settings, step)
        latents = (len(video), *vae.config.latent_shape(*video.shape[2:]))
        return video, flow.draw_noise(latents, generator=generator_of(settings.seed + 1, step))

    def loss_of(video: Tensor, noise: Tensor) -> Tensor:
        video, noise = video.to(device), noise.to(device)
        mean, logvar = vae.encode(video)
        error = vae.decode(mean + torch.exp(0.5 * logvar) * noise, clamp=False) - video
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 1e-6 * divergence

    made_with = {"model": dataclasses.asdict(vae.config)}
    load_into(vae, fit(vae, batch_at, loss_of, settings, run, label="VAE", made_with=made_with), str(run))
    latents = encode_clips(vae, range(_VALIDATION_SEED, _VALIDATION_SEED + measured), progress=False)
    vae.set_latent_statistics(latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist())
    write_tensors(Path(run) / "model.safetensors", vae.state_dict())
    write_json(Path(run) / "config.json", dataclasses.asdict(vae.config))
    return vae.eval()


def load_vae(run: str | Path) -> CausalVAE:
    """The VAE that `train_vae` wrote."""
    return read_part(Path(run), CausalVAE, VAEConfig)


def encode_clips(vae: CausalVAE, seeds: range, *, frames: int = FRAMES, progress: bool = True) -> Tensor:
    """Latents of the world's clips, as they are: fp32 `[N, C, T', H', W']`."""
    device = next(vae.parameters()).device

    def encode(chunk: range) -> Tensor:
        with torch.no_grad():
            videos = np.stack([world.sample(seed, frames=frames).video for seed in chunk])
            return vae.encode(to_video(videos).to(device))[0].cpu()

    chunks = [seeds[i : i + 8] for i in range(0, len(seeds), 8)]
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with Progress(disable=not progress) as bar, torch_threads(1), ThreadPoolExecutor(workers) as pool:
        try:
            return torch.cat(list(bar.track(pool.map(encode, chunks), total=len(chunks), description="latents")))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the end of the pool waits for every clip
            raise


def _latents(run: Path, vae: CausalVAE, seeds: range, made_of: dict[str, str]) -> Tensor:
    """The clips' latents, read from `run/latents.safetensors` or, where that is missing, encoded and written there."""
    cache = run / "latents.safetensors"
    with files.exclusive(run):
        settings = run / "settings.json"
        if settings.exists() and "clips" not in read_json(settings):
            raise CheckpointError(f"{run} is the folder of another kind of run; use a folder of its own")
        if not cache.exists():
            write_tensors(cache, {"latents": encode_clips(vae, seeds)}, metadata=made_of)
        before = read_metadata(cache)
        for name, value in made_of.items():
            if before.get(name) != value:
                raise CheckpointError(
                    f"{cache} was made with {name}={before.get(name)}, not {value}; use another folder, or remove it"
                )
        return read_tensors(cache)["latents"]


def _captions(seed: int) -> list[str]:
    """Four true captions of a clip."""
    sample = world.sample(seed)
    return [sample.wording(k)[0] for k in range(4)]


def train_dit(
    run: str | Path,
    vae: CausalVAE,
    settings: Settings = DIT_SETTINGS,
    config: DiTConfig | None = None,
    *,
    clips: int = 5000,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    on_save: Callable[[SoraDiT, WordTextEncoder, int], None] | None = None,
) -> tuple[SoraDiT, WordTextEncoder]:
    """Trains the transformer and its text encoder on `clips` clips of the world, encoded once and kept in
    `run/latents.safetensors`.

    Those latents are of one seed, number of clips and VAE: with others the run is refused with `CheckpointError`.
    Loss: mean square error of the velocity at logit-normal times shifted by 1.5. Each time a clip is seen it bears
    one of four true captions; a tenth of the captions is dropped, and 3 % of the words are forgotten. Every save
    also calls `on_save(dit, text, step)` with the averaged weights.
    """
    if isinstance(clips, bool) or not isinstance(clips, int) or not 1 <= clips <= 2**32:
        raise ValueError(f"clips must be a whole number from 1 to {2**32}, got {clips!r}")
    run, device = Path(run), choose_device(device)
    first = (settings.seed << 32) + (1 << 40)
    seeds = range(first, first + clips)
    made_of = {"seed": settings.seed, "clips": clips, "frames": FRAMES, "vae": fingerprint(vae)}
    stored = _latents(run, vae.to(device), seeds, {name: str(value) for name, value in made_of.items()})
    latents = vae.cpu().normalize(stored)
    torch.manual_seed(settings.seed)
    channels = latents.shape[1]
    config = dataclasses.replace(config or DIT["toy"], in_channels=channels, out_channels=channels)
    words = WordTextConfig(words=world.VOCABULARY, dim=config.text_dim, **TOY_TEXT)
    model = nn.ModuleDict({"dit": SoraDiT(config), "text": WordTextEncoder(words)})
    for embedding in (model["dit"].text_embedding, model["dit"].time_embedding):
        for layer in (embedding[0], embedding[2]):
            nn.init.xavier_uniform_(layer.weight)
    model.to(device, torch.float32)
    captions = [_captions(seed) for seed in seeds]

    def batch_at(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = generator_of(settings.seed, step)
        rows = torch.randint(0, clips, (settings.batch,), generator=generator)
        which = torch.randint(0, 4, (settings.batch,), generator=generator).tolist()
        ids = model["text"].tokenize([captions[row][k] for row, k in zip(rows.tolist(), which, strict=True)])
        ids = model["text"].forget(ids, words=0.03, prompts=0.1, generator=generator)
        x0 = latents[rows]
        noise = flow.draw_noise(tuple(x0.shape), generator=generator)
        return ids, x0, noise, flow.sample_times(settings.batch, generator=generator, shift=1.5)

    def loss_of(ids: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        ids, x0, noise, t = (value.to(device) for value in (ids, x0, noise, t))
        text, lens = model["text"](ids)
        v = model["dit"](flow.interpolate(x0, noise, t), flow.TIME_SCALE * t, text, lens, impl=impl)
        return F.mse_loss(v.float(), flow.velocity_target(x0, noise))

    def save(step: int, weights: dict[str, Tensor]) -> None:
        copies = []
        for name in ("dit", "text"):
            copy = type(model[name])(model[name].config)
            load_into(
                copy,
                {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")},
                str(run),
            )
            copies.append(copy.eval())
        kept.update(dit=copies[0], text=copies[1])
        if on_save is not None:
            on_save(copies[0], copies[1], step)

    kept: dict[str, nn.Module] = {}
    made_with = made_of | {"model": dataclasses.asdict(config)}
    fit(model, batch_at, loss_of, settings, run, label="DiT", made_with=made_with, on_save=save)
    return kept["dit"], kept["text"]


def write_record(folder: str | Path, *, vae: str | Path, dit: str | Path, command: list[str], step: int) -> None:
    """Writes how a checkpoint was trained beside it: `training.json`, both logs, and the loss curves if matplotlib
    is there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
