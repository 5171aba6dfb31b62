"""CUDA C++ convolutions as nvcc compiles them for sm_90a, executed without a GPU: numbers, schedules, refusals."""

from __future__ import annotations

from functools import partial

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.planted import found, planted
from ptx.sweeps import faults, in_turns

from sora_kernels import Unavailable, _dispatch, _library, causal_conv3d, upsample_conv3d
from sora_kernels._operands import dense_taps
from sora_kernels.causal_conv import kernels_cuda, reference
from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)
LAST = torch.channels_last_3d


def video(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAST)


# C, N, taps, (B, T, H, W), frames of a cache, blocks. Channels that fill a step of 16, a box of 64 and a tile or
# leave a rest; one tile and several, which rings of stages pass in any place; all shapes of tiles.
CASES = [
    (16, 16, (3, 3, 3), (1, 2, 5, 7), 2, 1), (96, 96, (3, 3, 3), (1, 1, 17, 18), 0, 3),
    (72, 200, (1, 3, 3), (1, 1, 3, 33), 0, 2), (136, 64, (3, 1, 1), (2, 3, 2, 3), 2, 2),
    (64, 384, (1, 1, 1), (1, 1, 9, 17), 0, 1), (24, 40, (2, 5, 3), (1, 2, 6, 9), 1, 2),
]  # fmt: skip


def check(C, N, taps, size, past, blocks, dtype, epilogue=(), **schedules) -> None:
    (B, T, H, W), n = size, C * taps[0] * taps[1] * taps[2]
    x, weight = video(B, C, T, H, W, dtype=dtype), (torch.randn(N, C, *taps) / n**0.5).to(dtype)
    bias = torch.randn(N + 1)[1:]
    cache = video(B, C, taps[0] - 1, H, W, dtype=dtype) if past else None
    residual = video(B, N, T, H, W, dtype=dtype) if "residual" in epilogue else None
    norm_weight = torch.rand(N) + 0.5 if "norm" in epilogue else None
    out = unwritten(B, N, T, H, W, dtype)
    raw = unwritten(B, N, T, H, W, dtype) if "raw" in epilogue else None
    given = residual, norm_weight, False, 1e-6, out, raw
    nvcc.causal_conv3d(90, x, dense_taps(weight, x), bias, cache, *given, blocks, **schedules)
    options = dict(cache=cache, residual=residual, norm_weight=norm_weight)
    assert_matches_oracle(out, *expected(x, weight, bias, **options), "out", n)
    if raw is not None:
        assert_matches_oracle(raw, *expected(x, weight, bias, cache=cache, residual=residual), "raw", n)


def unwritten(B, C, T, H, W, dtype):
    return ptx.unwritten(B, T, H, W, C, dtype=dtype).permute(0, 4, 1, 2, 3)


def expected(x, weight, bias, **options):
    """The result in fp64 and by the reference in the dtypes given."""
    double = lambda t: t if t is None else t.double()  # noqa: E731
    wide = {name: double(t) for name, t in options.items()}
    results = causal_conv3d(double(x), double(weight), double(bias), **wide, impl="reference")
    plain = causal_conv3d(x, weight, bias, **options, impl="reference")
    return [y if isinstance(y, torch.Tensor) else y[0] for y in (results, plain)]


@pytest.mark.parametrize("C, N, taps, size, past, blocks, dtype", in_turns(CASES, DTYPES), ids=str)
def test_convolution_as_nvcc_compiles_it(C, N, taps, size, past, blocks, dtype):
    check(C, N, taps, size, past, blocks, dtype, schedule=2, again=5)


# Boxes of 64 pixels and 64 or 32 channels that two places hold in turns, in tiles one after the other.
EPILOGUES = [
    (16, 16, (1, 1, 1), (1, 1, 20, 20), ("residual",)), (16, 96, (1, 3, 1), (1, 2, 17, 9), ("residual", "norm", "raw")),
    (40, 128, (2, 1, 1), (2, 1, 3, 8), ("residual", "norm")), (16, 56, (1, 1, 1), (1, 1, 9, 40), ("norm",)),
    (24, 384, (1, 1, 1), (1, 1, 5, 5), ("residual",)),
]  # fmt: skip


@pytest.mark.parametrize("C, N, taps, size, epilogue, dtype", in_turns(EPILOGUES, DTYPES), ids=str)
def test_epilogues(C, N, taps, size, epilogue, dtype):
    check(C, N, taps, size, 0, 1, dtype, epilogue, schedule=3, again=6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [8, 32, 64, 96, 128, 192, 200, 384])
@pytest.mark.parametrize("C", [8, 40, 64, 104, 160])
def test_sweep_of_channels_and_schedules(C, N, dtype):
    for seed, taps in enumerate([(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1), (2, 9, 1)]):
        epilogue = ("residual", "norm", "raw")[: 3 if N <= 128 else 1] if seed > 1 else ()
        check(C, N, taps, (1, 2, 18, 9), seed % 2, 1 + seed, dtype, epilogue, schedule=10 + seed, again=20 + seed)


