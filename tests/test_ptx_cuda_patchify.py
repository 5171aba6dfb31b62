"""CUDA C++ of the patchify family as nvcc compiles it for sm_90a, executed: numbers, schedules, faults, refusals."""

from __future__ import annotations

from functools import partial

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.planted import found, planted
from ptx.sweeps import faults, in_turns

from sora_kernels import Unavailable, _dispatch, _library, final_layer, patch_embed3d
from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def embedded(video, weight, bias=None, **options) -> ptx.Counters:
    """patch_embed3d by the error rule, the same bits under two schedules; what was counted."""
    counted = []
    options = dict(schedule=3, again=6) | options
    with nvcc.nvcc_on(90, lambda name, counters: counted.append(counters), **options):
        actual = patch_embed3d(video, weight, bias, impl="cuda")
    wide = None if bias is None else bias.double()
    oracle = patch_embed3d(video.double(), weight.double(), wide, impl="reference")
    plain = patch_embed3d(video, weight, bias, impl="reference")
    assert_matches_oracle(actual, oracle, plain, "out", weight[0].numel())
    return counted[0]


# C, patch, clips, grid in patches, D, blocks. Wan's channels, those beside an image, Wan 2.2's, VACE's; rows of patches
# that end within a group of 64; slices that end within D; shares of blocks that begin and end within a slice.
EMBEDDED = [
    (16, (1, 2, 2), 1, (2, 5, 9), 272, 2), (36, (1, 2, 2), 1, (1, 3, 7), 264, 1), (48, (1, 2, 2), 2, (1, 5, 7), 520, 4),
    (96, (1, 2, 2), 1, (1, 3, 5), 136, 1), (4, (2, 1, 2), 3, (1, 3, 11), 8, 1), (40, (1, 1, 1), 1, (2, 3, 23), 128, 3),
    (8, (1, 3, 3), 1, (1, 2, 3), 64, 132),
]  # fmt: skip


def operands(C, patch, clips, grid, D, dtype):
    size = [n * p for n, p in zip(grid, patch, strict=True)]
    weight = draw(D, C, *patch, dtype=dtype) / (C * patch[0] * patch[1] * patch[2]) ** 0.5
    return draw(clips, C, *size, dtype=dtype), weight


@pytest.mark.parametrize("C, patch, clips, grid, D, blocks, dtype", in_turns(EMBEDDED, DTYPES), ids=str)
def test_patches_of_public_models_and_odd_ones(C, patch, clips, grid, D, blocks, dtype):
    video, weight = operands(C, patch, clips, grid, D, dtype)
    embedded(video, weight, draw(D, dtype=dtype), blocks=blocks)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
def test_any_bias(bias):
    video, weight = operands(16, (1, 2, 2), 1, (1, 2, 3), 40, torch.float16)
    embedded(video, weight, None if bias is None else draw(41, dtype=bias)[1:])


def test_videos_of_any_strides_are_read_as_they_lie():
    """Channels last, pixels at odd places, one frame for all, and a slice whose pairs of pixels are whole."""
    whole, weight = draw(2, 24, 3, 6, 11), draw(40, 8, 1, 2, 2) / 6
    for video in (
        whole[:, 3:11, :, :, 1:11].contiguous(memory_format=torch.channels_last_3d), whole[:, 3:11, :, :, 1:11],
        whole[:, 8:16, :1, :, :10].expand(-1, -1, 3, -1, -1), whole[:, ::3, :, :, 1::2][..., :4],
        draw(2, 24, 3, 6, 12)[:, 3:11, :, 2:, 2:10],
    ):  # fmt: skip
        embedded(video, weight)


def test_results_are_written_once_in_whole_sectors_and_the_video_is_read_by_pairs():
    video, weight = operands(16, (1, 2, 2), 1, (1, 6, 32), 512, torch.bfloat16)
    counters = embedded(video, weight, draw(512))
    assert counters.written == 192 * 512 * 2 // 32
    assert counters.read == (video.nbytes + weight.nbytes + 1024) // 32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 128, 136, 256, 600])
@pytest.mark.parametrize("C", [2, 8, 18, 32, 34, 64, 66])
def test_sweep_of_features_and_schedules(C, D, dtype):
    for seed in range(4):
        video, weight = operands(C, (1, 2, 2), 1 + seed % 2, (1, 1 + 2 * seed, 23), D, dtype)
        embedded(video, weight, draw(D), blocks=1 + seed, schedule=10 + seed, again=20 + seed)


