"""A mark in the pixels that survives what takes a record away: another encoding, another size, a cut.

    marked = watermark.embed(frames, identity=0x1234abcd)       # uint8 [H,W,3], one at a time
    found = watermark.detect(frames)
    found.z, found.p, found.present

A spread-spectrum mark (Cox et al., 1997) in a tile of 64 x 64 pixels that is repeated over every frame, as in JAWS
(Kalker et al., 1999). The tile is a sum of waves of 2 to 10 periods whose phases a secret key draws: half of its
energy is the same in every clip, by which it is found, half carries the 32 bits of an identity. To find it, frames are
averaged and folded into one tile, and of each wave only the phase is kept; z is the largest correlation with the key's
tile at any shift, over the standard deviation of such a correlation. What an unmarked clip shows knows nothing of the
key: over keys, that is a sum of cosines of independent phases, and p bounds the chance of such a z at any shift, scale
or mirroring that is tried, as far as such a sum is Gaussian.

A mark that is found says that a holder of the key made the clip, or that somebody copied the mark; none that is found
says nothing. The mark is laid over frames in one pass (`sora_kernels.embed_watermark`); the search is plain torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import embed_watermark

from . import certificates
from .certificates import CredentialsError

TILE, BITS = 64, 32
THRESHOLD = 6.5  # of z, for "present"
SCORE, MARGIN = 0.5, 0.15  # of an identity: the least agreement, and by how much it must exceed that of any other
SCALES = (1.0, 0.5, 2.0, 0.75, 4 / 3, 1.5, 2 / 3)

_BAND = (2.0, 10.0)  # periods of the waves in a tile
_STRENGTH = 1.5  # standard deviation of the mark in a flat frame of 256 x 256, in levels of 255
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Detection:
    """`z` and the bound `p` on the chance of it where there is no mark; at which `scale`, `mirrored` or not; and the
    correlations of the bits."""

    z: float
    p: float
    scale: float
    mirrored: bool
    bits: tuple[float, ...]

    @property
    def present(self) -> bool:
        return self.z >= THRESHOLD

    def identity(self, known: Iterable[int]) -> int | None:
        """That of `known` which the bits agree with, if they agree well enough, and with no other nearly as well."""
        likely = self.likely(known)
        return likely[0] if len(likely) == 1 else None

    def likely(self, known: Iterable[int]) -> list[int]:
        """Those of `known` which the bits agree with best; several where frames of one marked clip are in another."""
        total = sum(map(abs, self.bits)) or 1.0
        scores = sorted(
            ((sum(r * b for r, b in zip(self.bits, _signs(one), strict=True)) / total, one) for one in set(known)),
            reverse=True,
        )
        if not self.present or not scores or scores[0][0] < SCORE:
            return []
        return [one for score, one in scores if scores[0][0] - score < MARGIN]


def secret() -> bytes:
    """The key of this installation: watermark.key in `certificates.folder()`, made at first use, mode 0600. Raises
    `CredentialsError` for one that others can read, or that is cut short."""
    path = certificates.folder() / "watermark.key"
    if not path.exists():
        certificates.write_secret(path, os.urandom(32))
    key = certificates.read_secret(path, "the mark's key")
    if len(key) != 32:
        raise CredentialsError(
            f"the mark's key in {os.fspath(path)!r} must be 32 bytes, got {len(key)}; restore it, or move it away: "
            "another is made, which finds no marks of the old one"
        )
    return key


def embed(frames: Iterable[np.ndarray], identity: int, *, key: bytes | None = None) -> Iterator[np.ndarray]:
    """uint8 `[H, W, 3]` frames with the mark of `identity`, 0 to 2^32 - 1, in their luma; more of it in texture."""
    sync, codes = _patterns(secret() if key is None else key)
    signs = torch.tensor(_signs(identity)).view(-1, 1, 1)
    tile = (sync + (signs * codes).sum(0) / math.sqrt(BITS)) / math.sqrt(2)
    for frame in frames:
        frame = np.ascontiguousarray(frame)
        strength = _STRENGTH * min(2.0, max(0.75, (256 * 256 / (frame.shape[0] * frame.shape[1])) ** 0.25))
        yield embed_watermark(torch.from_numpy(frame)[None, None], strength * tile)[0, 0].numpy()


def detect(frames: Iterable[np.ndarray], *, key: bytes | None = None) -> Detection:
    """Looks for the mark at `SCALES` of the frames' size, as they are and mirrored. Frames are read one at a time."""
    return search(residual(frames), secret() if key is None else key)


def residual(frames: Iterable[np.ndarray]) -> Tensor:
    """What a mark may be in: the sum over frames of their luma without what is smooth, fp32 `[H, W]`."""
    total = None
    for frame in frames:
        shown = torch.from_numpy(np.ascontiguousarray(frame)).float()
        luma = sum(weight * shown[..., i] for i, weight in enumerate(LUMA))  # no product: autocast rounds it
        rest = (luma - _blur(_blur(luma))).clamp_(-6, 6)  # of an edge no more than of a mark
        total = rest if total is None else total + rest
    if total is None:
        raise ValueError("there are no frames to look for a mark in; give at least one")
    if min(total.shape) < TILE // 4:
        raise ValueError(f"frames of {total.shape[1]}x{total.shape[0]} are too small to look for a mark in")
    return total


