"""Triton kernels of the attention's backward: dq by tiles of queries, dk and dv by tiles of keys.

Two kernels of seven matrix products instead of one of five: each gradient is summed by one program in the order of
its plan, so two runs agree bit for bit, without atomics and without partial sums in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import zeros
from . import config
from .kernels_forward import (
    LOG2_E,
    TABLES,
    add_dot,
    arrange,
    describe_all,
    dot_t,
    in_units,
    load_owner,
    load_program,
    load_reach,
    load_rows,
    load_tile,
    load_visited,
    scaled,
    seen,
    store_tile,
    token_at,
    where,
)
from .mode import by_head, splits_groups
from .plan import head_table

ROWS = 64  # queries of a program of the first kernel


@triton.jit
def attention_bwd_rows_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, base_ptr,
    out_stride_b, out_stride_s, out_stride_h, dout_stride_b, dout_stride_s, dout_stride_h,
    tiles, heads, Sq,
    E: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """delta = Σ dout·out − dlse, and the log-sum-exp to base 2, +inf where a query saw nothing: its p is then 0."""
    program = tl.program_id(0)
    token = program % tiles * ROWS + tl.arange(0, ROWS)
    row = (program // tiles).to(tl.int64)
    b, head = row // heads, row % heads
    valid = token < Sq
    out_ptr += (b * out_stride_b + head * out_stride_h) * UNIT
    dout_ptr += (b * dout_stride_b + head * dout_stride_h) * UNIT
    out = load_tile(out_ptr, token, out_stride_s, valid, E, PARTS, UNIT)
    dout = load_tile(dout_ptr, token, dout_stride_s, valid, E, PARTS, UNIT)
    delta = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), 1)
    if len(PARTS) == 2:
        delta += tl.sum(out[1].to(tl.float32) * dout[1].to(tl.float32), 1)
    at = row * Sq + token
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, valid, 0.0)
    lse = tl.load(lse_ptr + at, valid, 0.0)
    tl.store(delta_ptr + at, delta, valid)
    tl.store(base_ptr + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), valid)


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, k_box, v_box, delta_ptr, base_ptr, dq_ptr, kv_lens_ptr, heads_ptr,
    rows_ptr, tiles_ptr, reach_ptr, own_ptr, visit_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    owners, chosen, heads, groups, Sq, Sk, scale, scale_2,
    E: tl.constexpr, PARTS: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr, AXES: tl.constexpr,
    RUNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq = scale · ds k with ds = p ∘ (dout vᵀ − delta), for one tile of queries of one head."""
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
    dout_ptr += (b * dout_stride_b + head * dout_stride_h) * UNIT

    at = token_at(own_ptr, token, valid)
    q = load_tile(q_ptr, at, q_stride_s, valid, E, PARTS, UNIT)
    dout = load_tile(dout_ptr, at, dout_stride_s, valid, E, PARTS, UNIT)
    row = (b * heads + head) * Sq + at
    base = tl.load(base_ptr + row, valid, 0.0)[:, None]
    delta = tl.load(delta_ptr + row, valid, 0.0)[:, None]
    dq = zeros(QUERIES, PARTS)

    if begin < masked:  # as around the loops of the forward
        for e in range(begin, masked):
            origin, key = load_visited(tiles_ptr, e, H, W, VISIT, RUNS)
            key = token_at(visit_ptr, key, None)
            k = load_rows(k_ptr, k_box, origin, start, H, W, b, key_head, key, k_stride_s, None, E, PARTS, UNIT, VISIT)
            v = load_rows(v_ptr, v_box, origin, start, H, W, b, key_head, key, v_stride_s, None, E, PARTS, UNIT, VISIT)
            p = tl.exp2(dot_t(q, k) * scale_2 - base)
            dq = add_dot(dq, p * (dot_t(dout, v) - delta), k)

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
            p = tl.exp2(dot_t(q, k) * scale_2 - base)
            see = seen(reach, origin, key, start, visit_end, stop, key_end, H, W, PLANNED, VISIT, AXES, RUNS)
            p = tl.where(see, p, 0.0)
            dq = add_dot(dq, p * (dot_t(dout, v) - delta), k)

    # dq is dense [B, Sq, H, E]
    store_tile(dq_ptr + (b * Sq * heads + head) * E, at, heads * E, valid, scaled(dq, scale), E)