def finished(x, shift, scale, weight, bias=None, **keywords) -> ptx.Counters:
    """final_layer by the error rule, the same bits under two schedules; what was counted."""
    counted = []
    options = dict(schedule=3, again=6) | {k: keywords.pop(k) for k in ("blocks", "schedule", "again") if k in keywords}
    tensors = x, shift, scale, weight, bias
    with nvcc.nvcc_on(90, lambda name, counters: counted.append(counters), **options):
        actual = final_layer(*tensors, **keywords, impl="cuda")
    oracle = final_layer(*(t if t is None else t.double() for t in tensors), **keywords, impl="reference")
    plain = final_layer(*tensors, **keywords, impl="reference")
    assert_matches_oracle(actual, oracle, plain, "out", x.shape[2])
    return counted[0]


# Clips, grid, patch, C, D, rows of shift and scale a clip, blocks. Wan's features, Wan 2.2's, LTX's and odd ones;
# tiles of 128 and of 256 tokens, which end within a row of scale or are many of one; blocks that meet several rows.
FINISHED = [
    (1, (2, 5, 9), (1, 2, 2), 16, 128, 1, 1), (2, (1, 11, 13), (1, 2, 2), 48, 64, 1, 2),
    (1, (2, 8, 10), (1, 1, 1), 128, 192, 2, 1), (1, (3, 10, 27), (1, 2, 2), 12, 64, 3, 1),
    (1, (1, 5, 7), (2, 3, 3), 3, 64, 1, 132), (3, (1, 8, 8), (2, 1, 2), 20, 448, 1, 2),
    (1, (1, 1, 1), (1, 2, 2), 1, 64, 1, 4),
]  # fmt: skip


@pytest.mark.parametrize(
    "clips, grid, patch, C, D, F, blocks, norm, dtype", in_turns(FINISHED, ["layer", "rms"], DTYPES), ids=str
)
def test_last_layers_of_public_models_and_odd_ones(clips, grid, patch, C, D, F, blocks, norm, dtype):
    S, N = grid[0] * grid[1] * grid[2], C * patch[0] * patch[1] * patch[2]
    x = draw(clips, S, D, dtype=dtype) * 3 + 1
    shift, scale = (draw(clips, F, D, dtype=dtype) for _ in range(2))
    weight = draw(N, D, dtype=dtype) / D**0.5
    finished(x, shift, scale, weight, draw(N), grid=grid, patch=patch, norm=norm, blocks=blocks)


