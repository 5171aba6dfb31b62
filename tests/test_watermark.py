"""embed_watermark: the definition in NumPy to the bit, every implementation, sizes, layouts and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sora_kernels import Unavailable, _dispatch, _library, embed_watermark
from sora_kernels.testing import LAYOUTS, arrange

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (implementation, device); the Triton interpreter, which runs on the CPU, computes bf16 on raw bits
ON = [(impl, "cpu") for impl in ("reference", "cpu", "triton")] + [
    pytest.param((impl, "cuda"), marks=pytest.mark.gpu, id=f"{impl}-cuda") for impl in ("reference", "triton")
]
EVERYWHERE = pytest.mark.parametrize("where", ON, ids="-".join)
CASES = [  # B, T, H, W and the tile's P, Q
    ((1, 1, 1, 1), (1, 1)),
    ((2, 3, 9, 15), (5, 7)),
    ((1, 2, 16, 32), (64, 64)),  # a tile larger than a frame
    ((1, 1, 7, 261), (3, 50)),  # several programs across
    ((1, 1, 25, 48), (8, 16)),
]


def op_samples() -> list[tuple[str, tuple]]:
    frames, tile = draw((2, 2, 9, 15)), torch.randn(4, 5)
    return [
        ("embed_watermark_fwd", (frames, tile, torch.empty_like(frames))),
        ("embed_watermark_fwd", (frames[:, :, :5], tile[:1, :1], torch.empty_like(frames[:, :, :5]))),
    ]


@pytest.fixture
def on(require):
    def check(where, dtype=torch.float32) -> dict[str, str]:
        impl, device = where
        require("embed_watermark", impl, device, dtype)
        if impl == "triton" and device == "cpu" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
            pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
        return dict(impl=impl)

    return check


def draw(size, device="cpu") -> torch.Tensor:
    """Blocks that are flat, of little and of much texture; black and white among them."""
    B, T, H, W = size
    strength = torch.tensor([0.0, 3.0, 30.0, 400.0])[torch.arange(W) // 8 % 4].view(W, 1)
    levels = 128 + strength * (torch.rand(B, T, H, W, 3) - 0.5)
    return levels.clamp(0, 255).to(torch.uint8).to(device)


def draw_tile(shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Levels of a mark, ties, what no frame can hold, both infinities and NaN."""
    tile = torch.randn(shape) * 5
    special = torch.tensor([0.5, -1.5, 254.5, -255.5, 1e9, math.nan, math.inf, -math.inf])
    tile.view(-1)[1 : len(special) + 1] = special[: max(tile.numel() - 1, 0)]
    tile = tile.to(dtype)
    return tile.masked_fill(tile.isnan(), math.nan).to(device)


