"""Which key tiles each query tile visits: what every mode of spacetime attention reduces to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _check
from .reference import FAR, reach, token_table, visible

MASKED, FULL = 1, 2  # kinds of a visited tile; 0 is none


@dataclass(frozen=True)
class AttentionPlan:
    """For each query tile its key tiles, and whether each is seen whole or masked by coordinates.

    Tiles hold tokens that are neighbours: runs of the sequence, or boxes of the video grid and runs of the text.
    All tensors are built on the device without a host synchronisation. P is the batch if `kv_lens` was given, else 1.

    key_tiles  [P, Nq, Nk] int32: the key tiles a query tile visits, in rising order; after them -1
    kinds      [P, Nq, Nk] int32, in step with key_tiles: FULL (2) all pairs are seen, MASKED (1) ask the
               coordinates, 0 no tile. FULL and absent are exact promises; MASKED may hold no visible pair
    counts     [P, Nq] int32: how many tiles a query tile visits
    q_tile     [Sq] int32: the tile of each query token; k_tile [Sk] likewise
    queries    [Sq, 7] int64: clip, t, h, w and the clip's T, H, W of each query token (text: -1); keys [Sk, 7]
    """

    key_tiles: Tensor
    kinds: Tensor
    counts: Tensor
    q_tile: Tensor
    k_tile: Tensor
    queries: Tensor
    keys: Tensor
    window: tuple[int, ...]
    stride: tuple[int, ...]
    chunk: int
    sink: int
    kv_lens: Tensor | None
    tile_pairs: int

    def mask(self, rows: slice = slice(None)) -> Tensor:
        """Bool `[P, rows, Sk]`: which of these queries sees which key."""
        seen = visible(self.queries[rows], self.keys, self.window, self.stride, self.chunk, self.sink)
        if self.kv_lens is None:
            return seen[None]
        return seen & (torch.arange(self.keys.shape[0], device=seen.device) < self.kv_lens[:, None, None])

    def visible_pairs(self) -> Tensor:
        """`[P]` int64: the (query, key) pairs that are seen: the useful work."""
        if self.kv_lens is not None:
            rows = range(0, self.queries.shape[0], 1024)
            zero = torch.zeros(len(self.kv_lens), dtype=torch.int64, device=self.keys.device)
            return sum((self.mask(slice(r, r + 1024)).sum((1, 2)) for r in rows), start=zero)
        lo, hi, kept = reach(self.queries, self.window, self.stride, self.chunk, self.sink)
        text = self.queries[:, 0] < 0
        frames = (hi[:, 1] - torch.maximum(lo[:, 1], kept)).clamp_min(0)
        area = self.queries[:, 5] * self.queries[:, 6]
        video = frames * (hi[:, 2] - lo[:, 2]) * (hi[:, 3] - lo[:, 3]) + kept * area
        video = video + (self.keys[:, 0] < 0).sum()
        return torch.where(text, self.keys.shape[0], video).sum()[None]

    def computed_pairs(self) -> Tensor:
        """`[P]` int64: the pairs in the visited tiles: the work a kernel does."""
        return self.counts.sum(-1, dtype=torch.int64) * self.tile_pairs

    def flops(self, heads: int, width: int) -> tuple[Tensor, Tensor]:
        """Useful and computed floating-point operations of the forward for one clip of the batch, each `[P]`."""
        return 4 * heads * width * self.visible_pairs(), 4 * heads * width * self.computed_pairs()


def attention_plan(
    q_len: int,
    k_len: int | None = None,
    *,
    grid: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    causal: str | int | None = None,
    sink: int = 0,
    text_len: int = 0,
    text_at: str = "end",
    kv_lens: Tensor | None = None,
    tile: int | Sequence[int] = 128,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """The plan of `spacetime_attention` for `q_len` queries and `k_len` keys (None: as many).

    The modes are those of `spacetime_attention`. tile: tokens of a tile, or a triple: the box of the video grid it
    covers (text then comes in runs of as many tokens). device: where the plan is built; None: that of `kv_lens`, else
    torch's default. Raises ValueError or TypeError naming the argument.
    """
    op = "attention_plan"
    k_len = q_len if k_len is None else k_len
    for name, n in (("q_len", q_len), ("k_len", k_len)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{op}: {name} must be an integer of at least 0; got {n!r}")
    check_kv_lens(op, kv_lens, k_len)
    flat, window, stride, chunk, sink, text_len, text_first = resolve(
        op, q_len, k_len, grid, grids, window, stride, causal, sink, text_len, text_at
    )
    tile = _check.triple(op, "tile", (tile,) * 3)[0] if isinstance(tile, int) else _check.triple(op, "tile", tile)
    if device is None:
        device = torch.get_default_device() if kv_lens is None else kv_lens.device
    device = torch.device(device)
    clips = [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]
    queries, keys = (token_table(n, clips, text_len, text_first, device) for n in (q_len, k_len))
    present = [((q_len - text_len) // (clip[1] * clip[2]), *clip[1:]) for clip in clips] if len(clips) == 1 else clips
    q_tile, Nq = _tiles(queries, present, tile)
    k_tile, Nk = _tiles(keys, clips, tile)

    lo, hi, kept = reach(queries, window, stride, chunk, sink)
    bounds = torch.cat((lo, hi, kept[:, None]), -1)
    least, most = _extremes(bounds, q_tile, Nq)
    some_lo, some_hi, some_kept = least[:, None, :4], most[:, None, 4:8], most[:, None, 8]
    all_lo, all_hi, all_kept = most[:, None, :4], least[:, None, 4:8], least[:, None, 8]
    text = keys[:, 0] < 0
    first, _ = _extremes(keys[:, :4].masked_fill(text[:, None], FAR), k_tile, Nk)
    _, last = _extremes(keys[:, :4].masked_fill(text[:, None], -FAR), k_tile, Nk)
    has_text = _extremes(text[:, None].long(), k_tile, Nk)[1][:, 0] == 1

    touched = (last >= some_lo) & (first < some_hi)
    inside = (first >= all_lo) & (last < all_hi)
    some = touched.all(-1) | (touched[..., 0] & (first[:, 1] < some_kept)) | has_text
    whole = inside.all(-1) | (inside[..., 0] & (last[:, 1] < all_kept))
    some, whole = some[None], whole[None]
    if kv_lens is not None:
        index = torch.arange(k_len, device=device)[:, None]
        begin, end = (e[:, 0] for e in _extremes(index, k_tile, Nk))
        some, whole = some & (begin < kv_lens[:, None, None]), whole & (end < kv_lens[:, None, None])
    kinds = some.int() + (some & whole).int()
    order = torch.argsort(kinds == 0, dim=-1, stable=True)
    kinds = kinds.gather(-1, order)
    return AttentionPlan(
        key_tiles=order.int().masked_fill(kinds == 0, -1), kinds=kinds, counts=(kinds > 0).sum(-1, dtype=torch.int32),
        q_tile=q_tile.int(), k_tile=k_tile.int(), queries=queries, keys=keys, window=tuple(window),
        stride=tuple(stride), chunk=chunk, sink=sink, kv_lens=kv_lens,
        tile_pairs=(tile if isinstance(tile, int) else math.prod(tile)) ** 2,
    )  # fmt: skip


def resolve(
    op: str, q_len: int, k_len: int, grid, grids, window, stride, causal, sink, text_len, text_at
) -> tuple[list[int], list[int], list[int], int, int, int, bool]:
    """The mode in the form the ops take: (grids flat, window, stride, chunk, sink, text_len, text_first).

    A mode that hides nothing comes out as plain attention: no grids. Raises ValueError naming the argument.
    """
    if grid is not None and grids is not None:
        raise ValueError(f"{op}: give grid (one clip size) or grids (packed clips), not both")
    stride = _check.triple(op, "stride", (stride,) * 3 if isinstance(stride, int) else stride)
    window = None if window is None else _check.triple(op, "window", window)
    chunk = 0 if causal is None else 1 if causal == "frame" else causal
    if causal is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"{op}: causal must be None, 'frame' or a number of frames per chunk >= 1; got {causal!r}")
    _check.choice(op, "text_at", text_at, ("end", "start"))
    for name, n in (("sink", sink), ("text_len", text_len)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{op}: {name} must be an integer of at least 0; got {n!r}")
    if grid is None and grids is None:
        rules = dict(window=window is not None, causal=chunk > 0, sink=sink > 0, text_len=text_len > 0)
        for name, given in rules.items():
            if given:
                raise ValueError(f"{op}: {name} needs grid=(T, H, W) (or grids) to know where the tokens are; got none")
    if window is None and max(stride) > 1:
        raise ValueError(
            f"{op}: stride={stride} groups the queries of a window; give window as well, or leave stride 1"
        )
    if grid is not None:
        T, H, W = grid = _check.triple(op, "grid", grid)
        if k_len != T * H * W + text_len:
            raise ValueError(
                f"{op}: grid {grid} and text_len {text_len} make {T * H * W + text_len} key tokens; k has {k_len}"
            )
        frames, rest = (q_len - text_len) // (H * W), (q_len - text_len) % (H * W)
        if rest or not 0 <= frames <= T:
            raise ValueError(
                f"{op}: q must hold text_len={text_len} text tokens and 0 to {T} whole frames of {H} x {W} tokens "
                f"(grid is that of the keys); got {q_len} tokens"
            )
        clips = [grid]
    else:
        clips = [_check.triple(op, f"grids[{i}]", g) for i, g in enumerate(grids or ())]
        total = sum(math.prod(g) for g in clips)
        if grids is not None and not (q_len == k_len == total):
            raise ValueError(f"{op}: grids {clips} hold {total} tokens; q has {q_len} and k has {k_len}")
        if grids is not None and text_len:
            raise ValueError(
                f"{op}: text_len must be 0 with grids: text would join clips that do not see each other; got {text_len}"
            )
    if window is not None and not chunk and all(w >= n for g in clips for w, n in zip(window, g, strict=True)):
        window = None
    if len(clips) < 2 and window is None and not chunk:
        clips, sink = [], 0
    return [n for g in clips for n in g], list(window or ()), list(stride), chunk, sink, text_len, text_at == "start"


def check_kv_lens(op: str, kv_lens: Tensor | None, k_len: int) -> None:
    """Raises TypeError or ValueError naming kv_lens. Values are looked at on the CPU only, and not while compiling."""
    if kv_lens is None:
        return
    if not isinstance(kv_lens, Tensor) or kv_lens.dtype not in (torch.int32, torch.int64):
        got = kv_lens.dtype if isinstance(kv_lens, Tensor) else type(kv_lens).__name__
        raise TypeError(f"{op}: kv_lens must be an int32 or int64 tensor [B]; got {got}")
    if kv_lens.ndim != 1:
        raise ValueError(f"{op}: kv_lens must be [B], one length per batch; got shape {_check.shape_of(kv_lens)}")
    if kv_lens.is_cpu and kv_lens.numel() and not torch.compiler.is_compiling():
        least, most = (int(n) for n in kv_lens.aminmax())
        if least < 0 or most > k_len:
            raise ValueError(f"{op}: kv_lens must lie between 0 and Sk={k_len}; got {least} to {most}")


def _tiles(tokens: Tensor, sizes: Sequence[Sequence[int]], tile: int | tuple[int, ...]) -> tuple[Tensor, int]:
    """The tile of each token and the number of tiles; `sizes` are the clips' sizes as far as they are present."""
    length, volume = tokens.shape[0], tile if isinstance(tile, int) else math.prod(tile)
    if isinstance(tile, int):
        return torch.arange(length, device=tokens.device) // volume, -(-length // volume)
    clip, t, h, w, T = tokens[:, :5].unbind(-1)
    text = clip < 0
    number, total = (text.cumsum(0) - 1) // volume, 0
    for i, size in enumerate(sizes):
        boxes = [-(-n // side) for n, side in zip(size, tile, strict=True)]
        box = ((t - T + size[0]) // tile[0] * boxes[1] + h // tile[1]) * boxes[2] + w // tile[2]
        number = torch.where(clip == i, box + total, number)
        total += math.prod(boxes)
    text_len = length - sum(math.prod(size) for size in sizes)
    return number + text * total, total + -(-text_len // volume)


def _extremes(values: Tensor, tile: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of `values [S, n]` over the tokens of each tile: `[count, n]`."""
    where = tile[:, None].expand_as(values)
    least = values.new_full((count, values.shape[1]), FAR).scatter_reduce(0, where, values, "amin")
    return least, values.new_full((count, values.shape[1]), -FAR).scatter_reduce(0, where, values, "amax")