def test_rows_that_are_absent_shared_or_in_fp32_and_tokens_of_a_slice():
    x, weight, how = draw(2, 80, 192)[:, 3:75, 64:128], draw(64, 64) / 8, dict(grid=(2, 4, 9), patch=(1, 2, 2))
    for shift, scale in (
        (None, None), (draw(64), None), (None, draw(1, 64, dtype=torch.float32)), (draw(1, 1, 64), draw(2, 64)),
        (draw(2, 5, 64)[:, 1:2], draw(2, 1, 64, dtype=torch.float32)),
    ):  # fmt: skip
        finished(x, shift, scale, weight, **how)
    turned = draw(2, 192, 64).transpose(1, 2)
    finished(turned, None, None, draw(16, 192) / 14, grid=(1, 8, 8), patch=(1, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero_uneven_tiny_and_huge(dtype):
    """First columns that say nothing of the rest, and in fp16 what would overflow or vanish without its scale."""
    x = draw(1, 64, 192, dtype=torch.float32)
    x[0, :8] += 100.0
    x[0, 8:16] *= 1e-4
    x[0, 16:24, :64] = 0.0
    x[0, 24:32, 64:] *= 2000.0
    x[0, 32:40] *= 10000.0
    x[0, 40:48, :64] *= 1e-3
    x[0, 48, 100] = 60000.0
    x[0, 56:] = 7.0
    scale = draw(1, 192, dtype=dtype)
    scale[0, 70] = 300.0
    for norm in ("layer", "rms"):
        weight = draw(48, 192, dtype=dtype) / 14
        finished(x.to(dtype), draw(1, 192, dtype=dtype), scale, weight, grid=(1, 8, 8), patch=(1, 2, 2), norm=norm)


def test_tokens_are_read_once_and_results_are_whole_sectors():
    x, rows, weight = draw(1, 256, 512), draw(1, 512), draw(64, 512) / 23
    counters = finished(x, rows, None, weight, grid=(1, 4, 64), patch=(1, 2, 2))
    assert counters.written == 256 * 64 * 2 // 32
    assert counters.read == (x.nbytes + rows.nbytes + weight.nbytes) // 32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 320, 1536])
@pytest.mark.parametrize("C", [1, 4, 15, 16, 17, 32, 36, 48])
def test_sweep_of_results_and_schedules(C, D, dtype):
    for seed in range(4):
        H, F = 1 + 2 * seed, 1 + seed % 2
        x, rows = draw(F, 3 * H * 23, D, dtype=dtype), draw(F, 3 if seed == 3 else 1, D, dtype=dtype)
        weight = draw(4 * C, D, dtype=dtype) / D**0.5
        how = dict(grid=(3, H, 23), patch=(1, 2, 2), norm=("layer", "rms")[seed // 2], blocks=1 + seed)
        finished(x, rows, rows.flip(2), weight, draw(4 * C), **how, schedule=10 + seed, again=20 + seed)


FAULTS = {  # label -> pattern, replacement; each place by itself
    "a wait for an mbarrier removed": (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, .*$", "setp.eq.u32 p, 0, 0;"),
    "a barrier of the block removed": (r"^\tbar\.sync \t0;$", ""),
    "a barrier of a warp removed": (r"^\tbar\.warp\.sync \t-1;$", ""),
    "a fence of the async proxy removed": (r"^\tfence\.proxy\.async\.shared::cta;$", ""),
    "a wait for products too lax": (r"^\twgmma\.wait_group\.sync\.aligned 0;$", "\twgmma.wait_group.sync.aligned 2;"),
    "a fence of products removed": (r"^\twgmma\.fence\.sync\.aligned;$", ""),
    "a wait for stores too lax": (r"^\tcp\.async\.bulk\.wait_group\.read \d;$", "\tcp.async.bulk.wait_group.read 4;"),
}


# C, patches, D, blocks: one slice and group each, so that nothing but the fault orders them, of 32 features and more;
# two slices and more groups than stages, which are used again; of so many features that few stages are there.
SHAPES = [(8, 70, 256, 9), (16, 70, 256, 9), (16, 1290, 264, 1), (48, 400, 136, 1)]


def in_embedding(text: str) -> str | None:
    """What finds the fault, in one of these shapes under one of six schedules."""

    def check(schedule: int, video, weight, blocks, oracle, plain) -> None:
        out = ptx.unwritten(*plain.shape, dtype=video.dtype)
        nvcc.patch_embed3d(90, video, weight, None, out, blocks, lambda _: text, schedule=schedule, budget=900_000)
        assert_matches_oracle(out, oracle, plain, "out", weight[0].numel())

    for C, patches, D, blocks in SHAPES:
        video, weight = operands(C, (1, 2, 2), 1, (1, 1, patches), D, torch.bfloat16)
        oracle = patch_embed3d(video.double(), weight.double(), impl="reference")
        plain = patch_embed3d(video, weight, impl="reference")
        drawn = dict(video=video, weight=weight, blocks=blocks, oracle=oracle, plain=plain)
        if kind := found(partial(check, **drawn), schedules=6):
            return kind
    return None


def in_last_layer(text: str) -> str | None:
    """The same: a tile of one step, tiles of more steps than stages, and rows of scale one after the other."""

    def check(schedule: int, x, rows, weight, grid, blocks, oracle, plain) -> None:
        out = ptx.unwritten(*plain.shape, dtype=x.dtype)
        given = 90, x, rows, rows, weight, None, grid, False, 1e-6, out, blocks, lambda _: text
        nvcc.final_layer(*given, schedule=schedule, budget=900_000)
        assert_matches_oracle(out, oracle, plain, "out", x.shape[-1])

    for D, S, F, blocks in ((64, 64, 1, 1), (576, 150, 1, 1), (64, 512, 8, 1)):
        x, rows, weight = draw(1, S, D), draw(1, F, D), draw(64, D) / D**0.5
        how = dict(grid=(1, 1, S), patch=(1, 2, 2))
        oracle = final_layer(x.double(), rows.double(), rows.double(), weight.double(), **how, impl="reference")
        plain = final_layer(x, rows, rows, weight, **how, impl="reference")
        drawn = dict(x=x, rows=rows, weight=weight, grid=how["grid"], blocks=blocks, oracle=oracle, plain=plain)
        if kind := found(partial(check, **drawn), schedules=6):
            return kind
    return None


@pytest.mark.parametrize("label", faults(FAULTS))
def test_planted_faults_are_found(label):
    by = [in_embedding(text) for text in planted("patchify_embed", "EmbedTraitsI13__nv_bfloat16Li2E", *FAULTS[label])]
    assert by and None not in by, f"{by}: none of these shapes and schedules shows the fault"
    assert "wrong result" not in by, f"{by}: the checks themselves should have found it"


@pytest.mark.parametrize("label", faults(label for label in FAULTS if "proxy" not in label and "stores" not in label))
def test_planted_faults_of_the_last_layer_are_found(label):
    texts = planted("patchify_final", "FinalTraitsI13__nv_bfloat16Li64ELi1E", *FAULTS[label])
    by = [in_last_layer(text) for text in texts]
    unseen = int("of a warp" in label)  # before results take the place of others: products came between
    assert len(by) > unseen >= by.count(None), f"{by}: none of these shapes and schedules shows the fault"
    assert "wrong result" not in by, f"{by}: the checks themselves should have found it"


def test_special_values_reach_their_patch_and_no_other():
    video, weight = operands(2, (1, 2, 2), 1, (1, 3, 4), 16, torch.bfloat16)
    video[0, 1, 0, 3, 5], video[0, 0, 0, 0, 0] = float("nan"), float("inf")
    with nvcc.nvcc_on(90):
        out = patch_embed3d(video, weight, impl="cuda")
    bad = (~out.isfinite()).all(-1)[0]
    assert bad.nonzero().flatten().tolist() == [0, 6] and out[0, ~bad].isfinite().all()


REFUSED = [
    (dict(dtype=torch.float32), "cuda takes bfloat16 or float16, video and weight alike; got torch.float32 and"),
    (dict(weight=torch.float32), "video and weight alike; got torch.bfloat16 and torch.float32"),
    (dict(C=5), "multiples of 8, at most 384; got 16 and 20"), (dict(D=12), "at most 384; got 12 and 16"),
    (dict(C=98), "at most 384; got 16 and 392"), (dict(pos=True), "cuda adds no pos; add it to the result"),
    (dict(T=0), r"cuda takes no empty tensors; got video of \(1, 4, 0, 4, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED, ids=[m for _, m in REFUSED])
def test_what_the_embedding_does_not_take_is_unavailable_with_the_reason(change, message):
    at = dict(dtype=torch.bfloat16, C=4, D=16, T=1) | change
    video = torch.zeros(1, at["C"], at["T"], 4, 4, dtype=at["dtype"])
    weight = torch.zeros(at["D"], at["C"], 1, 2, 2, dtype=at.get("weight", at["dtype"]))
    pos = torch.zeros(4 * at["T"], at["D"]) if at.get("pos") else None
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        patch_embed3d(video, weight, pos=pos, impl="cuda")


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


LAST_REFUSED = [
    (dict(x=torch.zeros(1, 64, 64)), "x and weight alike; got torch.float32 and torch.bfloat16"),
    (dict(x=zeros(1, 64, 72), weight=zeros(64, 72)), "to at most 192 features; got 72 to 64"),
    (dict(weight=zeros(196, 64)), "a width in multiples of 64, at most 8192, to at most 192 features; got 64 to 196"),
    (dict(shift=zeros(1, 64, 64)), "rows of shift and scale of at least 64 tokens each; got rows of 1"),
    (dict(x=zeros(1, 64, 68)[..., 4:]), "multiples of 8 elements; got x with strides .* and offset 4"),
    (dict(x=zeros(0, 64, 64)), r"cuda takes no empty tensors; got x of \(0, 64, 64\)"),
    (dict(weight=zeros(65 * 64)[4:4100].view(64, 64)), "a weight at a multiple of 8 elements; got offset 4"),
    (dict(weight=zeros(64, 64).requires_grad_()), "forward-only in cuda"),
    (dict(x=zeros(1, 64, 64).half(), weight=zeros(64, 64).half(), scale=zeros(64, dtype=torch.float32)),
     "cuda takes float16 shift and scale beside a float16 x; got scale in torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", LAST_REFUSED, ids=[m for _, m in LAST_REFUSED])
def test_what_the_last_layer_does_not_take_is_unavailable_with_the_reason(change, message):
    given = dict(x=torch.zeros(1, 64, 64).bfloat16(), shift=None, scale=None, weight=torch.zeros(64, 64).bfloat16())
    given |= change
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        final_layer(**given, grid=(1, 8, 8), patch=(1, 2, 2), impl="cuda")


def test_other_gpus_and_gradients_are_unavailable():
    video, weight = torch.zeros(1, 4, 1, 4, 4).bfloat16(), torch.zeros(16, 4, 1, 2, 2).bfloat16()
    with nvcc.nvcc_on(80), pytest.raises(Unavailable, match="cuda needs a GPU of compute capability 9.0; got 8.0"):
        patch_embed3d(video, weight, impl="cuda")
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match="forward-only in cuda"):
        patch_embed3d(video, weight.requires_grad_(), impl="cuda")


@pytest.mark.parametrize("op", ["patch_embed3d", "final_layer"])
def test_auto_does_not_choose_what_was_never_run(op):
    assert "cuda" in _library.impls(f"{op}_fwd")
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__(op, "cpu", torch.bfloat16, False)
