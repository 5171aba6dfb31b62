"""Triton kernel of the attention's forward, and what the backward's kernels share with it.

One engine serves every mode: a program owns a tile of queries and works off the tiles of keys that the plan lists for
it, first those that are seen whole, then those masked by the coordinates of their tokens (`plan.AttentionPlan`).
A tile's tokens are read where they lie, by their addresses or as one box through the TMA. Without a plan attention is
dense and a tile is a run of the sequence.

A head of width E is held in one or two parts whose widths are powers of two, 96 as 64 + 32: tuples of tensors below.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._triton import multiply_add, zeros
from . import config
from .mode import Box, by_head
from .plan import head_table, plan

FAR = tl.constexpr(1 << 30)
LOG2_E = 1.4426950408889634
TABLES = ("rows_ptr", "tiles_ptr", "reach_ptr", "own_ptr", "visit_ptr")  # of a plan, as the kernels take them
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(ptr, token, stride, mask, E: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """Rows `token` of a tensor [tokens, E], dense in E, as a tuple of its parts; 0 where masked. mask may be None.

    Strides count in UNITs: a compiler that knows that 72 is a multiple of 8 loads 16 bytes at a time.
    """
    rows = ptr + token.to(tl.int64)[:, None] * stride * UNIT
    if len(PARTS) == 1:
        return (load_columns(rows, mask, 0, E, PARTS[0]),)
    else:
        return (load_columns(rows, mask, 0, E, PARTS[0]), load_columns(rows, mask, PARTS[0], E, PARTS[1]))


@triton.jit
def load_columns(rows, mask, FIRST: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH <= E:
        if mask is None:
            return tl.load(rows + cols[None, :])
        else:
            return tl.load(rows + cols[None, :], mask=mask[:, None], other=0.0)
    else:
        inside = (cols < E)[None, :]
        if mask is not None:
            inside = inside & mask[:, None]
        return tl.load(rows + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, token, stride, mask, parts, E: tl.constexpr):
    rows = ptr + token.to(tl.int64)[:, None] * stride
    for i in tl.static_range(len(parts)):
        cols = (i * parts[0].shape[1]) + tl.arange(0, parts[i].shape[1])
        inside = mask[:, None] & (cols < E)[None, :]
        tl.store(rows + cols[None, :], parts[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_t(a, b):
    """a bᵀ over all parts of the head: [rows of a, rows of b]."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        product = multiply_add(a[1], tl.trans(b[1]), product)
    return product


@triton.jit
def add_dot(sums, p, x):
    """sums + p x, part by part; p is rounded to x's dtype, as every matrix product on tensor cores must be."""
    p = p.to(x[0].dtype)
    first = multiply_add(p, x[0], sums[0])
    if len(sums) == 1:
        return (first,)
    else:
        return (first, multiply_add(p, x[1], sums[1]))


@triton.jit
def scaled(parts, factor):
    """Each row times its factor [rows, 1], or all times one."""
    if len(parts) == 1:
        return (parts[0] * factor,)
    else:
        return (parts[0] * factor, parts[1] * factor)


@triton.jit
def where(mask, parts):
    """The rows of the mask; 0 elsewhere, also where there is no number."""
    if len(parts) == 1:
        return (tl.where(mask[:, None], parts[0], 0.0),)
    else:
        return (tl.where(mask[:, None], parts[0], 0.0), tl.where(mask[:, None], parts[1], 0.0))


