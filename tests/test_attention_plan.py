"""attention_plan: every pair that is seen is visited once, what is promised is whole, and nothing waits for a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_attention import MODES, definition

from sora_kernels import attention_plan
from sora_kernels.attention import config
from sora_kernels.attention.mode import resolve
from sora_kernels.attention.plan import plan


def places(origin, box, start, H, W):
    """Tokens of a tile, and t, h, w of each; a run begins at ~origin and lies in no box."""
    j = torch.arange(math.prod(box))
    if origin < 0:
        return ~origin + j, None
    at = origin - start
    t, h, w = at // (H * W) + j // (box[1] * box[2]), at // W % H + j // box[2] % box[1], at % W + j % box[2]
    return start + (t * H + h) * W + w, torch.stack((t, h, w))


def expand(plan):
    """What a kernel makes of the plan: [own, visited] how often each pair is met, and the owners of each token."""
    met = torch.zeros(plan.reach.shape[1], plan.q_len if plan.transposed else plan.k_len, dtype=torch.int32)
    owned = torch.zeros(met.shape[0], dtype=torch.int32)
    for begin, masked, end, origin, own_start, own_end, start, visit_end, stop, H, W in plan.rows.tolist():
        own, place = places(origin, plan.own_box, own_start, H, W)
        inside = own < own_end
        if place is not None:
            inside &= (place[1] < H) & (place[2] < W)
        own = own[inside]
        reach = plan.reach[:, own, None]
        own = own if plan.own_tokens is None else plan.own_tokens[own].long()
        owned[own] += 1
        for e in range(begin, end):
            tile = plan.tiles[e].item()
            token, place = places(tile, plan.visit_box, start, H, W)
            if e < masked:
                limit = stop if tile < 0 else visit_end
                assert token.max() < limit and (place is None or (place[1] < H).all() and (place[2] < W).all())
                see = torch.ones(len(own), len(token), dtype=torch.bool)
            elif place is None:
                position = token - (1 << 30 if ~tile >= visit_end else start)
                see = (position < reach[6]) & (token < (start if ~tile < start else stop))
            else:
                see = (place[:, None] >= reach[:6:2]).all(0) & (place[:, None] < reach[1:6:2]).all(0)
            token = token.clamp_max(met.shape[1] - 1)
            token = token if plan.visit_tokens is None else plan.visit_tokens[token].long()
            met.index_put_((own[:, None], token[None]), see.int(), accumulate=True)
    return met, owned


TILES = [(1, 1), (4, 4), (16, 16), (128, 64), ((1, 2, 2), (1, 2, 4)), ((2, 2, 4), (2, 1, 2))]


@pytest.mark.parametrize("transposed", [False, True], ids=["queries own", "keys own"])
@pytest.mark.parametrize("tile, key_tile", TILES)
@pytest.mark.parametrize("name", MODES)
def test_plan_promises_hold(name, tile, key_tile, transposed):
    q_len, k_len, mode = MODES[name]
    plan = attention_plan(q_len, k_len, **mode, tile=tile, key_tile=key_tile, transposed=transposed)
    mask = definition(name).T if transposed else definition(name)
    met, owned = expand(plan)
    assert (owned == 1).all(), "a token has not one owner"
    assert torch.equal(met, mask.int()), "a visible pair is met once, any other never"
    assert plan.visible_pairs() == mask.sum() <= plan.computed_pairs()
    assert all(t.dtype == torch.int32 for t in (plan.rows, plan.tiles, plan.reach))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_plans_are_built_without_looking_at_numbers(name, padded):
    """On the meta device tensors have none: what builds there needs no synchronisation on a GPU."""
    q_len, k_len, mode = MODES[name]
    if padded and "dilation" in mode:
        pytest.skip("dilation takes no padding")
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


@pytest.mark.parametrize("transposed", [False, True], ids=["queries own", "keys own"])
def test_tiles_are_halved_where_owners_see_little(transposed):
    """128 queries along time are 8 sites of 16 frames, and 7 of 8 pairs in their tile are of different sites."""

    def computed(grid, window, stride, own):
        n, cpu = math.prod(grid), torch.device("cpu")
        form = resolve("test", n, n, grid, None, window, stride, 1, None, 0, 0, "end")
        result = plan(n, n, *form, own, 64, transposed, False, cpu)
        return math.prod(result.own_box), int(result.computed_pairs()) / int(result.visible_pairs())

    halves = config.Tile(128, 64, 8, 2).halves(128)
    assert computed((16, 16, 16), (16, 1, 1), 1, (128,)) == (128, 8)
    assert computed((16, 16, 16), (16, 1, 1), 1, halves) == (64, 4)
    assert computed((16, 16, 16), (1, 16, 16), 1, halves) == (128, 1)
    assert computed((12, 16, 16), (6, 16, 16), (2, 8, 8), halves) == (128, 1), "a tile window keeps large tiles"


def test_a_plan_of_many_tokens_is_small():
    plan = attention_plan(115456, grid=(30, 48, 80), window=(18, 24, 24), stride=(6, 8, 8), text_len=256)
    size = sum(t.numel() * 4 for t in (plan.rows, plan.tiles, plan.reach))
    assert size < 16 * 2**20, f"{size / 2**20:.1f} MiB"


def test_a_plan_shows_its_columns_and_a_summary():
    plan = attention_plan(4098, grid=(8, 16, 32), window=(2, 4, 8), stride=(2, 4, 8), text_len=2, tile=64, key_tile=32)
    table = plan.numpy()
    assert {type(x) for x in table.values()} == {np.ndarray}
    for i, name in enumerate(("begin", "masked", "end", "origin", "own_start", "own_end", "start", "visit_end")):
        assert (table[name] == plan.rows[:, i].numpy()).all(), name
    assert (table["H"] == plan.rows[:, 9].numpy()).all() and (table["tiles"] == plan.tiles.numpy()).all()
    text = str(plan)
    seen = 4096 * (64 + 2) + 2 * 4098
    assert "65 tiles of queries (2, 4, 8) visit" in text and "tiles of keys" in text
    assert f"4098 queries x 4098 keys: {seen / 4098**2:.2%} of the pairs are seen" in text
    assert f"forward: {4 * seen:.3g} FLOP useful" in text
    of_keys = str(attention_plan(12, grid=(2, 2, 3), causal="frame", transposed=True))
    assert "tiles of keys" in of_keys.split(" visit ")[0] and "tiles of queries" in of_keys.split(" visit ")[1]
    assert str(attention_plan(0)).startswith("0 tiles")


def test_plan_errors():
    for bad, message in (
        (dict(q_len=8, grid=(2, 2, 3)), "attention_plan: grid"),
        (dict(q_len=-1), "q_len must be an integer of at least 0; got -1"),
        (dict(q_len=3, k_len=2.0), "k_len must be an integer of at least 0; got 2.0"),
        (dict(q_len=12, grid=(2, 2, 3), window=(1, 2, 2), dilation=2, padded=True), "takes no kv_lens"),
        (dict(q_len=12, grid=(2, 2, 3), tile=0), "tile must be an integer of at least 1"),
        (dict(q_len=12, grid=(2, 2, 3), key_tile=(1, 2)), "key_tile must be three integers"),
        (dict(q_len=12, grid=(2, 2, 3), tile=(1, 2, 3)), r"tile must hold a power of two of tokens; got \(1, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_plan(**bad)
