"""CUDA C++ of qk_norm_rope and its gradients as nvcc compiles it, executed without a GPU: numbers, bytes, schedules,
refusals."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.planted import planted
from ptx.sweeps import in_turns

from sora_kernels import Unavailable, _dispatch, qk_norm_rope
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

HEADS = [(12, 128), (24, 64), (40, 128), (80, 128), (1, 4096)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def check(q, k, dtype, sm=90, schedule=3, again=6, **keywords) -> ptx.Counters:
    """Both results by the error rule, the same bits under two schedules; what was counted."""
    counted = []
    with nvcc.nvcc_on(sm, lambda name, counters: counted.append(counters), schedule=schedule, again=again):
        actual = qk_norm_rope(q, k, **keywords, impl="cuda")
    double = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in keywords.items()}
    oracle = qk_norm_rope(q.double(), k.double(), **double, impl="reference")
    plain = qk_norm_rope(q, k, **keywords, impl="reference")
    width = q.shape[2] * q.shape[3] if keywords.get("across") == "width" else q.shape[3]
    for name, *found in zip("qk", actual, oracle, plain, strict=True):
        assert found[0].dtype == dtype
        assert_matches_oracle(*found, name, width)
    return counted[0]


def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    phi = torch.randn(shape)
    return phi.cos(), phi.sin()


@pytest.mark.parametrize("H, E, dtype, sm", in_turns(HEADS, DTYPES, list(nvcc.ARCHITECTURES)), ids=str)
def test_across_the_width_each_number_of_warps(H, E, dtype, sm):
    """Of one to eight warps; each byte of q and k is read once, and each sector written whole, by 16 bytes."""
    E = E if dtype != torch.float32 or E < 4096 else 2048
    q, k = draw(1, 6, H, E, dtype=dtype), draw(1, 6, H, E, dtype=dtype)
    weights = dict(q_weight=draw(H * E, dtype=dtype), k_weight=draw(H * E))
    how = dict(grid=(2, 1, 3), origin=(5, 0, 1 << 20)) if E < 2048 else dict(freqs=angles(6, E // 2))
    counters = check(q, k, dtype, sm, across="width", **weights, **how)
    assert counters.written == (q.nbytes + k.nbytes) // 32
    tables = sum(t.nbytes for t in how.get("freqs", ()))
    assert counters.read == (q.nbytes + k.nbytes + tables + sum(w.nbytes for w in weights.values())) // 32


WAYS = {  # of calls with two clips of 7 tokens: heads of q and k, width of a head, the rest
    "more heads of q, layer norm with bias, split halves": (
        (20, 5, 128), lambda: dict(norm="layer", grid=(7, 1, 1), interleaved=False, q_weight=draw(128),
                                   q_bias=draw(128), k_bias=draw(128, dtype=torch.float16)),
    ),
    "heads of 96, of which 64 channels turn, after text": (
        (3, 3, 96), lambda: dict(grid=(1, 5, 1), text_len=2, text_at="start", rotary_dim=64, split=(0, 20, 12),
                                 q_weight=draw(96), k_weight=draw(96)),
    ),
    "split halves of a part, before text": (
        (9, 9, 64), lambda: dict(grid=(1, 1, 6), text_len=1, rotary_dim=32, split=(0, 0, 16), interleaved=False),
    ),
    "a norm alone, rounded as a host does": ((4, 4, 256), lambda: dict(rounding="host", q_weight=draw(256))),
    "angles alone, of a share of the grid": (
        (4, 4, 128), lambda: dict(norm=None, grid=(3, 2, 2), tokens=(4, 11), theta=256.0),
    ),
    "angles of each head and clip, others of k": (
        (4, 2, 64), lambda: dict(freqs=angles(2, 7, 4, 32), k_freqs=angles(7, 32), interleaved=False),
    ),
    "layer norm across the width, angles of each head": (
        (6, 6, 128), lambda: dict(norm="layer", across="width", freqs=angles(7, 6, 64), k_bias=draw(768)),
    ),
    "heads on two ranks": (
        (6, 3, 128), lambda: dict(across="width", width=1536, stats=draw(2, 14).square() + 900, grid=(7, 1, 1),
                                  q_weight=draw(768), k_weight=draw(384)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way, dtype", in_turns(list(WAYS), DTYPES), ids=str)
def test_everything_that_the_op_takes(way, dtype):
    (H, of_k, E), keywords = WAYS[way]
    check(draw(2, 7, H, E, dtype=dtype), draw(2, 7, of_k, E, dtype=dtype) + 3, dtype, **keywords())


GRADIENTS = {  # heads of q and k, width of a head, programs, the rest; 2 clips of 7 tokens
    "a width of three warps, programs with a rest": (
        (12, 12, 128, 4), lambda: dict(across="width", grid=(7, 1, 1), q_weight=draw(1536), k_weight=draw(1536)),
    ),
    "a width of five warps, fewer heads of k, before text": (
        (20, 10, 128, 2), lambda: dict(across="width", grid=(1, 1, 5), text_len=2, k_weight=draw(1280)),
    ),
    "heads one after the other, more of q, split halves": (
        (9, 2, 128, 1), lambda: dict(grid=(7, 1, 1), interleaved=False, q_weight=draw(128), k_weight=draw(128)),
    ),
    "heads of 96, of which 64 channels turn, by tables": (
        (3, 3, 96, 1), lambda: dict(freqs=angles(2, 7, 1, 32), rotary_dim=64, q_weight=draw(96), k_weight=draw(96)),
    ),
    "angles alone": ((4, 4, 64, 3), lambda: dict(norm=None, grid=(3, 2, 2), tokens=(4, 11), theta=256.0)),
    "one head": ((1, 1, 1024, 1), lambda: dict(grid=(7, 1, 1), rotary_dim=512, q_weight=draw(1024))),
}  # fmt: skip


@pytest.mark.parametrize("way, dtype", in_turns(list(GRADIENTS), DTYPES), ids=str)
def test_gradients_as_nvcc_compiles_them(way, dtype, monkeypatch):
    (H, of_k, E, programs), keywords = GRADIENTS[way]
    monkeypatch.setattr(nvcc, "QK_PROGRAMS", programs)
    how, tensors = keywords(), dict(q=draw(2, 7, H, E, dtype=dtype), k=draw(2, 7, of_k, E, dtype=dtype) * 3)
    tensors |= {name: how.pop(name).to(dtype) for name in ("q_weight", "k_weight") if name in how}
    douts = [draw(*tensors[name].shape, dtype=dtype) for name in "qk"]

    def gradients(tensors, douts, impl):
        return outputs_and_grads(lambda **t: qk_norm_rope(**t, **how, impl=impl), tensors, douts)

    with nvcc.nvcc_on(80 if H == 9 else 90, schedule=2, again=7):
        actual = gradients(tensors, douts, "cuda")
    oracle = gradients({name: t.double() for name, t in tensors.items()}, [d.double() for d in douts], "reference")
    for name, plain in gradients(tensors, douts, "reference").items():
        terms = 14 * (H if how.get("across") != "width" else 1) if "weight" in name else H * E
        assert_matches_oracle(actual[name], oracle[name], plain, name, terms)


def test_each_byte_of_the_gradients_is_read_once_and_written_once(monkeypatch):
    monkeypatch.setattr(nvcc, "QK_PROGRAMS", 3)
    q, k = (draw(1, 6, 12, 128, dtype=torch.bfloat16).requires_grad_() for _ in "qk")
    weight, found = draw(1536, dtype=torch.bfloat16).requires_grad_(), []
    how = dict(across="width", grid=(6, 1, 1), q_weight=weight)
    with nvcc.nvcc_on(90, lambda name, counters: found.append((name, counters))):
        results = qk_norm_rope(q, k, **how, impl="cuda")
        torch.autograd.grad(results, [q, k, weight], [torch.randn_like(q), torch.randn_like(k)])
    assert [name for name, _ in found[1:]] == ["qk_norm_rope_bwd_kernel", "sum_partials_kernel"]
    kernel = found[1][1]
    assert 32 * kernel.read == 4 * q.nbytes + weight.nbytes
    assert 32 * kernel.written == 2 * q.nbytes + 3 * 2 * weight.nbytes


def test_a_gradient_has_the_same_bits_whichever_others_are_wanted(monkeypatch):
    monkeypatch.setattr(nvcc, "QK_PROGRAMS", 2)
    tensors = dict(q=draw(1, 5, 4, 64), k=draw(1, 5, 4, 64), q_weight=draw(64), k_weight=draw(64))
    douts, found = (draw(1, 5, 4, 64), draw(1, 5, 4, 64)), {}
    for wanted in (tuple(tensors), ("q",), ("k_weight",), ("k", "q_weight")):
        leaves = [tensors[name].requires_grad_() for name in wanted]
        with nvcc.nvcc_on(90):
            results = qk_norm_rope(**tensors, grid=(5, 1, 1), impl="cuda")
            grads = torch.autograd.grad([r for r in results if r.requires_grad], leaves, douts, allow_unused=True)
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, found.setdefault(name, grad)), (name, wanted)
        for leaf in leaves:
            leaf.requires_grad_(False)


def test_other_lengths_views_of_a_packed_qkv_and_where_to_write():
    q, k, _ = draw(2, 5, 3 * 4 * 128, dtype=torch.bfloat16).unflatten(2, (3, 4, 128)).unbind(2)
    k = k[:, 1:4]
    buffer = torch.full((2, 9, 4, 128), 7.0, dtype=torch.bfloat16)
    out = buffer[:, 2:7], torch.empty(2, 4, 3, 128, dtype=torch.bfloat16).transpose(1, 2)
    with nvcc.nvcc_on(80, schedule=1):
        found = qk_norm_rope(q, k, across="width", out=out, impl="cuda")
    plain = qk_norm_rope(q, k, across="width", impl="reference")
    oracle = qk_norm_rope(q.double(), k.double(), across="width", impl="reference")
    for name, *results in zip("qk", found, oracle, plain, strict=True):
        assert_matches_oracle(*results, name, 512)
    assert found[0] is out[0] and torch.equal(buffer[:, [0, 1, 7, 8]], torch.full_like(buffer[:, :4], 7))


def test_a_channel_that_does_not_turn_keeps_to_itself():
    """A NaN reaches its partner where both turn, and no other channel, without a norm."""
    q = draw(1, 2, 2, 64, dtype=torch.float16)
    q[0, 0, 0, 5], q[0, 0, 1, 40], q[0, 1, 0, 5] = float("nan"), float("inf"), float("nan")
    with nvcc.nvcc_on(90):
        out, _ = qk_norm_rope(
            q, q, norm=None, grid=(1, 1, 1), text_len=1, rotary_dim=32, split=(0, 0, 16), origin=(0, 0, 3), impl="cuda"
        )
    assert out.isnan().nonzero().tolist() == [[0, 0, 0, 4], [0, 0, 0, 5], [0, 1, 0, 5]]
    assert torch.equal(out[0, 0, 1, 32:], q[0, 0, 1, 32:]) and torch.equal(out[0, 1, 1], q[0, 1, 1])


def test_without_its_barrier_the_steps_of_the_angles_race(monkeypatch):
    text = nvcc.compiled("qknorm_rope", 90)
    without = text.replace("bar.sync \t0;", "")
    assert without != text
    q = draw(1, 4, 12, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(nvcc, "compiled", lambda name, sm: without)
    with pytest.raises(ptx.Fault) as found, nvcc.nvcc_on(90, schedule=4):
        qk_norm_rope(q, q, across="width", grid=(4, 1, 1), impl="cuda")
    assert found.value.kind in ("race", "uninitialised"), found.value


def test_without_a_barrier_of_a_warp_its_angles_race(monkeypatch):
    """Of a warp with more than one token: before the angles are read, and before the next take their place."""
    monkeypatch.setattr(nvcc, "QK_PROGRAMS", 1)
    texts = list(planted("qknorm_rope_backward", "TraitsI13__nv_bfloat16Li1E", r"^\tbar\.warp\.sync \t-1;$", ""))
    q, compiled = draw(1, 8, 2, 64, dtype=torch.bfloat16).requires_grad_(), nvcc.compiled
    assert len(texts) == 2
    for text in texts:
        with nvcc.nvcc_on(90):
            out, _ = qk_norm_rope(q, q, grid=(8, 1, 1), impl="cuda")
        monkeypatch.setattr(nvcc, "compiled", lambda name, sm, text=text: text)
        with pytest.raises(ptx.Fault, match="with no bar.warp.sync between"), nvcc.nvcc_on(90):
            out.backward(torch.ones_like(out))
        monkeypatch.setattr(nvcc, "compiled", compiled)


REFUSED = [
    (dict(E=72), {}, "cuda takes torch.bfloat16 heads of a multiple of 16 channels .*; got 72 with 0"),
    (dict(E=64), dict(grid=(5, 1, 1), split=(18, 0, 0), rotary_dim=36), "of 4 interleaved pairs that turn; got 64"),
    (dict(E=64), dict(grid=(5, 1, 1), split=(20, 0, 0), rotary_dim=40, interleaved=False), "8 pairs of split halves"),
    (dict(E=1024), {}, "cuda holds up to 16384 channels of a width, .*; got heads of 1024"),
    (dict(H=160), dict(across="width"), "got the width of 160 heads of 128"),
    (dict(H=1, E=1024), dict(grid=(5, 1, 1)), "cuda computes the angles of up to 256 pairs; got 512; pass freqs"),
    (dict(offset=4), {}, "multiples of 8 elements; got q with strides .* and offset 4"),
    (dict(grad=True), dict(norm="layer"), "cuda's backward takes norm='rms' or None, and neither stats nor k_freqs"),
    (dict(grad=True), dict(freqs=angles(5, 2, 64)), "angles that all heads share; got freqs of each head"),
    (dict(grad=True, H=80), dict(across="width"), "a width of up to 8192 channels, .*; got 80 heads of 128"),
]  # fmt: skip


@pytest.mark.parametrize("made, keywords, message", REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_the_kernel_does_not_take_is_unavailable_with_the_reason(made, keywords, message):
    H, E, offset = made.get("H", 2), made.get("E", 128), made.get("offset", 0)
    q = draw(1, 5, H, E + offset, dtype=torch.bfloat16)[..., offset:].requires_grad_(made.get("grad", False))
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        qk_norm_rope(q, torch.zeros(1, 5, H, E, dtype=torch.bfloat16), **keywords, impl="cuda")


def test_auto_does_not_take_it():
    with nvcc.nvcc_on(90, lambda *_: pytest.fail("executed")):
        qk_norm_rope(draw(1, 2, 2, 64), draw(1, 2, 2, 64))
    assert "cuda" not in _dispatch._able("qk_norm_rope", "cuda", torch.bfloat16, False)