def search(total: Tensor, key: bytes) -> Detection:
    """`detect`, of what `residual` gives."""
    sync, codes = _patterns(key)
    spectra, tried = spectra_of(total)
    z, at = peaks(spectra, torch.fft.rfft2(sync))
    best = int(z.argmax())
    rows, columns = torch.meshgrid(torch.fft.fftfreq(TILE), torch.fft.rfftfreq(TILE), indexing="ij")
    turn = 2 * math.pi * (rows * (at[best] // TILE) + columns * (at[best] % TILE))
    spectrum = spectra[best] * torch.polar(torch.ones_like(turn), turn)  # shifted to where the mark begins
    bits = torch.fft.irfft2(spectrum * torch.fft.rfft2(codes).conj())[:, 0, 0]
    return Detection(float(z[best]), chance(float(z[best]), len(tried)), *tried[best], tuple(bits.tolist()))


def chance(z: float, tried: int) -> float:
    """The bound p for the largest z of `tried` spectra, each at every shift."""
    return min(1.0, tried * TILE * TILE * math.erfc(z / math.sqrt(2)) / 2)


def spectra_of(total: Tensor) -> tuple[Tensor, list[tuple[float, bool]]]:
    """The whitened spectra `[N, TILE, TILE / 2 + 1]` of all tiles that a mark is sought in, and of which scale each is,
    mirrored or not."""
    tiles, tried = [], []
    for scale in SCALES:
        size = [round(side / scale) for side in total.shape]
        if min(size) >= TILE // 4:
            resized = total if scale == 1 else _resized(total, size)
            for mirrored in (False, True):
                tiles.append(_fold(resized.flip(1) if mirrored else resized))
                tried.append((scale, mirrored))
    return _phases(torch.fft.rfft2(torch.stack(tiles))), tried


def peaks(spectra: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(z `[N]`, the shift `[N]`) of the largest correlation of each whitened spectrum with the tile of
    spectrum `known`."""
    surfaces = torch.fft.irfft2(spectra * _phases(known).conj()).flatten(1)
    deviation = math.sqrt(2 * int(_band().sum())) / TILE**2  # of a sum of cosines of independent phases, by `irfft2`
    largest, at = surfaces.max(1)
    return largest / deviation, at


def _phases(spectrum: Tensor) -> Tensor:
    return torch.where(_band(), spectrum / spectrum.abs().clamp(min=1e-12), 0)


def _fold(image: Tensor) -> Tensor:
    """The mean of an image's tiles, those cut off by its edge as far as they go."""
    height, width = image.shape
    padded = F.pad(image, (0, -width % TILE, 0, -height % TILE))
    counted = F.pad(torch.ones_like(image), (0, -width % TILE, 0, -height % TILE))
    folded = [whole.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).sum((0, 2)) for whole in (padded, counted)]
    return folded[0] / folded[1].clamp(min=1)


@lru_cache(8)
def _patterns(key: bytes) -> tuple[Tensor, Tensor]:
    """The tile that is always there and those of the bits `[BITS, TILE, TILE]`, fp32 of standard deviation 1,
    orthogonal."""
    waves = [torch.fft.irfft2(drawn_phases(key, index)).flatten() for index in range(BITS + 1)]
    q, r = torch.linalg.qr(torch.stack(waves).T)  # the first stays as it was drawn
    tiles = (q * r.diagonal().sign()).T.reshape(-1, TILE, TILE) * TILE
    return tiles[0].float(), tiles[1:].float()


def drawn_phases(key: bytes, index: int) -> Tensor:
    """The spectrum of a tile before those before it are taken out; of index 0, that which is always there."""
    band = _band()
    drawn = hashlib.shake_256(b"sora mark 1" + key + index.to_bytes(2, "big")).digest(2 * band.numel())
    phase = torch.from_numpy(np.frombuffer(drawn, "<u2").astype(np.float64)).view(band.shape) * (math.pi / 2**15)
    return torch.where(band, torch.polar(torch.ones_like(phase), phase), 0)


@lru_cache(1)
def _band() -> Tensor:
    """Where a tile's spectrum carries the mark; each wave once: of the column of frequency 0, half of the rows."""
    rows, columns = torch.fft.fftfreq(TILE, 1 / TILE)[:, None], torch.fft.rfftfreq(TILE, 1 / TILE)[None]
    radius = (rows**2 + columns**2).sqrt()
    return (radius >= _BAND[0]) & (radius <= _BAND[1]) & (columns > 0)


def _signs(identity: int) -> list[float]:
    return [1.0 if identity >> bit & 1 else -1.0 for bit in range(BITS)]


def _blur(image: Tensor) -> Tensor:
    """The mean of 9 x 9 pixels."""
    padded = F.pad(image[None, None], (4, 4, 4, 4), mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, (9, 1), 1), (1, 9), 1)[0, 0]


def _resized(image: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]
