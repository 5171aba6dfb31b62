"""Peak memory of the VAE over the length of a clip: our stream beside diffusers' coder, a fresh process each.

    python -m benchmarks.stream_memory [--vae 2.1] [--frames 17 65 257] [--code decode encode] [--base 16]
        [--latent 8] [--tile PIXELS ...] [--threads 1] [--json FILE] [--plot FILE.svg]

Both have the same sizes, random weights, fp32. Ours takes and hands out a latent frame, or the four frames that it
stands for, at a time and forgets them, as one who reads or writes a video file needs them; diffusers takes and returns
the whole clip, which is its only way. Printed: the peak resident set beyond what the process held before, and seconds.
The plot is drawn from the lines in the JSON file, those of earlier runs included. Linux only: memory is read in /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from sora_kernels.info import end_with_the_reader

from . import machine, report

CODERS = ("ours", "diffusers")
FIELDS = frozenset(("code", "coder", "frames", "base", "pixels", "tile", "peak_mib", "seconds"))  # and the machine's
CODES = ("decode", "encode")
VAES = {  # pixels of a latent, its channels; config beside the base width, as diffusers has it
    "2.1": (8, 16, {}),
    "2.2": (
        16, 48, dict(
            z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16,
            latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        ),
    ),
}  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Code one clip in this process; memory in MiB."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    (coder,), (code,), (frames,), (tile,) = args.coder, args.code, args.frames, args.tile
    model = _model(coder, args.vae, args.base)
    factor, latents, _ = VAES[args.vae]
    side = args.latent if code == "decode" else factor * args.latent
    pieces = (frames - 1) // 4 + 1 if code == "decode" else frames
    channels = latents if code == "decode" else 3
    before, start, coded = _resident(), time.perf_counter(), 0
    with torch.no_grad():
        if coder == "ours":
            clip = (torch.randn(1, channels, 1, side, side) for _ in range(pieces))
            for out in getattr(model, f"{code}_stream")(clip, tile=tile or None):
                coded += (out if code == "decode" else out[0]).shape[2]
        else:
            clip = torch.randn(1, channels, pieces, side, side)
            coded = (model.decode(clip).sample if code == "decode" else model.encode(clip).latent_dist.mean).shape[2]
    assert coded == (frames if code == "decode" else (frames - 1) // 4 + 1), coded
    return {
        "code": code, "coder": coder, "vae": args.vae, "frames": frames, "base": args.base,
        "pixels": factor * args.latent, "tile": tile or None, "peak_mib": _peak() - before,
        "seconds": time.perf_counter() - start, **machine.facts("cpu"),
    }  # fmt: skip


def _model(coder: str, vae: str, base: int) -> torch.nn.Module:
    config = VAES[vae][2] | {"base_dim": base}
    if vae == "2.2":
        config["decoder_base_dim"] = 8 * base // 5  # as 256 is of 160
    if coder == "ours":
        from sora_model.vae import CausalVAE, VAEConfig, wan_config

        return CausalVAE(VAEConfig(**wan_config(config | {"_class_name": "AutoencoderKLWan"}, "config"))).eval()
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**config).eval()


def _resident() -> float:
    """MiB in use now; the peak, which building a model may have raised above it, begins here again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def draw(rows: list[dict], target: Path) -> None:
    """Peak memory over frames, a line for each coder; SVG or PNG by the name of `target`."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "sora_kernels"  # the same rows give the same file
    lines: dict[tuple, dict[int, float]] = defaultdict(dict)
    for row in rows:
        lines[row["code"], row["coder"], row["tile"], row["base"], row["pixels"]][row["frames"]] = row["peak_mib"]
    sizes = sorted({key[3:] for key in lines})
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (code, coder, tile, *size), points in sorted(lines.items(), key=str):
        label = f"{'sora_model, stream' if coder == 'ours' else coder}: {code}"
        label += f", tiles of {tile}" if tile else ""
        label += f", base {size[0]}, {size[1]} px" if len(sizes) > 1 else ""
        color, style = "#2a6f97" if coder == "ours" else "#e07a5f", "-" if code == "decode" else "--"
        axes.plot(*zip(*sorted(points.items()), strict=True), style, marker="o", color=color, label=label)
    counts = sorted({row["frames"] for row in rows})
    axes.set(xscale="log", yscale="linear", ylim=(0, None), xlabel="frames of the clip", ylabel="peak memory, MiB")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    where = ", ".join(f"base width {base}, {side}x{side} pixels" for base, side in sizes)
    versions = " and ".join(sorted({row.get("vae", "2.1") for row in rows}))
    title = f"Peak memory of the Wan {versions} VAE over the length of a clip"
    axes.set_title(f"{title}\n{where}, fp32, {rows[-1]['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(target, metadata=metadata, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", choices=VAES, default="2.1", help="Wan's version")
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 65, 257], help="4n+1 each")
    parser.add_argument("--code", choices=CODES, nargs="+", default=list(CODES))
    parser.add_argument("--coder", choices=CODERS, nargs="+", default=list(CODERS))
    parser.add_argument("--base", type=int, default=16, help="channels at full resolution; Wan 2.1 has 96, 2.2 160")
    parser.add_argument("--latent", type=int, default=8, help="height and width of the latents")
    parser.add_argument("--tile", type=int, nargs="+", default=[0], help="of ours, in pixels; 0: whole frames")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append one line per measurement")
    parser.add_argument("--plot", type=Path, help="draw the lines of --json into this SVG or PNG file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if any(n < 1 or n % 4 != 1 for n in args.frames):
        parser.error(f"--frames: expected 4n+1 frames; got {args.frames}")
    if args.plot and (not args.json or args.plot.suffix not in (".svg", ".png")):
        parser.error(f"--plot: expected a .svg or .png file, and --json with the lines to draw; got {args.plot}")
    if args.here:
        print(json.dumps(measure(args)))
        return 0
    cases = [
        (code, coder, tile, frames)
        for code in args.code for coder in args.coder
        for tile in (args.tile if coder == "ours" else [0]) for frames in args.frames
    ]  # fmt: skip
    for code, coder, tile, frames in cases:
        command = [sys.executable, "-m", "benchmarks.stream_memory", "--here", "--code", code, "--coder", coder]
        sizes = dict(
            vae=args.vae, frames=frames, tile=tile, base=args.base, latent=args.latent, threads=args.threads
        )
        command += [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        tiled = f"tiles of {tile}" if tile else ""
        print(
            f"{code} {coder:10} {frames:5} frames  {row['peak_mib']:8.1f} MiB  {row['seconds']:7.1f} s  {tiled}",
            flush=True,
        )
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if args.plot:
        draw(report.read_jsonl(args.json, FIELDS), args.plot)
        print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    end_with_the_reader()
    raise SystemExit(main())
