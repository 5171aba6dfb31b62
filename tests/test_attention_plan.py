"""attention_plan: every pair that is seen is visited once, what is promised is whole, and nothing waits for a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from test_attention import MODES, definition

from sora_kernels import attention_plan


def tile_tokens(origin, box, H, W):
    """The tokens of a tile, and (h, w) of each; a run begins at ~origin and has no places."""
    j = torch.arange(math.prod(box))
    if origin < 0:
        return ~origin + j, None
    dt, dh, dw = j // (box[1] * box[2]), j // box[2] % box[1], j % box[2]
    return origin + dt * (H * W) + dh * W + dw, (dh, dw)


def inside(origin, box, start, end, H, W):
    """The tokens of a box or run that lie in the clip `[start, end)` and in the frame."""
    token, place = tile_tokens(origin, box, H, W)
    here = token < end
    if place is not None:
        at = origin - start
        here &= (at // W % H + place[0] < H) & (at % W + place[1] < W)
    return token[here], bool(here.all())


def expand(plan):
    """What a kernel makes of the plan: [own, visited] how often each pair is met, and whether it was promised seen."""
    own_len = plan.reach.shape[1]
    visited_len = plan.q_len if plan.transposed else plan.k_len
    met = torch.zeros(own_len, visited_len, dtype=torch.int32)
    promised, owned = met.bool(), torch.zeros(own_len, dtype=torch.int32)
    for begin, masked, end, origin, own_start, own_end, start, visit_end, stop, H, W in plan.rows.tolist():
        own, _ = inside(origin, plan.own_box, own_start, own_end, H, W)
        owned[own] += 1
        for e in range(begin, end):
            tile = plan.tiles[e].item()
            first = ~tile if tile < 0 else tile
            limit = visit_end if tile >= 0 else start if first < start else stop
            token, complete = inside(tile, plan.visit_box, start, limit, H, W)
            assert e >= masked or complete, "a tile that is promised whole crosses an edge"
            see = torch.ones(len(own), len(token), dtype=torch.bool)
            if tile < 0 and start <= first < visit_end:  # a run inside the clip is its sink
                see = token < start + plan.reach[6, own][:, None]
            met[own[:, None], token] += see
            promised[own[:, None], token] |= see & (e < masked)
    return met, promised, owned


TILES = [(1, 1), (4, 4), (8, 4), (16, 16), (128, 64), ((1, 2, 2), (1, 2, 4)), ((2, 2, 4), (2, 1, 2))]


@pytest.mark.parametrize("transposed", [False, True], ids=["queries own", "keys own"])
@pytest.mark.parametrize("tile, key_tile", TILES)
@pytest.mark.parametrize("name", MODES)
def test_plan_promises_hold(name, tile, key_tile, transposed):
    q_len, k_len, mode = MODES[name]
    plan = attention_plan(q_len, k_len, **mode, tile=tile, key_tile=key_tile, transposed=transposed)
    mask = definition(name).T if transposed else definition(name)
    met, promised, owned = expand(plan)
    assert (owned == 1).all(), "a token has not one owner"
    assert met.max() <= 1, "a pair is visited twice"
    assert (met.bool() | ~mask).all(), "a visible pair is not visited"
    assert not (promised & ~mask).any(), "a whole tile hides a pair"
    assert plan.visible_pairs() == mask.sum() <= plan.computed_pairs()
    assert all(t.dtype == torch.int32 for t in (plan.rows, plan.tiles, plan.reach))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_plans_are_built_without_looking_at_numbers(name, padded):
    """On the meta device tensors have none: what builds there needs no synchronisation on a GPU."""
    q_len, k_len, mode = MODES[name]
    for transposed in (False, True):
        rule = dict(mode, padded=padded, tile=16, key_tile=16, transposed=transposed)
        meta, plan = (attention_plan(q_len, k_len, **rule, device=device) for device in ("meta", "cpu"))
        meta.flops(1, 1)
        for name_ in ("rows", "tiles", "reach"):
            assert getattr(meta, name_).shape == getattr(plan, name_).shape


def test_plans_are_cached_by_shape():
    rule = dict(grid=(4, 4, 4), window=(2, 2, 2))
    assert attention_plan(64, **rule) is attention_plan(64, **rule)
    assert attention_plan(64, **rule) is not attention_plan(64, **rule, transposed=True)


def test_boxes_are_chosen_to_compute_least():
    """A sliding tile is met exactly, an exact window nearly; a window of one axis takes tiles along that axis."""
    sliding = attention_plan(4096, grid=(8, 16, 32), window=(2, 4, 8), stride=(2, 4, 8), tile=64, key_tile=64)
    assert sliding.flops(heads=3, width=16)[0] == sliding.flops(3, 16)[1] == 4 * 3 * 16 * 4096 * 64
    assert (sliding.rows[:, 1] == sliding.rows[:, 2]).all(), "all tiles are seen whole"
    exact = attention_plan(4096, grid=(8, 16, 32), window=(5, 9, 17), tile=64, key_tile=64)
    assert exact.computed_pairs() < 2.5 * exact.visible_pairs()
    temporal = attention_plan(4096, grid=(16, 16, 16), window=(16, 1, 1), tile=64, key_tile=64)
    assert temporal.own_box[0] == temporal.visit_box[0] == 16
    assert temporal.computed_pairs() == 4 * temporal.visible_pairs(), "four sites share a tile"
    spatial = attention_plan(4096, grid=(16, 16, 16), window=(1, 16, 16), tile=64, key_tile=64)
    assert spatial.computed_pairs() == spatial.visible_pairs() and spatial.own_box == (1, 1, 64)


def test_a_plan_of_many_tokens_is_small():
    plan = attention_plan(115456, grid=(30, 48, 80), window=(18, 24, 24), stride=(6, 8, 8), text_len=256)
    size = sum(t.numel() * 4 for t in (plan.rows, plan.tiles, plan.reach))
    assert size < 16 * 2**20, f"{size / 2**20:.1f} MiB"


def test_plan_errors():
    for settings, message in (
        (dict(q_len=8, grid=(2, 2, 3)), "attention_plan: grid"),
        (dict(q_len=-1), "q_len must be an integer of at least 0; got -1"),
        (dict(q_len=3, k_len=2.0), "k_len must be an integer of at least 0; got 2.0"),
        (dict(q_len=12, grid=(2, 2, 3), tile=0), "tile must be at least 1"),
        (dict(q_len=12, grid=(2, 2, 3), key_tile=(1, 2)), "key_tile must be three integers"),
        (dict(q_len=12, grid=(2, 2, 3), tile=(1, 2, 3)), r"tile must hold a power of two of tokens; got \(1, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_plan(**settings)
