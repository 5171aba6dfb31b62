"""How often the watermark is seen where there is none, and what it survives.

    python -m benchmarks.calibrate_watermark --clips 2000 --keys 50 --json FILE
    python -m benchmarks.calibrate_watermark --size 256 --footage FOLDER --json FILE

Nulls: unmarked clips of the procedural world and of drawn 1/f noise that moves, each through H.264, each with keys of
its own; the share of them beyond the threshold with its 95 % interval (Clopper and Pearson), over the searches, which
are independent over keys but share their clips, and over the clips; and the largest z. Then
marked clips through attacks: how many are found, of how many the identity is told among 1,000 others, and the mean z.
With --footage, both also for clips of that size cut from the MP4s of a folder, as they are, and sent through the VAE
of the toy checkpoint before they are marked, as `sora reconstruct` does. What --json holds of other sizes stays in it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import torch

from sora_model import media, world
from sora_model.safety import credentials, watermark

KEY, IDENTITY = b"calibration" * 3, 0x5EED1234


def clips(count: int, size: tuple[int, int], frames: int, seed: int) -> Iterator[np.ndarray]:
    """Flat ones and textured ones in turns, uint8 [T, H, W, 3]."""
    for number in range(seed, seed + count):
        if number % 2:
            yield np.asarray(world.sample(number, frames=frames, size=size).video)
        else:
            yield textured(frames, size, np.random.default_rng(number))


def textured(frames: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A picture with the spectrum of natural ones, 1/f, that is panned over."""
    height, width = size[0] + frames, size[1] + frames
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    image = np.fft.ifft2(spectrum / np.maximum(radius, 1 / 256)[..., None], axes=(0, 1)).real
    image = np.clip(120 + 50 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8)
    return np.stack([image[i : i + size[0], i : i + size[1]] for i in range(frames)])