def definition(frames, tile) -> torch.Tensor:
    """In NumPy, block by block: each deviation in fp64, rounded where the operation rounds."""
    frames, tile = frames.cpu().numpy(), tile.float().cpu().numpy()
    out, one = np.empty_like(frames), np.float32(1)
    for b, t, y, x in np.ndindex(*frames.shape[:2], -(-frames.shape[2] // 8), -(-frames.shape[3] // 8)):
        at = b, t, slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8)
        green = frames[at][..., 1].astype(np.int64)
        spread = np.sqrt(np.float32(green.size * (green * green).sum() - green.sum() ** 2))
        gain = one + min(spread / np.float32(8 * green.size), one) / np.float32(2)
        rows, columns = np.arange(8 * y, 8 * y + green.shape[0]), np.arange(8 * x, 8 * x + green.shape[1])
        with np.errstate(over="ignore"):
            product = gain * tile[np.ix_(rows % tile.shape[0], columns % tile.shape[1])]
        levels = np.rint(np.where(np.isnan(product), -255, np.clip(product, -255, 255)))
        out[at] = np.clip(frames[at] + levels[..., None], 0, 255)
    return torch.from_numpy(out)


@EVERYWHERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, period", CASES, ids=str)
def test_frames_are_those_of_the_definition(size, period, dtype, where, on):
    impl = on(where, dtype)
    frames, tile = draw(size, where[1]), draw_tile(period, dtype, where[1])
    marked = embed_watermark(frames, tile, **impl)
    assert marked.dtype == torch.uint8 and marked.is_contiguous() and marked.device.type == where[1]
    assert torch.equal(marked.cpu(), definition(frames, tile))
    assert torch.equal(embed_watermark(frames, tile, **impl), marked), "another run gives other bits"


@EVERYWHERE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, where, on):
    frames, tile = draw((2, 2, 11, 18)), torch.randn(5, 6) * 4
    frames, tile = arrange(frames, layout).to(where[1]), arrange(tile, layout).to(where[1])
    assert torch.equal(embed_watermark(frames, tile, **on(where)).cpu(), definition(frames, tile))
    crop = draw((2, 3, 20, 30)).to(where[1]).transpose(0, 1)[:, :, 3:, 5:]  # lines lie side by side: no copy
    assert torch.equal(embed_watermark(crop, tile, **on(where)).cpu(), definition(crop, tile))


