"""Peak memory of a decode over the length of a clip: our stream beside diffusers' decoder, a fresh process each.

    python -m benchmarks.stream_memory [--frames 17 65 257] [--base 16] [--latent 8] [--threads 1] [--json FILE]

Both decode the same weights and latents in fp32. Ours hands out four frames at a time and forgets them, as a writer of
a video file needs them; diffusers returns the whole clip, which is its only way. Printed: the peak resident set beyond
what the process held before it decoded, and seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

DECODERS = ("ours", "diffusers")


def decode(decoder: str, frames: int, base: int, latent: int) -> dict[str, object]:
    """Decode in this process; memory in MiB."""
    from diffusers import AutoencoderKLWan

    from sora_model.vae import CausalVAE

    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=base).eval()
    model = CausalVAE.from_wan(model) if decoder == "ours" else model
    latents = torch.randn(1, 16, (frames - 1) // 4 + 1, latent, latent)
    before, start, decoded = _peak(), time.perf_counter(), 0
    with torch.no_grad():
        chunks = model.decode_stream(latents) if decoder == "ours" else [model.decode(latents).sample]
        for chunk in chunks:
            decoded += chunk.shape[2]
    assert decoded == frames, (decoded, frames)
    return {
        "decoder": decoder, "frames": frames, "base": base, "pixels": 8 * latent,
        "peak_mib": _peak() - before, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 65, 257], help="4n+1 each")
    parser.add_argument("--base", type=int, default=16, help="channels at full resolution; Wan 2.1 has 96")
    parser.add_argument("--latent", type=int, default=8, help="height and width of the latents")
    parser.add_argument("--decoder", choices=DECODERS, nargs="+", default=list(DECODERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="append one line per decode")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if any(n < 1 or n % 4 != 1 for n in args.frames):
        parser.error(f"--frames: expected 4n+1 frames; got {args.frames}")
    if args.here:
        torch.set_num_threads(args.threads)
        print(json.dumps(decode(args.decoder[0], args.frames[0], args.base, args.latent)))
        return 0
    for frames in args.frames:
        for decoder in args.decoder:
            sizes = ["--base", str(args.base), "--latent", str(args.latent), "--threads", str(args.threads)]
            command = [sys.executable, "-m", "benchmarks.stream_memory", "--here", "--frames", str(frames), *sizes]
            result = subprocess.run([*command, "--decoder", decoder], stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(result.stdout.splitlines()[-1])
            print("{decoder:10} {frames:5} frames  {peak_mib:8.1f} MiB  {seconds:7.1f} s".format(**row), flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
