"""Peak memory of a whole clip by models of Wan's sizes: ours beside diffusers' pipeline, a fresh process each.

    python -m benchmarks.model_memory [--model 1.3b 5b] [--by ours diffusers] [--frames 5] [--size 448x256]
        [--steps 1] [--folder DIR] [--threads 1] [--json FILE]

Both read the same random weights from safetensors in DIR, made where they are missing: the transformer in bf16, the VAE
in fp32. Both follow a prompt and its opposite, whose embeddings are given to them: the text encoder, which both take
from transformers, is left out. Printed: the peak resident set beyond what the process held before it read the weights,
pages of mapped files included, beside the bytes of the weights; and seconds. Linux only: memory is read in /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

from sora_kernels.info import end_with_the_reader

from . import machine
from .stream_memory import _peak, _resident

_FAMILY = dict(attention_head_dim=128, text_dim=4096, freq_dim=256, num_layers=30, patch_size=[1, 2, 2])
_VAE22 = dict(
    base_dim=160, z_dim=48, decoder_base_dim=256, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
    scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
)  # fmt: skip
MODELS = {  # transformer, VAE, pipeline, as diffusers has their configs
    "tiny": (
        _FAMILY | dict(num_attention_heads=1, num_layers=1, ffn_dim=64, in_channels=16, out_channels=16),
        dict(base_dim=4), {},
    ),
    "1.3b": (_FAMILY | dict(num_attention_heads=12, ffn_dim=8960, in_channels=16, out_channels=16), {}, {}),
    "5b": (
        _FAMILY | dict(num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48), _VAE22,
        {"expand_timesteps": True},
    ),
}  # fmt: skip
FIELDS = frozenset(("model", "by", "frames", "height", "width", "steps", "weights_mib", "peak_mib", "seconds"))
_SHARD = 1 << 30


def make(folder: Path, model: str) -> None:
    """Random weights of that model's transformer and VAE, where they are missing."""
    import diffusers

    transformer, vae, _ = MODELS[model]
    for name, kind, config, dtype in (
        ("transformer", diffusers.WanTransformer3DModel, transformer, torch.bfloat16),
        ("vae", diffusers.AutoencoderKLWan, vae, torch.float32),
    ):
        if (folder / name / "config.json").exists():
            continue
        with torch.device("meta"):
            module = kind(**config)
        _write(folder / name, {key: tuple(t.shape) for key, t in module.state_dict().items()}, dtype)
        module.save_config(folder / name)


def _write(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Shards of numbers drawn once and repeated, as no more than their count matters; norms are ones."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    drawn, shard, files = torch.randn(1 << 22).to(dtype), {}, {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        count, norm = math.prod(shape), "norm" in name or "gamma" in name
        scale = 0.5 / math.sqrt(math.prod(shape[1:]) or 1)
        numbers = torch.ones(count, dtype=dtype) if norm else drawn.repeat(-(-count // len(drawn)))[:count].mul_(scale)
        shard[name] = numbers.view(shape).clone()
        if sum(t.nbytes for t in shard.values()) > _SHARD or number == len(shapes):
            files[f"model-{len(files)}.safetensors"] = list(shard)
            save_file(shard, folder / list(files)[-1], metadata={"format": "pt"})
            shard = {}
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Make one clip in this process; memory in MiB."""
    torch.set_num_threads(args.threads)
    (model,), (by,), (height, width) = args.model, args.by, args.size
    clip = {"ours": _ours, "diffusers": _theirs}[by](args.folder, model)
    before, start = _resident(), time.perf_counter()
    made = clip(args.frames, height, width, args.steps)
    assert made.shape == (args.frames, height, width, 3), made.shape
    weights = sum(file.stat().st_size for file in args.folder.glob("*/*.safetensors"))
    return {
        "model": model, "by": by, "frames": args.frames, "height": height, "width": width, "steps": args.steps,
        "weights_mib": weights / 2**20, "peak_mib": _peak() - before, "seconds": time.perf_counter() - start,
        **machine.facts("cpu"),
    }  # fmt: skip


class _Text:
    """Embeddings of a prompt and its opposite, as an encoder gives them."""

    dim, max_tokens, masks_padding, words = 4096, 512, False, ()

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return torch.randn(len(prompts), 512, 4096), torch.full((len(prompts),), 512, dtype=torch.int32)

    def unknown(self, prompt: str) -> list[str]:
        return []


def _ours(folder: Path, model: str):
    from sora_model.dit import SoraDiT
    from sora_model.pipeline import Sora
    from sora_model.planning import Defaults
    from sora_model.vae import CausalVAE

    def clip(frames: int, height: int, width: int, steps: int):
        dit = SoraDiT.from_wan(folder / "transformer", dtype=torch.bfloat16)
        vae = CausalVAE.from_wan(folder / "vae")
        for part in (dit, vae):
            part.eval().requires_grad_(False)
        sora = Sora(dit, vae, _Text(), Defaults(frames, (height, width), 16, steps, 5.0, 3.0))
        return sora.generate("a clip", negative="another").frames

    return clip


def _theirs(folder: Path, model: str):
    import diffusers
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    diffusers.utils.logging.disable_progress_bar()
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

    def clip(frames: int, height: int, width: int, steps: int):
        dit = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
        vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        parts = dict(tokenizer=None, text_encoder=None, transformer=dit, vae=vae, scheduler=sampler)
        pipeline = WanPipeline(**parts, **MODELS[model][2])
        text = _Text().encode(["", ""])[0].to(torch.bfloat16)
        return pipeline(
            prompt_embeds=text[:1], negative_prompt_embeds=text[1:], height=height, width=width, num_frames=frames,
            num_inference_steps=steps, guidance_scale=5.0,
        ).frames[0]  # fmt: skip

    return clip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["1.3b", "5b"])
    parser.add_argument("--by", choices=("ours", "diffusers"), nargs="+", default=["ours", "diffusers"])
    parser.add_argument("--frames", type=int, default=5, help="4n+1")
    parser.add_argument("--size", default="448x256", help="WIDTHxHEIGHT, multiples of 32")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/model_memory"), help="of the weights, 3 and 13 GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append one line per measurement")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sides = args.size.split("x")
    if len(sides) != 2 or any(not side.isdigit() or int(side) % 32 or side == "0" for side in sides):
        parser.error(f"--size: expected WIDTHxHEIGHT, multiples of 32; got {args.size}")
    if args.frames % 4 != 1:
        parser.error(f"--frames: expected 4n+1 frames; got {args.frames}")
    if args.here:
        args.size = int(sides[1]), int(sides[0])
        print(json.dumps(measure(args)))
        return 0
    for model in args.model:
        folder = args.folder / model
        make(folder, model)
        for by in args.by:
            command = [sys.executable, "-m", "benchmarks.model_memory", "--here", "--model", model, "--by", by]
            sizes = dict(frames=args.frames, size=args.size, steps=args.steps, folder=folder, threads=args.threads)
            command += [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = json.loads(out.splitlines()[-1])
            print(
                f"{model} {by:10} weights {row['weights_mib']:8.0f} MiB, peak {row['peak_mib']:8.0f} MiB, "
                f"{row['seconds']:7.1f} s",
                flush=True,
            )
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    end_with_the_reader()
    raise SystemExit(main())