def encoded(frames: np.ndarray, crf: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = media.write_video(Path(folder) / "clip.mp4", frames, crf=crf)
        return np.stack(list(media.read_video(path)))


def of_footage(folder: Path, size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """Up to three clips of each file, a second apart, cut around the centre."""
    for path in sorted(folder.glob("*.mp4")):
        clip: list[np.ndarray] = []
        for number, frame in enumerate(media.read_video(path)):
            if number >= 3 * 30 or min(frame.shape[:2]) < min(size):
                break
            top, left = ((have - want) // 2 for have, want in zip(frame.shape[:2], size, strict=True))
            if number % 30 < frames and min(top, left) >= 0:
                clip.append(frame[top : top + size[0], left : left + size[1]])
            if len(clip) == frames:
                yield np.stack(clip)
                clip = []


def reconstructed(frames: np.ndarray) -> np.ndarray:
    from sora_model.reconstruct import load_vae, reconstruct

    with tempfile.TemporaryDirectory() as folder, credentials.signing(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = media.write_video(Path(folder) / "a.mp4", frames, crf=10)
        result = reconstruct(load_vae("toy", device="cpu"), source, Path(folder) / "b.mp4")
        return np.stack(list(media.read_video(result.path)))


def in_av1(frames: np.ndarray, crf: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libsvtav1", rate=8, options={"crf": str(crf), "preset": "8"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return np.stack(list(media.read_video(path)))


def halved(frames: np.ndarray) -> np.ndarray:
    return np.round(frames.reshape(len(frames), frames.shape[1] // 2, 2, -1, 2, 3).mean((2, 4))).astype(np.uint8)


def cut(frames: np.ndarray) -> np.ndarray:
    height, width = (side // 10 for side in frames.shape[1:3])
    return frames[:, height:-height, width:-width]


def noisy(frames: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, 5, frames.shape)
    return np.clip(frames + drawn, 0, 255).round().astype(np.uint8)


ATTACKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda frames: frames,
    "H.264 crf 18": lambda frames: encoded(frames, 18),
    "H.264 crf 23": lambda frames: encoded(frames, 23),
    "H.264 crf 28": lambda frames: encoded(frames, 28),
    "H.264 crf 35": lambda frames: encoded(frames, 35),
    "AV1 crf 35": lambda frames: in_av1(frames, 35),
    "AV1 crf 50": lambda frames: in_av1(frames, 50),
    "half the size, crf 23": lambda frames: encoded(halved(frames), 23),
    "cut to 80 %, crf 23": lambda frames: encoded(cut(frames), 23),
    "mirrored, crf 23": lambda frames: encoded(frames[:, :, ::-1], 23),
    "noise of 5 levels, crf 23": lambda frames: encoded(noisy(frames), 23),
    "half as bright, crf 23": lambda frames: encoded(frames // 2, 23),
    "every third frame twice, crf 23": lambda frames: encoded(
        np.repeat(frames, [2 if i % 3 == 0 else 1 for i in range(len(frames))], axis=0), 23
    ),
    "every second frame, crf 23": lambda frames: encoded(frames[::2], 23),
}


def interval(hits: int, n: int) -> tuple[float, float]:
    """95 % for a share, by bisection of the binomial's tails."""
    from math import exp, lgamma, log, log1p

    def tail(p: float, least: int) -> float:  # P(X >= least)
        terms = (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(p) + (n - k) * log1p(-p)
                 for k in range(least))  # fmt: skip
        return 1 - sum(map(exp, terms))

    def solve(least: int, wanted: float) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, least) < wanted else (low, middle)
        return low

    return (solve(hits, 0.025) if hits else 0.0), (solve(hits + 1, 0.975) if hits < n else 1.0)


def nulls(unmarked: Iterable[np.ndarray], keys: int) -> dict:
    largest, chances = [], []  # of each clip, by keys
    for number, clip in enumerate(unmarked):
        spectra, tried = watermark.spectra_of(watermark.residual(encoded(clip, 18)))
        drawn = (watermark.drawn_phases(f"null {number} {key}".encode(), 0) for key in range(keys))
        z = [float(watermark.peaks(spectra, known)[0].max()) for known in drawn]
        largest.append(max(z))
        chances += [(one, watermark.chance(one, len(tried))) for one in z]
    z, hits = sorted(one for one, _ in chances), sum(one >= watermark.THRESHOLD for one, _ in chances)
    clips_hit = sum(one >= watermark.THRESHOLD for one in largest)
    return {
        "clips": len(largest), "tests": len(z), "beyond": hits, "interval": interval(hits, len(z)),
        "clips_beyond": clips_hit, "clips_interval": interval(clips_hit, len(largest)),
        "largest_z": z[-1], "median_z": z[len(z) // 2], "below_p": {
            f"{level:g}": sum(p < level for _, p in chances) / len(chances) for level in (0.1, 0.01, 0.001, 0.0001)
        },
    }  # fmt: skip


def robustness(unmarked: Iterable[np.ndarray]) -> list[dict]:
    others = {IDENTITY, *np.random.default_rng(1).integers(0, 2**32, 1000).tolist()}
    made = []
    for clip in unmarked:
        marked = np.stack(list(watermark.embed(clip, IDENTITY, key=KEY)))
        made.append((marked, 10 * np.log10(255**2 / np.square(marked - clip.astype(float)).mean())))
    rows = [{"attack": "PSNR of the mark, dB", "mean": float(np.mean([psnr for _, psnr in made]))}]
    for name, attack in ATTACKS.items():
        seen = [watermark.detect(attack(marked), key=KEY) for marked, _ in made]
        told = [one.identity(others) for one in seen]
        rows.append(
            {
                "attack": name, "n": len(made), "found": sum(one.present for one in seen),
                "told": told.count(IDENTITY), "told_wrong": sum(one not in (None, IDENTITY) for one in told),
                "mean_z": float(np.mean([one.z for one in seen])),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--keys", type=int, default=40, help="keys for each unmarked clip")
    parser.add_argument("--marked", type=int, default=6, help="marked clips for each attack")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 256], help="sides of square clips")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--footage", type=Path, help="a folder of MP4s of real footage")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("SVT_LOG", "0")  # twenty lines for each clip
    results = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    for side in given.size:
        size, frames = (side, side), given.frames
        drawn = clips(given.clips, size, frames, seed=0), clips(given.marked, size, frames, seed=1_000_000)
        kinds = {f"{side}x{side}": drawn}
        if given.footage:
            real = list(of_footage(given.footage, size, frames))
            again = [reconstructed(clip) for clip in real]
            kinds[f"{side}x{side}, footage"] = real, real
            kinds[f"{side}x{side}, footage through the VAE"] = again, again
        for name, (unmarked, marked) in kinds.items():
            results[name] = {
                "threshold": watermark.THRESHOLD, "frames": frames, "nulls": nulls(unmarked, given.keys),
                "robustness": robustness(marked),
            }  # fmt: skip
            print(json.dumps({name: results[name]}, indent=2), flush=True)
            if given.json:
                given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