@triton.jit
def tile_tokens(origin, H, W, BOX: tl.constexpr, RUNS: tl.constexpr):
    """The tokens of the box that begins at `origin` in a video [T, H, W], or of the run that begins at ~origin."""
    j = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    offset = (j // (BOX[1] * BOX[2])) * (H * W) + (j // BOX[2] % BOX[1]) * W + j % BOX[2]
    if RUNS:
        offset = tl.where(origin < 0, j, offset)
        origin = tl.where(origin < 0, ~origin, origin)
    return origin + offset


@triton.jit
def tile_places(origin, start, H, W, BOX: tl.constexpr):
    """(t, h, w) of the tokens of a box; beyond an edge of the clip they count on. A run is in no box: w is FAR."""
    j = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    at = origin - start
    t = at // (H * W) + j // (BOX[1] * BOX[2])
    h = at // W % H + j // BOX[2] % BOX[1]
    w = tl.where(origin < 0, FAR, at % W) + j % BOX[2]
    return t, h, w


@triton.jit
def tile_valid(origin, token, start, end, H, W, BOX: tl.constexpr):
    """Which tokens of a tile lie in `[start, end)` and, if it is a box, inside the frame: not in the line below."""
    _, h, w = tile_places(origin, start, H, W, BOX)
    return (token < end) & (tl.where(origin < 0, 0, h) < H) & (tl.where(origin < 0, 0, w) < W)


@triton.jit
def load_program(heads_ptr, owners, chosen):
    """What a program works on: an owner, one of the `chosen` heads that a launch lists (None: all), a batch's entry."""
    program = tl.program_id(0)
    head = program // owners % chosen
    if heads_ptr is not None:
        head = tl.load(heads_ptr + head)
    return program % owners, head.to(tl.int64), (program // owners // chosen).to(tl.int64)


@triton.jit
def load_owner(rows_ptr, owner, own_len, visit_len, OWN: tl.constexpr, VISIT: tl.constexpr, RUNS: tl.constexpr):
    """Row `owner` of the plan, its columns by their names, with the owner's tokens and which of them exist.

    Without a plan it owns a run of the sequence and visits all of the other.
    """
    if rows_ptr is None:
        STEP: tl.constexpr = VISIT[0] * VISIT[1] * VISIT[2]
        token = owner * (OWN[0] * OWN[1] * OWN[2]) + tl.arange(0, OWN[0] * OWN[1] * OWN[2])
        return 0, visit_len // STEP, tl.cdiv(visit_len, STEP), 0, 0, 0, 1, visit_len, token, token < own_len
    else:
        row = rows_ptr + owner * 11
        begin, masked, end, origin = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        own_start, own_end, start, visit_end = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        stop, H, W = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
        token = tile_tokens(origin, H, W, OWN, RUNS)
        valid = tile_valid(origin, token, own_start, own_end, H, W, OWN)
        return begin, masked, end, start, visit_end, stop, H, W, token, valid


@triton.jit
def load_visited(tiles_ptr, e, H, W, VISIT: tl.constexpr, RUNS: tl.constexpr):
    """The e-th visited tile and its tokens; without a plan, of the whole sequence."""
    if tiles_ptr is None:
        origin = e * (VISIT[0] * VISIT[1] * VISIT[2])
        return origin, origin + tl.arange(0, VISIT[0] * VISIT[1] * VISIT[2])
    else:
        origin = tl.load(tiles_ptr + e)
        return origin, tile_tokens(origin, H, W, VISIT, RUNS)


@triton.jit
def token_at(tokens_ptr, place, mask):
    """The tokens at these places of a dilated plan; without a table a place is a token."""
    if tokens_ptr is None:
        return place
    elif mask is None:
        return tl.load(tokens_ptr + place)
    else:
        return tl.load(tokens_ptr + place, mask, 0)


@triton.jit
def load_rows(
    ptr, box, origin, start, H, W, b, head, token, stride, mask,
    E: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, VISIT: tl.constexpr,
):  # fmt: skip
    """The rows of a visited tile: by their addresses or, given a descriptor [B, T, H, W, heads · E], as one box.

    A box that crosses an edge of the frame is zero beyond it, where the addresses give the next line.
    """
    if box is None:
        return load_tile(ptr, token, stride, mask, E, PARTS, UNIT)
    else:
        at = origin - start
        rows = box.load([b.to(tl.int32), at // (H * W), at // W % H, at % W, (head * E).to(tl.int32)])
        return (rows.reshape([VISIT[0] * VISIT[1] * VISIT[2], E]),)


@triton.jit
def load_reach(reach_ptr, token, mask, own_len):
    """lo and hi along t, h, w, and `kept`, of the owner's tokens; those that nobody uses are not loaded."""
    p = reach_ptr + token
    return (
        tl.load(p, mask, 0), tl.load(p + own_len, mask, 0), tl.load(p + 2 * own_len, mask, 0),
        tl.load(p + 3 * own_len, mask, 0), tl.load(p + 4 * own_len, mask, 0), tl.load(p + 5 * own_len, mask, 0),
        tl.load(p + 6 * own_len, mask, 0),
    )  # fmt: skip


@triton.jit
def seen(
    reach, origin, token, start, visit_end, stop, length, H, W,
    PLANNED: tl.constexpr, VISIT: tl.constexpr, AXES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Bool [owner's tokens, visited tokens]: which of them see each other. length: tokens there are on that side."""
    if PLANNED:
        t, h, w = tile_places(origin, start, H, W, VISIT)
        see = (w[None, :] >= reach[4]) & (w[None, :] < reach[5])
        if AXES[1]:
            see = see & (h[None, :] >= reach[2]) & (h[None, :] < reach[3])
        if AXES[0]:
            see = see & (t[None, :] >= reach[0]) & (t[None, :] < reach[1])
        if RUNS:
            first = tl.where(origin < 0, ~origin, origin)
            length = tl.minimum(length, tl.where(first < start, start, stop))  # text before the video ends with it
            base = tl.where(first >= visit_end, FAR, start)  # text after the video is before all frames
            position = token - tl.where(origin < 0, base, -FAR)  # and a box is behind them
            see = see | (position[None, :] < reach[6])
        return see & (token < length)[None, :]
    else:
        return (token < length)[None, :]


@triton.jit
def online_softmax(sums, top, total, scores, v, scale, MASKED: tl.constexpr):
    """One tile of keys of softmax(scale · scores) v: `top` and `total` are the running maximum and Σ exp2."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = new_top
    if MASKED:  # a query may have seen nothing yet
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(top - shift)
    return add_dot(scaled(sums, decay[:, None]), p, v), new_top, total * decay + tl.sum(p, 1)


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_box, v_box, out_ptr, lse_ptr, kv_lens_ptr, heads_ptr, rows_ptr, tiles_ptr, reach_ptr,
    own_ptr, visit_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    owners, chosen, heads, groups, Sq, Sk, scale,
    E: tl.constexpr, PARTS: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr, AXES: tl.constexpr,
    RUNS: tl.constexpr, NEGATIVE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale · q kᵀ) v over the keys seen, and its log-sum-exp, for one tile of queries of one head.

    scale is that of exp2 and positive; NEGATIVE turns its sign.
    """
    QUERIES: tl.constexpr = OWN[0] * OWN[1] * OWN[2]
    PLANNED: tl.constexpr = rows_ptr is not None
    owner, head, b = load_program(heads_ptr, owners, chosen)
    key_head = head // groups

    key_end = Sk
    if kv_lens_ptr is not None:
        key_end = tl.load(kv_lens_ptr + b).to(tl.int32)
    begin, masked, end, start, visit_end, stop, H, W, token, valid = load_owner(
        rows_ptr, owner, Sq, key_end, OWN, VISIT, RUNS
    )
    if PLANNED and kv_lens_ptr is not None:  # "seen whole" was promised for keys that are all real
        masked = tl.where(key_end < visit_end, begin, masked)
    k_ptr += (b * k_stride_b + key_head * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + key_head * v_stride_h) * UNIT
    q_ptr += (b * q_stride_b + head * q_stride_h) * UNIT

    at = token_at(own_ptr, token, valid)
    q = load_tile(q_ptr, at, q_stride_s, valid, E, PARTS, UNIT)
    if NEGATIVE:
        q = scaled(q, -1)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = zeros(QUERIES, PARTS)

    # The branches around the loops: where a loop may be skipped, the zeros that go past it would meet the sums still in
    # flight before these are waited for, and ptxas then waits after every single wgmma.
    if begin < masked:
        for e in range(begin, masked):
            origin, key = load_visited(tiles_ptr, e, H, W, VISIT, RUNS)
            key = token_at(visit_ptr, key, None)
            k = load_rows(k_ptr, k_box, origin, start, H, W, b, key_head, key, k_stride_s, None, E, PARTS, UNIT, VISIT)
            v = load_rows(v_ptr, v_box, origin, start, H, W, b, key_head, key, v_stride_s, None, E, PARTS, UNIT, VISIT)
            sums, top, total = online_softmax(sums, top, total, dot_t(q, k), v, scale, False)

    reach = None
    if PLANNED:
        reach = load_reach(reach_ptr, token[:, None], valid[:, None], Sq)
    if masked < end:
        for e in range(masked, end):
            origin, key = load_visited(tiles_ptr, e, H, W, VISIT, RUNS)
            real = key < key_end
            at_key = token_at(visit_ptr, key, real)
            k = load_rows(
                k_ptr, k_box, origin, start, H, W, b, key_head, at_key, k_stride_s, real, E, PARTS, UNIT, VISIT
            )
            v = load_rows(
                v_ptr, v_box, origin, start, H, W, b, key_head, at_key, v_stride_s, real, E, PARTS, UNIT, VISIT
            )
            scores = dot_t(q, k)
            see = seen(reach, origin, key, start, visit_end, stop, key_end, H, W, PLANNED, VISIT, AXES, RUNS)
            scores = tl.where(see, scores, float("-inf"))
            sums, top, total = online_softmax(sums, top, total, scores, v, scale, True)

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = scaled(sums, (1.0 / total)[:, None])
    # out is dense [B, Sq, H, E], lse [B, H, Sq]
    store_tile(out_ptr + (b * Sq * heads + head) * E, at, heads * E, valid, out, E)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + (b * heads + head) * Sq + at, lse, mask=valid)


def describe(x, visit, size: tuple[int, int, int]) -> TensorDescriptor | None:
    """x [B, S, heads, E] as [B, T, H, W, heads · E], of which the TMA loads boxes `visit`; None where it cannot."""
    B, S, heads, E = x.shape
    T, H, W = size
    b, s, h = (step if n > 1 else heads * E for n, step in zip(x.shape, x.stride()[:3], strict=False))
    strides = [b, H * W * s, W * s, s]
    aligned = all(n * x.element_size() % 16 == 0 for n in (*strides, E)) and x.data_ptr() % 16 == 0
    side_by_side = min(strides) >= heads * E and (heads == 1 or h == E)
    if not (aligned and side_by_side) or config.parts(E) != (E,) or x.numel() == 0 or max(visit) > 256:
        return None
    return TensorDescriptor(x, [B, T, H, W, heads * E], [*strides, 1], [1, *visit, E])


def describe_all(tile, planned, size, padded: bool, *visited) -> list[TensorDescriptor | None]:
    """The descriptors of what a kernel visits where its tile asks for them; `size` as `arrange` gives it."""
    if not tile.descriptors or size is None or padded:  # what kv_lens hides may be NaN, and would be read
        return [None for _ in visited]
    return [describe(x, planned["VISIT"], size) for x in visited]


def in_units(*tensors) -> tuple[list[int], int]:
    """The strides of all axes but the last, and the unit they are counted in: 16 elements or the most that fits all."""
    strides = [0 if n == 1 else step for t in tensors for n, step in zip(t.shape[:3], t.stride()[:3], strict=True)]
    unit = math.gcd(16, *strides)
    return [step // unit for step in strides], unit


def arrange(q, k, mode, tile, transposed: bool, padded: bool) -> tuple[dict, int, Box | None]:
    """The plan's arguments of a kernel, how many owners there are, and the sides of what they visit if it is one box.

    mode: of one rule, from `grids` to `text_first`.
    """
    own, visit = (tile.keys, tile.queries) if transposed else (tile.queries, tile.keys)
    if not mode[0]:
        own_len = k.shape[1] if transposed else q.shape[1]
        nothing = dict.fromkeys(TABLES)
        settings = dict(OWN=(1, 1, own), VISIT=(1, 1, visit), AXES=(False,) * 3, RUNS=False)
        launch = dict(num_warps=tile.warps, num_stages=tile.stages)
        return nothing | settings | launch, -(-own_len // own), (1, 1, q.shape[1] if transposed else k.shape[1])
    p = plan(q.shape[1], k.shape[1], *mode, tile.halves(own), visit, transposed, padded, q.device)
    tables = dict(zip(TABLES, (p.rows, p.tiles, p.reach, p.own_tokens, p.visit_tokens), strict=True))
    settings = dict(OWN=p.own_box, VISIT=p.visit_box, AXES=p.axes, RUNS=p.runs)
    warps = tile.warps * math.prod(p.own_box) // own
    return tables | settings | dict(num_warps=warps, num_stages=tile.stages), p.rows.shape[0], p.visit_size


def spacetime_attention_fwd(q, k, v, kv_lens, *args) -> None:
    *mode, scale, out, lse = args
    B, Sq, H, E = q.shape
    if B * Sq * H == 0:
        return
    strides, unit = in_units(q, k, v)
    for heads, rule in by_head(mode, H):
        tile = config.forward(E, q.dtype, config.capability(q.device), bool(rule[0]))
        planned, owners, size = arrange(q, k, rule, tile, False, kv_lens is not None)
        tables = [planned.pop(name) for name in TABLES]
        boxes = describe_all(tile, planned, size, kv_lens is not None, k, v)
        attention_fwd_kernel[(owners * B * len(heads),)](
            q, k, v, *boxes, out, lse, kv_lens, head_table(heads, H, q.device), *tables, *strides,
            owners, len(heads), H, H // k.shape[2], Sq, k.shape[1],
            max(abs(scale) * LOG2_E, 1e-30),  # 0 would make NaN of the -inf of a hidden key
            E=E, PARTS=config.parts(E), UNIT=unit, NEGATIVE=scale < 0, **planned,
        )  # fmt: skip