FAULTS = {  # label -> pattern, replacement; each place by itself
    "a wait for an mbarrier removed": (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, .*$", "setp.eq.u32 p, 0, 0;"),
    "a barrier of the block removed": (r"^\tbar\.sync \t0;$", ""),
    "a named barrier removed": (r"^\tbar\.sync %r\d+, %r\d+;$", ""),
    "a fence of the async proxy removed": (r"^\tfence\.proxy\.async\.shared::cta;$", ""),
    "a wait for products too lax": (r"^\twgmma\.wait_group\.sync\.aligned 1;$", "\twgmma.wait_group.sync.aligned 2;"),
    "a fence of products removed": (r"^\twgmma\.fence\.sync\.aligned;$", ""),
    "a wait for stores too lax": (r"^\tcp\.async\.bulk\.wait_group\.read \d;$", "\tcp.async.bulk.wait_group.read 4;"),
}


# C, taps, whether there is a residual. Few products, after which boxes may still be under way, with a residual and with
# places that no wait for one has cleared; so many taps a column that the ring of weights fills.
SHAPES = [(16, (1, 1, 1), True), (16, (1, 1, 1), False), (80, (1, 5, 3), True)]


def found_in(text: str) -> str | None:
    """What finds the fault, in one of these shapes under one of eight schedules."""

    def check(schedule: int, x, weight, norm_weight, residual, bounds) -> None:
        out, raw = (unwritten(1, 64, 1, 20, 12, x.dtype) for _ in range(2))
        given = None, None, residual, norm_weight, False, 1e-6, out, raw, 1, lambda _: text
        nvcc.causal_conv3d(90, x, dense_taps(weight, x), *given, schedule=schedule, budget=400_000)
        assert_matches_oracle(out, *bounds, "out", weight[0].numel())

    for C, taps, with_residual in SHAPES:
        x, weight = video(1, C, 1, 20, 12), (torch.randn(64, C, *taps) / (C * taps[1] * taps[2]) ** 0.5).bfloat16()
        norm_weight, residual = torch.ones(64), video(1, 64, 1, 20, 12) if with_residual else None
        bounds = expected(x, weight, None, residual=residual, norm_weight=norm_weight)
        drawn = dict(x=x, weight=weight, norm_weight=norm_weight, residual=residual, bounds=bounds)
        if kind := found(partial(check, **drawn)):
            return kind
    return None


@pytest.mark.parametrize("label", faults(FAULTS))
def test_planted_faults_are_found(label):
    """In the kernel of 64 bf16 channels."""
    by = [found_in(text) for text in planted("causal_conv", "13__nv_bfloat16Li64E", *FAULTS[label])]
    assert by and None not in by, f"{by}: none of these shapes and schedules shows the fault"
    assert "wrong result" not in by, f"{by}: the checks themselves should have found it"


def test_the_op_takes_a_stream_and_slices_as_they_are():
    """Chunk by chunk, each after the cache of the one before: bit for bit the clip. x: channels and columns of another
    tensor; the weight is laid out by the op."""
    x = video(1, 48, 3, 6, 9)[:, 16:40, :, :, 1:8]
    weight, bias = torch.randn(40, 24, 3, 3, 3).bfloat16() / 25, torch.randn(40).bfloat16()
    cache, parts = torch.zeros(1, 24, 2, 6, 7, dtype=x.dtype).contiguous(memory_format=LAST), []
    with nvcc.nvcc_on(90, schedule=3):
        whole = causal_conv3d(x, weight, bias, impl="cuda")
        for chunk in x.split([1, 2], 2):
            y, cache = causal_conv3d(chunk, weight, bias, cache=cache, impl="cuda")
            parts.append(y)
    assert_matches_oracle(whole, *expected(x, weight, bias), "out", 24 * 27)
    assert torch.equal(torch.cat(parts, 2), whole)


def test_the_op_gives_what_the_norm_read():
    x, weight = video(1, 32, 2, 5, 6), torch.randn(32, 32, 1, 3, 3).bfloat16() / 17
    options = dict(residual=x, norm_weight=torch.rand(32).bfloat16() + 0.5, return_raw=True)
    with nvcc.nvcc_on(90):
        actual = causal_conv3d(x, weight, **options, impl="cuda")
    plain = causal_conv3d(x, weight, **options, impl="reference")
    wide = options | dict(residual=x.double(), norm_weight=options["norm_weight"].double())
    oracle = causal_conv3d(x.double(), weight.double(), **wide, impl="reference")
    for name, *three in zip(("y", "raw"), actual, oracle, plain, strict=True):
        assert_matches_oracle(*three, name, 288)


def test_a_border_of_repeats_is_read_like_the_rest():
    x, weight = video(2, 16, 2, 5, 6, dtype=torch.float16), torch.randn(16, 16, 2, 3, 3).half() / 17
    with nvcc.nvcc_on(90):
        y = causal_conv3d(x, weight, padding="replicate", impl="cuda")
    oracle = causal_conv3d(x.double(), weight.double(), padding="replicate", impl="reference")
    plain = causal_conv3d(x, weight, padding="replicate", impl="reference")
    assert_matches_oracle(y, oracle, plain, "out", 288)


def test_special_values_reach_the_pixels_that_see_them_and_no_others():
    x, weight = video(1, 16, 2, 6, 6), torch.randn(16, 16, 3, 3, 3).bfloat16()
    x[0, 3, 0, 2, 2], x[0, 5, 1, 5, 0] = float("nan"), float("inf")
    with nvcc.nvcc_on(90):
        y = causal_conv3d(x, weight, impl="cuda")
    reference = causal_conv3d(x.double(), weight.double(), impl="reference")
    assert torch.equal(y.isnan(), reference.isnan()) and torch.equal(y.isinf(), reference.isinf())
    assert y.isnan()[0, 0].sum() == 18


# C, N, taps, factor, (B, T, H, W), frames of a cache. Phases of one tap, of as many before as after the pixel and of
# more; channels of a phase's weight that end within a tile, where the next phase's begin; two tiles of a phase.
UPSAMPLED = [
    (24, 40, (1, 3, 3), (1, 2, 2), (2, 2, 5, 7), 0), (16, 200, (3, 3, 3), (2, 2, 2), (1, 2, 3, 4), 1),
    (72, 96, (3, 1, 5), (2, 1, 4), (1, 3, 3, 9), 1), (16, 384, (1, 1, 1), (1, 1, 3), (1, 2, 3, 17), 0),
    (136, 64, (3, 5, 3), (1, 2, 1), (1, 3, 18, 5), 2), (8, 8, (1, 9, 1), (1, 8, 1), (1, 1, 2, 1), 0),
]  # fmt: skip


@pytest.mark.parametrize("C, N, taps, factor, size, past, dtype", in_turns(UPSAMPLED, DTYPES), ids=str)
def test_upsampled_convolution_as_nvcc_compiles_it(C, N, taps, factor, size, past, dtype):
    (B, T, H, W), n = size, C * taps[0] * taps[1] * taps[2]
    x, bias = video(B, C, T, H, W, dtype=dtype), torch.randn(N + 1)[1:]
    weight = (torch.randn(N, C, *taps) / n**0.5).to(dtype)
    cache = video(B, C, past, H, W, dtype=dtype) if past else None
    out = unwritten(B, N, *(k * f for k, f in zip((T, H, W), factor, strict=True)), dtype)
    by_phase = kernels_cuda.phases(weight, factor, x)
    nvcc.upsample_conv3d(90, x, by_phase, bias, cache, factor, out, blocks=2, schedule=2, again=5)
    wide = [None if t is None else t.double() for t in (x, weight, bias, cache)]
    oracle = reference.upsample_conv3d(*wide[:3], factor=factor, cache=wide[3])
    plain = reference.upsample_conv3d(x, weight, bias, factor=factor, cache=cache)
    assert_matches_oracle(out, oracle, plain, "out", n)


def test_the_upsampled_op_takes_a_stream_and_slices_as_they_are():
    x = video(1, 48, 3, 6, 9)[:, 16:40, :, :, 1:8]
    weight, bias = torch.randn(40, 24, 3, 3, 3).bfloat16() / 25, torch.randn(40).bfloat16()
    cache, parts = torch.zeros(1, 24, 1, 6, 7, dtype=x.dtype).contiguous(memory_format=LAST), []
    with nvcc.nvcc_on(90, schedule=3):
        whole = upsample_conv3d(x, weight, bias, factor=(2, 2, 2), impl="cuda")
        for chunk in x.split([1, 2], 2):
            y, cache = upsample_conv3d(chunk, weight, bias, factor=(2, 2, 2), cache=cache, impl="cuda")
            parts.append(y)
    oracle = reference.upsample_conv3d(x.double(), weight.double(), bias.double(), factor=(2, 2, 2))
    assert_matches_oracle(whole, oracle, reference.upsample_conv3d(x, weight, bias, factor=(2, 2, 2)), "out", 24 * 27)
    assert whole.is_contiguous(memory_format=LAST) and torch.equal(torch.cat(parts, 2), whole)


def test_upsampling_reads_x_and_writes_out_once():
    x, found = video(1, 64, 2, 16, 16), []
    weight = torch.randn(64, 64, 1, 3, 3).bfloat16()
    with nvcc.nvcc_on(90, lambda name, counters: found.append(counters)):
        y = upsample_conv3d(x, weight, impl="cuda")
    (counters,) = found  # one launch for all phases
    assert counters.written == y.nbytes // 32
    assert counters.read == (x.nbytes + 4 * 4 * 64 * 64 * 2) // 32  # and four taps of four phases


UPSAMPLED_REFUSED = [
    (dict(dtype=torch.float32), {}, "cuda takes bfloat16 or float16; got torch.float32"),
    (dict(N=3), {}, "cuda takes channels in multiples of 8; got 16 to 3"),
    ({}, dict(factor=(1, 3, 3)), r"each of which divides its k - 1; got factor=\(1, 3, 3\) and kernels of \(3, 3, 3\)"),
    (dict(taps=(1, 1, 1)), dict(factor=(1, 3, 3)), r"factors of up to 8 pixels, .*; got factor=\(1, 3, 3\)"),
    (dict(taps=(1, 21, 1)), {}, r"cuda takes up to \(256, 9, 256\) taps of a phase; got \(1, 11, 1\)"),
    (dict(format=torch.contiguous_format), {}, r"channels-last videos \(.to\(memory_format=.*; got x with strides"),
    (dict(size=(1, 1, 1)), {}, r"cuda takes channels-last videos of more than one pixel; got x of \(1, 16, 1, 1, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, change, message", UPSAMPLED_REFUSED, ids=[m for *_, m in UPSAMPLED_REFUSED])
def test_upsamplings_that_the_kernel_does_not_take_are_unavailable_with_the_reason(sizes, change, message):
    how = dict(N=16, size=(2, 4, 5), taps=(3, 3, 3), dtype=torch.bfloat16, format=LAST) | sizes
    x = torch.zeros(1, 16, *how["size"], dtype=how["dtype"]).contiguous(memory_format=how["format"])
    weight = torch.zeros(how["N"], 16, *how["taps"], dtype=x.dtype)
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        upsample_conv3d(x, weight, impl="cuda", **change)


REFUSED = [
    (dict(dtype=torch.float32), {}, "cuda takes bfloat16 or float16; got torch.float32"),
    (dict(C=12), {}, "cuda takes channels in multiples of 8; got 12 to 16"),
    (dict(N=3), {}, "cuda takes channels in multiples of 8; got 16 to 3"),
    (dict(taps=(1, 11, 1)), {}, r"kernels of up to \(256, 9, 256\); got \(1, 1, 1\) and \(1, 11, 1\)"),
    ({}, dict(stride=(1, 2, 2)), r"cuda takes stride 1 .*; got \(1, 2, 2\)"),
    (dict(N=136), dict(norm_weight=torch.ones(136)), "cuda normalises pixels of up to 128 channels; got 136"),
    ({}, dict(residual=torch.zeros(1, 16, 2, 4, 5).bfloat16()), "channels-last .*; got residual with strides"),
    (dict(T=0), {}, r"cuda takes no empty tensors; got x of \(1, 16, 0, 4, 5\)"),
    (dict(format=torch.contiguous_format), {}, r"channels-last videos \(.to\(memory_format=.*; got x with strides"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, change, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_the_kernel_does_not_take_is_unavailable_with_the_reason(sizes, change, message):
    size = dict(C=16, N=16, T=2, taps=(3, 3, 3), dtype=torch.bfloat16, format=LAST) | sizes
    x = torch.zeros(1, size["C"], size["T"], 4, 5, dtype=size["dtype"]).contiguous(memory_format=size["format"])
    weight = torch.zeros(size["N"], size["C"], *size["taps"], dtype=x.dtype)
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        causal_conv3d(x, weight, impl="cuda", **change)


def test_offsets_that_no_descriptor_takes_other_gpus_and_gradients_are_unavailable():
    x, weight = video(1, 24, 2, 4, 5), torch.zeros(16, 16, 3, 3, 3).bfloat16()
    with nvcc.nvcc_on(90):
        with pytest.raises(Unavailable, match="multiples of 8 elements; got x with strides .* and offset 4"):
            causal_conv3d(x[:, 4:20], weight, impl="cuda")
        with pytest.raises(Unavailable, match="forward-only in cuda"):
            causal_conv3d(x[:, :16], weight.clone().requires_grad_(), impl="cuda")
    with nvcc.nvcc_on(80), pytest.raises(Unavailable, match="cuda needs a GPU of compute capability 9.0; got 8.0"):
        causal_conv3d(x[:, :16], weight, impl="cuda")


@pytest.mark.parametrize("op", ["causal_conv3d", "upsample_conv3d"])
def test_auto_does_not_choose_what_was_never_run(op):
    assert "cuda" in _library.impls(f"{op}_fwd")
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__(op, "cpu", torch.bfloat16, False)