@EVERYWHERE
def test_every_deviation_gives_the_exact_gain(where, on):
    """Blocks of 1 to 64 pixels with deviations from 0 to beyond 8; the oracle is fp64, its rounding half a level."""
    sizes = [(h, w) for h in (1, 5, 8) for w in (1, 3, 8)]
    for h, w in sizes:
        frames = (torch.randint(0, 256, (40, 1, h, w, 3)) // torch.arange(1, 41).view(-1, 1, 1, 1, 1)).to(torch.uint8)
        tile = torch.linspace(-40, 40, h * w).view(h, w)
        exact = frames[..., 1].double().flatten(1).std(1, correction=0).div(8).clamp(max=1).div(2).add(1)
        exact = (frames.double() + exact.view(-1, 1, 1, 1, 1) * tile.double()[:, :, None]).clamp(0, 255)
        marked = embed_watermark(frames.to(where[1]), tile.to(where[1]), **on(where)).cpu()
        assert (marked - exact).abs().max() <= 0.5 + 1e-5, (h, w)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("size", [(0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)], ids=str)
def test_empty_in_empty_out(size, impl, on):
    marked = embed_watermark(torch.empty(*size, 3, dtype=torch.uint8), torch.ones(2, 2), **on((impl, "cpu")))
    assert marked.shape == (*size, 3) and marked.dtype == torch.uint8


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_every_byte_is_written_and_none_besides(impl, on):
    on((impl, "cpu"))
    for size, period in CASES:
        frames, tile = draw(size), draw_tile(period)
        for filled in (0, 255):
            memory = torch.full((frames.numel() + 64,), filled, dtype=torch.uint8)
            out = memory[32:-32].view(frames.shape)
            _library.call("embed_watermark_fwd", impl)(frames, tile, out)
            assert torch.equal(out, definition(frames, tile))
            assert (memory[:32] == filled).all() and (memory[-32:] == filled).all()


def test_cpu_frames_do_not_depend_on_the_number_of_threads(require, for_any_threads):
    require("embed_watermark", "cpu")
    frames, tile = draw((1, 3, 90, 300)), torch.randn(64, 64) * 3
    for_any_threads(lambda: {"frames": embed_watermark(frames, tile, impl="cpu")})


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_offsets_beyond_32_bits(impl, on):
    """Frames and lines 2^31 bytes and more apart: address space, hardly memory."""
    on((impl, "cpu"))
    far = 2**31 + 64
    storage = torch.empty(3 * far + 256, dtype=torch.uint8)  # never touched in between
    frames = storage.as_strided((2, 1, 2, 5, 3), (2 * far, far, far, 3, 1))
    frames.copy_(draw((2, 1, 2, 5)))
    tile = torch.randn(4, 4) * 5
    assert torch.equal(embed_watermark(frames, tile, impl=impl), definition(frames, tile))


def test_fp64_is_computed_in_fp64():
    frames, tile = torch.full((1, 1, 1, 1, 3), 100, dtype=torch.uint8), torch.tensor([[0.5 + 1e-12]]).double()
    assert embed_watermark(frames, (tile + 1e-12)).eq(101).all() and embed_watermark(frames, tile.float()).eq(100).all()


def test_no_gradient_is_recorded():
    frames, tile = draw((1, 1, 8, 8)), torch.randn(8, 8, requires_grad=True)
    assert not embed_watermark(frames, tile).requires_grad
    assert torch.equal(embed_watermark(frames, tile), embed_watermark(frames, tile.detach()))


def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(frames, tile):
        return embed_watermark(frames, tile)

    for size, period in (((2, 3, 9, 15), (5, 7)), ((3, 4, 11, 26), (6, 10))):
        frames, tile = draw(size), torch.randn(period) * 4
        assert torch.equal(run(frames, tile), embed_watermark(frames, tile))


FRAMES, TILE = torch.zeros(1, 2, 9, 15, 3, dtype=torch.uint8), torch.zeros(4, 5)
ERRORS = [
    (dict(frames=[1]), TypeError, "frames must be a plain strided uint8 tensor .B, T, H, W, 3.; got list"),
    (dict(frames=FRAMES.float()), TypeError, "frames must be .*uint8 .*; got torch.float32"),
    (dict(frames=FRAMES[0]), ValueError, "frames must be .B, T, H, W, 3.; got shape .2, 9, 15, 3."),
    (dict(frames=FRAMES[..., :1]), ValueError, "frames must be .*; got shape .1, 2, 9, 15, 1."),
    (dict(tile=FRAMES[0, 0, :, :, 0]), TypeError, "tile must be float32.*got torch.uint8"),
    (dict(tile=TILE[0]), ValueError, "tile must be .P, Q.; got shape .5."),
    (dict(tile=TILE[:0]), ValueError, "tile .P, Q. must have at least one row and one column; got .0, 5."),
    (dict(tile=TILE.double(), impl="cpu"), Unavailable, "cpu takes float32, bfloat16 or float16; got torch.float64"),
    (dict(tile=TILE.to("meta")), ValueError, "tile must be on frames's device cpu; got meta"),
    (dict(impl="cuda"), Unavailable, "reference: usable"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message) as caught:
        embed_watermark(**dict(frames=FRAMES, tile=TILE) | change)
    assert "embed_watermark" in str(caught.value)


def test_cpu_private_op_refuses_what_it_cannot_read(require):
    require("embed_watermark", "cpu")
    out = torch.empty_like(FRAMES)
    wrong = [
        ((FRAMES[0], TILE, out), r"frames: expected uint8 \(B, T, H, W, 3\) on cpu, got Byte \(2, 9, 15, 3\)"),
        ((FRAMES.float(), TILE, out), "frames: expected uint8 .* got Float"),
        ((FRAMES.mT.contiguous().mT, TILE, out), "frames: expected lines whose bytes lie side by side"),
        ((FRAMES, TILE.double(), out), "tile: expected float32, bfloat16 or float16, got Double"),
        ((FRAMES, TILE[:, ::2], out), r"tile: expected a contiguous \(P, Q\)"),
        ((FRAMES, TILE[:0], out), r"tile: expected a contiguous \(P, Q\)"),
        ((FRAMES, TILE, out[:, :1]), "out: expected the shape of frames"),
        ((FRAMES, TILE, out.float()), "out: expected uint8 .* got Float"),
        ((FRAMES, TILE, out.mT.contiguous().mT), "out: expected a contiguous tensor"),
    ]
    for args, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            _library.call("embed_watermark_fwd", "cpu")(*args)