@triton.jit
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, q_box, dout_box, delta_ptr, base_ptr, dk_ptr, dv_ptr, kv_lens_ptr, heads_ptr,
    rows_ptr, tiles_ptr, reach_ptr, own_ptr, visit_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    owners, chosen, heads, groups, shares, Sq, Sk, scale, scale_2,
    E: tl.constexpr, PARTS: tl.constexpr, OWN: tl.constexpr, VISIT: tl.constexpr, AXES: tl.constexpr,
    RUNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dv = pᵀ dout and dk = scale · dsᵀ q, for one tile of keys of one key head, summed over its query heads.

    Where those keep different rules each gives a share of its own: groups is 1, and `shares` of them have one key head.
    """
    KEYS: tl.constexpr = OWN[0] * OWN[1] * OWN[2]
    PLANNED: tl.constexpr = rows_ptr is not None
    key_heads = heads // groups
    owner, key_head, b = load_program(heads_ptr, owners, chosen)

    begin, masked, end, start, visit_end, stop, H, W, key, valid = load_owner(rows_ptr, owner, Sk, Sq, OWN, VISIT, RUNS)
    reach = None
    if PLANNED:
        reach = load_reach(reach_ptr, key[:, None], valid[:, None], Sk)
    real = valid
    if kv_lens_ptr is not None:
        real = valid & (key < tl.load(kv_lens_ptr + b).to(tl.int32))
    k_ptr += (b * k_stride_b + key_head // shares * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + key_head // shares * v_stride_h) * UNIT
    at_key = token_at(own_ptr, key, valid)
    k = load_tile(k_ptr, at_key, k_stride_s, real, E, PARTS, UNIT)
    v = load_tile(v_ptr, at_key, v_stride_s, real, E, PARTS, UNIT)
    dk = zeros(KEYS, PARTS)
    dv = zeros(KEYS, PARTS)

    for group in range(groups):
        head = key_head * groups + group
        q_head = q_ptr + (b * q_stride_b + head * q_stride_h) * UNIT
        dout_head = dout_ptr + (b * dout_stride_b + head * dout_stride_h) * UNIT
        base_head = base_ptr + (b * heads + head) * Sq
        delta_head = delta_ptr + (b * heads + head) * Sq

        if begin < end:  # as around the loops of the forward
            for e in range(begin, end):
                origin, token = load_visited(tiles_ptr, e, H, W, VISIT, RUNS)
                there = token < Sq
                at = token_at(visit_ptr, token, there)
                q = load_rows(q_head, q_box, origin, start, H, W, b, head, at, q_stride_s, there, E, PARTS, UNIT, VISIT)
                dout = load_rows(
                    dout_head, dout_box, origin, start, H, W, b, head, at, dout_stride_s, there, E, PARTS, UNIT, VISIT
                )
                p = tl.exp2(dot_t(k, q) * scale_2 - tl.load(base_head + at, there, 0.0)[None, :])
                if e >= masked:
                    see = seen(reach, origin, token, start, visit_end, stop, Sq, H, W, PLANNED, VISIT, AXES, RUNS)
                    p = tl.where(see, p, 0.0)
                dv = add_dot(dv, p, dout)
                ds = p * (dot_t(v, dout) - tl.load(delta_head + at, there, 0.0)[None, :])
                dk = add_dot(dk, ds, q)

    dk = scaled(dk, scale)
    if kv_lens_ptr is not None:  # padding may have met anything; its gradient is 0
        dk, dv = where(real, dk), where(real, dv)
    # dk, dv are dense [B, Sk, Hk, E], Hk the shares
    head_at = (b * Sk * key_heads + key_head) * E
    store_tile(dk_ptr + head_at, at_key, key_heads * E, valid, dk, E)
    store_tile(dv_ptr + head_at, at_key, key_heads * E, valid, dv, E)


def spacetime_attention_bwd(dout, dlse, q, k, v, out, lse, kv_lens, *args) -> None:
    *mode, scale, _, dq, dk, dv = args  # one order is all it has, `deterministic` or not
    B, Sq, H, E = q.shape
    Sk, key_heads = k.shape[1:3]
    padded = kv_lens is not None
    settings = E, q.dtype, config.capability(q.device)
    widths = dict(E=E, PARTS=config.parts(E))

    delta, base = torch.empty((2, B, H, Sq), dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(Sq, ROWS)
    strides, unit = in_units(out, dout)
    if B * H * Sq:
        attention_bwd_rows_kernel[(tiles * B * H,)](
            out, dout, lse, dlse, delta, base, *strides, tiles, H, Sq,
            **widths, UNIT=unit, ROWS=ROWS, LOG2_E=LOG2_E, num_warps=4,
        )  # fmt: skip
    strides, unit = in_units(q, k, v, dout)
    for heads, rule in by_head(mode, H) if dq is not None and B * H * Sq else ():
        tile = config.backward_queries(*settings, bool(rule[0]))
        planned, owners, size = arrange(q, k, rule, tile, False, padded)
        boxes = describe_all(tile, planned, size, padded, k, v)
        tables = [planned.pop(name) for name in TABLES]
        attention_bwd_dq_kernel[(owners * B * len(heads),)](
            q, k, v, dout, *boxes, delta, base, dq, kv_lens, head_table(heads, H, q.device), *tables, *strides,
            owners, len(heads), H, H // key_heads, Sq, Sk, scale, scale * LOG2_E,
            **widths, **planned, UNIT=unit,
        )  # fmt: skip
    if (dk is None and dv is None) or B * H * Sk == 0:
        return
    groups, shares, rules = H // key_heads, 1, by_head(mode, H)
    if splits_groups(mode, H, groups):
        groups, shares = 1, groups
    shape, dtype = (k.shape, k.dtype) if shares == 1 else ((B, Sk, H, E), torch.float32)
    dk_parts, dv_parts = (
        torch.empty(shape, dtype=dtype, device=k.device) if d is None or shares > 1 else d for d in (dk, dv)
    )
    for heads, rule in rules:
        tile = config.backward_keys(*settings, bool(rule[0]))
        planned, owners, size = arrange(q, k, rule, tile, True, padded)
        boxes = describe_all(tile, planned, size, padded, q, dout)
        tables = [planned.pop(name) for name in TABLES]
        heads = tuple(h // groups for h in heads[::groups])
        attention_bwd_dkdv_kernel[(owners * B * len(heads),)](
            q, k, v, dout, *boxes, delta, base, dk_parts, dv_parts, kv_lens,
            head_table(heads, H // groups, q.device), *tables, *strides,
            owners, len(heads), H, groups, shares, Sq, Sk, scale, scale * LOG2_E,
            **widths, **planned, UNIT=unit,
        )  # fmt: skip
    for total, parts in ((dk, dk_parts), (dv, dv_parts)) if shares > 1 else ():
        if total is not None:
            total.copy_(parts.unflatten(2, (-1, shares)).sum(3))
