"""video_to_uint8: the frames of a decoded video, to the bit, in every layout, by every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sora_kernels import Unavailable, _dispatch, _library, video_to_uint8
from sora_kernels.testing import LAYOUTS, arrange

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (implementation, device); the Triton interpreter, which runs on the CPU, computes bf16 on raw bits
ON = [(impl, "cpu") for impl in ("reference", "cpu", "triton")] + [
    pytest.param((impl, "cuda"), marks=pytest.mark.gpu, id=f"{impl}-cuda") for impl in ("reference", "triton")
]
EVERYWHERE = pytest.mark.parametrize("where", ON, ids="-".join)
CASES = [  # shape, patch
    ((2, 3, 3, 5, 7), (1, 1, 1)),
    ((1, 1, 1, 1, 1), (1, 1, 1)),
    ((1, 12, 2, 3, 5), (1, 2, 2)),  # Wan 2.2
    ((2, 48, 1, 2, 9), (1, 4, 4)),  # LTX
    ((1, 60, 2, 3, 2), (2, 3, 5)),
    ((1, 130, 1, 2, 67), (1, 1, 1)),  # several blocks of features, and of columns
    ((1, 3, 1, 2, 701), (1, 1, 1)),
]


def op_samples() -> list[tuple[str, tuple]]:
    video = torch.randn(2, 12, 2, 3, 5)
    return [
        ("video_to_uint8_fwd", (video, [1, 2, 2], torch.empty(2, 2, 6, 10, 3, dtype=torch.uint8))),
        ("video_to_uint8_fwd", (video, [1, 1, 1], torch.empty(2, 2, 3, 5, 12, dtype=torch.uint8))),
    ]


@pytest.fixture
def on(require):
    def check(where, dtype=torch.float32) -> dict[str, str]:
        impl, device = where
        require("video_to_uint8", impl, device, dtype)
        if impl == "triton" and device == "cpu" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
            pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
        return dict(impl=impl)

    return check


def draw(shape, dtype=torch.float32, device="cpu"):
    """Values within [-1, 1] and beyond it, ties, both infinities and NaN."""
    x = torch.randn(shape, device=device) * 1.2
    infinity = float("inf")
    special = torch.tensor([float("nan"), infinity, -infinity, 0.0, 1.0, -1.0, 1.5 / 127.5 - 1, 254.5 / 127.5 - 1])
    x.view(-1)[: len(special)] = special.to(device)[: x.numel()]
    x = x.to(dtype)  # on a CPU a NaN becomes that of all bits, which stands for what nobody wrote
    return x.masked_fill(x.isnan(), float("nan"))


def definition(video, patch):
    """In NumPy, element by element of what a frame is made of."""
    x = video.float().cpu().numpy()
    pt, ph, pw = patch
    B, features, T, H, W = x.shape
    out = np.empty((B, T * pt, H * ph, W * pw, features // (pt * ph * pw)), np.float32)
    for c, i, k, j in np.ndindex(out.shape[-1], pt, pw, ph):
        out[:, i::pt, j::ph, k::pw, c] = x[:, ((c * pt + i) * pw + k) * ph + j]
    scaled = (np.clip(out, -1, 1) + np.float32(1)) * np.float32(127.5)
    return torch.from_numpy(np.rint(np.where(np.isnan(out), np.float32(0), scaled)).astype(np.uint8))


@EVERYWHERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
@pytest.mark.parametrize("shape, patch", CASES, ids=str)
def test_frames_are_those_of_the_definition(shape, patch, layout, dtype, where, on):
    impl, video = on(where, dtype), draw(shape, dtype, where[1])
    if layout == "channels last":
        video = video.contiguous(memory_format=torch.channels_last_3d)
    else:
        video = arrange(video, layout)
    frames = video_to_uint8(video, patch=patch, **impl)
    assert frames.dtype == torch.uint8 and frames.is_contiguous() and frames.device.type == where[1]
    assert torch.equal(frames.cpu(), definition(video, patch))


@EVERYWHERE
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_every_level_is_rounded_as_pytorch_rounds_it(order, where, on):
    """At each tie between two levels and at its neighbours: a fused product and sum would round some of them apart."""
    ties = ((torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1).float()
    above, below = (torch.nextafter(ties, torch.tensor(end)) for end in (2.0, -2.0))
    x = torch.cat([ties, above, below, torch.nextafter(above, torch.tensor(2.0)), torch.linspace(-1.1, 1.1, 30003)])
    x = x[: x.numel() // 3 * 3].view(1, 3, 1, 1, -1).to(where[1]).contiguous(memory_format=order)
    expected = x.clamp(-1, 1).movedim(1, -1).add(1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(video_to_uint8(x, **on(where)), expected)
    assert expected.unique().numel() == 256


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_ordered_as_in_diffusers(patch):
    """Wan's unpatchify by name; the last lines of LTX's decoder, which have none, as they stand there."""
    wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    video = torch.rand(2, 3 * patch**2, 2, 3, 5) * 2 - 1
    frames = video_to_uint8(video, patch=(1, patch, patch))

    def expected(pixels):
        return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)

    assert torch.equal(frames, expected(wan.unpatchify(video, patch)))
    ltx = video.reshape(2, -1, 1, patch, patch, 2, 3, 5).permute(0, 1, 5, 2, 6, 4, 7, 3)
    assert torch.equal(frames, expected(ltx.flatten(6, 7).flatten(4, 5).flatten(2, 3)))


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (1, 0, 2, 4, 4), (1, 12, 0, 4, 4), (1, 12, 2, 4, 0)], ids=str)
def test_empty_in_empty_out(shape, impl, on):
    patch = (1, 2, 2) if shape[1] % 4 == 0 else (1, 1, 1)
    frames = video_to_uint8(torch.empty(shape), patch=patch, **on((impl, "cpu")))
    B, features, T, H, W = shape
    cells = patch[1] * patch[2]
    assert frames.shape == (B, T, H * patch[1], W * patch[2], features // cells) and frames.dtype == torch.uint8


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_every_byte_is_written(impl, on):
    on((impl, "cpu"))
    for shape, patch in CASES:
        video = draw(shape)
        expected = definition(video, patch)
        for filled in (0, 255):
            out = torch.full_like(expected, filled)
            _library.call("video_to_uint8_fwd", impl)(video, list(patch), out)
            assert torch.equal(out, expected)


def test_cpu_frames_do_not_depend_on_the_number_of_threads(require, for_any_threads):
    require("video_to_uint8", "cpu")
    video = torch.randn(1, 12, 3, 90, 100)
    for_any_threads(lambda: {"frames": video_to_uint8(video, patch=(1, 2, 2), impl="cpu")})


def test_offsets_beyond_32_bits(require):
    """One stored frame seen as clips 2^30 elements apart: address space, hardly memory."""
    require("video_to_uint8", "cpu")
    storage = torch.empty(4 * 2**30 + 48, dtype=torch.bfloat16)  # never touched between the clips
    video = storage.as_strided((5, 3, 1, 4, 4), (2**30, 16, 16, 4, 1))
    video.copy_(torch.randn(5, 3, 1, 4, 4))
    assert torch.equal(video_to_uint8(video, impl="cpu"), definition(video, (1, 1, 1)))


def test_no_gradient_is_recorded():
    video = torch.randn(1, 3, 1, 2, 2, requires_grad=True)
    assert not video_to_uint8(video).requires_grad
    assert torch.equal(video_to_uint8(video), video_to_uint8(video.detach()))


def test_fp64_is_rounded_in_fp64():
    video = torch.rand(1, 3, 2, 8, 8, dtype=torch.float64) * 2 - 1
    expected = video.movedim(1, -1).add(1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(video_to_uint8(video), expected)


def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(video):
        return video_to_uint8(video, patch=(1, 2, 2))

    for size in ((10, 12, 2, 3, 5), (11, 8, 3, 4, 7)):
        video = torch.randn(size)
        assert torch.equal(run(video), video_to_uint8(video, patch=(1, 2, 2)))


VIDEO = torch.zeros(2, 12, 2, 4, 6)
ERRORS = [
    (dict(video=[1.0]), TypeError, "video must be a tensor .B, C\\*pt\\*pw\\*ph, T, H, W.; got list"),
    (dict(video=VIDEO[0]), ValueError, "video must be .*; got shape .12, 2, 4, 6."),
    (dict(video=VIDEO.to(torch.uint8)), TypeError, "video must be float32.*got torch.uint8"),
    (dict(patch=(1, 5, 1)), ValueError, "multiple of pt\\*ph\\*pw = 5 channels for patch .1, 5, 1.; got 12"),
    (dict(patch=2), ValueError, "patch must be three integers"),
    (dict(patch=(1, 0, 2)), ValueError, "patch must be at least 1"),
    (dict(impl="cuda"), Unavailable, "reference: usable"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message) as caught:
        video_to_uint8(**dict(video=VIDEO) | change)
    assert "video_to_uint8" in str(caught.value)


def test_cpu_private_op_refuses_what_it_cannot_read(require):
    require("video_to_uint8", "cpu")
    video, patch, out = op_samples()[0][1]
    wrong = [
        ((video[0], patch, out), r"video: expected \(B, features, T, H, W\), got Float \(12, 2, 3, 5\)"),
        ((video.double(), patch, out), "video: expected float32, bfloat16 or float16, got Double"),
        ((video, [2, 2], out), "patch: expected three positive integers"),
        ((video, [1, 5, 1], out), "video: expected a multiple of 5 features"),
        ((video, patch, out.float()), "out: expected uint8 on cpu, got Float"),
        ((video, patch, out[:, :1]), r"out: expected \(B, T pt, H ph, W pw, C\) = \(2, 2, 6, 10, 3\)"),
        ((video, patch, out.mT.contiguous().mT), "out: expected a contiguous tensor"),
    ]
    for args, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            _library.call("video_to_uint8_fwd", "cpu")(*args)
