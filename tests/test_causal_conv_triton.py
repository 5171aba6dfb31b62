"""The Triton convolutions, and those of cuDNN between Triton passes: every op, kernel size, stride and factor, forward
and backward, against the definition in fp64, with tiles small enough to meet every border. Without a GPU in the
interpreter, in fp32 and fp16, and aten's convolutions on the CPU in place of cuDNN's."""

from __future__ import annotations

import functools

import pytest
import torch
from test_causal_conv import CALLS, LAST, STREAMS, by_reference, draw, judged, plain, terms_of, terms_of_small

from sora_kernels import Unavailable, _dispatch, causal_conv3d, downsample_conv3d, upsample_conv3d
from sora_kernels.testing import arrange, outputs_and_grads, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := _dispatch.why_not("causal_conv3d", "triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from sora_kernels.causal_conv import config, kernels_conv, kernels_dweight  # noqa: E402

CONVOLUTIONS = [name for name in CALLS if not name.startswith("norm_silu")]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Every kernel with tiles of this many pixels and columns, and blocks of 16 channels."""

    def use(pixels: int, *columns: int) -> None:
        for name in ("forward", "weight_gradient"):
            monkeypatch.setattr(config, name, lambda *_: config.Tile(pixels, columns, 16, 4, 2))

    monkeypatch.setattr(kernels_dweight, "PROGRAMS", 1)
    use(128, 32, 16)
    return use


@pytest.fixture(params=["triton", "cudnn"])
def impl(request, require):
    require("causal_conv3d", request.param, DEVICE)
    return request.param


GEOMETRY = {  # function, kernel, options, frames of the cache; few taps, of which each costs the interpreter its time
    "1x1x1": (causal_conv3d, (1, 1, 1), {}, 0),
    "3x1x1": (causal_conv3d, (3, 1, 1), {}, 2),
    "1x3x3": (causal_conv3d, (1, 3, 3), {}, 0),
    "2x1x5": (causal_conv3d, (2, 1, 5), {}, 1),
    "3x3x3": (causal_conv3d, (3, 3, 3), {}, 2),
    "2x3x1 by 2": (causal_conv3d, (2, 3, 1), {"stride": (2, 2, 2)}, 1),
    "2x1x5 of borders": (causal_conv3d, (2, 1, 5), {"padding": "replicate"}, 1),
    "1x1x3 by 1, 3, 2": (causal_conv3d, (1, 1, 3), {"stride": (1, 3, 2)}, 0),
    "up": (upsample_conv3d, (1, 3, 3), {"factor": (1, 2, 2)}, 0),
    "up in time": (upsample_conv3d, (3, 1, 1), {"factor": (2, 1, 1)}, 1),
    "up 4x1x3 by 3, 1, 2": (upsample_conv3d, (4, 1, 3), {"factor": (3, 1, 2)}, 1),
    "down": (downsample_conv3d, (1, 3, 3), {"factor": (1, 2, 2)}, 0),
    "down in time": (downsample_conv3d, (3, 1, 1), {"factor": (2, 1, 1)}, 1),
    "down 2x4x1 by 2, 3, 1": (downsample_conv3d, (2, 4, 1), {"factor": (2, 3, 1)}, 0),
}


def on_device(tensors):
    return {n: t.to(DEVICE) for n, t in tensors.items()}


@pytest.mark.parametrize("past", ["cache", "zeros"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_convolution(name, past, impl):
    """Odd channels, in one block and in several; one clip with a cache and all that the epilogue does, and two bare."""
    function, kernel, kwargs, frames = GEOMETRY[name]
    B, C, O, T, H, W = (1, 17, 5, 2, 4, 7) if past == "cache" else (2, 3, 33, 2, 4, 3)  # noqa: E741
    tensors = dict(x=torch.randn(B, C, T, H, W), weight=torch.randn(O, C, *kernel), bias=torch.randn(O))
    if past == "cache":
        tensors["x"] = tensors["x"].contiguous(memory_format=LAST)
        tensors["cache"] = torch.randn(B, C, frames, H, W)
        if function is causal_conv3d and "stride" not in kwargs:
            tensors |= dict(residual=torch.randn(B, O, T, H, W), norm_weight=torch.rand(O) + 0.5)
            kwargs = kwargs | dict(return_raw=True)
    check = functools.partial(by_reference, function)
    runs = 1 if DEVICE == "cpu" else 2
    judged(function, check, on_device(tensors), kwargs, terms_of, scale=0.1, impl=impl, runs=runs)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_half_precision(name, dtype, impl):
    function, tensors, kwargs = draw(name, dtype)
    terms = functools.partial(terms_of_small, kwargs=kwargs)
    judged(function, functools.partial(plain, name), on_device(tensors), kwargs, terms, impl=impl, runs=1)


@pytest.mark.parametrize("channels", [(1, 3), (3, 96), (96, 1)], ids=str)
def test_channels(channels, tiles, impl):
    """One, few and many, which several programs share; their norm is then a pass of its own."""
    C, O = channels  # noqa: E741
    tiles(16, 32, 16)
    tensors = dict(x=torch.randn(1, C, 2, 3, 4), weight=torch.randn(O, C, 2, 1, 1), bias=torch.randn(O))
    if O > 1:  # of one channel, the RMS norm leaves the sign: its gradient is rounding
        tensors["norm_weight"] = torch.rand(O) + 0.5
    judged(causal_conv3d, lambda ts, kw: by_reference(causal_conv3d, ts, kw), on_device(tensors), {}, terms_of,
           scale=0.1, impl=impl, runs=1)  # fmt: skip


@pytest.mark.parametrize("pixels", [16, 128])
def test_boxes_within_a_frame_and_of_several_frames(pixels, tiles):
    tiles(pixels, 16)
    x, weight = torch.randn(1, 4, 3, 5, 6, device=DEVICE), torch.randn(5, 4, 2, 1, 3, device=DEVICE)
    expected = causal_conv3d(x, weight, impl="reference")
    torch.testing.assert_close(causal_conv3d(x, weight, impl="triton"), expected, rtol=1e-5, atol=1e-5)


def test_boxes_cover_the_video_with_little_to_spare():
    for pixels in (16, 64, 128, 256):
        for size in ((4, 480, 832), (1, 60, 104), (3, 5, 7), (9, 1, 2), (1, 1, 1)):
            box = config.choose_box(pixels, *size)
            assert box[0] * box[1] * box[2] == pixels
            assert box[0] == 1 or size[1] * size[2] < pixels, "a frame of many pixels is read by itself"
    assert config.choose_box(128, 4, 480, 832) == (1, 8, 16)


def test_columns_hold_a_width_in_powers_of_two():
    for most in (32, 96, 192, 256):
        for width in range(1, 1100):
            columns = config.parts(width, most)
            assert len(columns) <= 2 and all(n in (16, 32, 64, 128) for n in columns) and sum(columns) <= most
            assert -(-width // sum(columns)) * sum(columns) <= max(2 * width, 16)
    assert config.parts(96, 256) == (64, 32) and config.parts(384, 256) == (128, 64)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("channels", [(4, 2), (17, 40)], ids=str)
def test_the_tiles_that_are_shipped(channels, dtype, monkeypatch):
    monkeypatch.undo()
    C, O = channels  # noqa: E741
    shapes = dict(x=(2, C, 2, 3, 2), weight=(O, C, 3, 3, 1), bias=(O,), cache=(2, C, 2, 3, 2))
    shapes |= dict(residual=(2, O, 2, 3, 2), norm_weight=(O,))
    tensors = {n: torch.randn(shape).to(DEVICE, dtype) for n, shape in shapes.items()}
    baseline, terms = functools.partial(plain, "causal_conv3d"), functools.partial(terms_of_small, kwargs={})
    judged(causal_conv3d, baseline, tensors, {}, terms, impl="triton", runs=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "channels", [(3, 96), (16, 384), (96, 96), (192, 192), (128, 256), (512, 512), (96, 3)], ids=str
)
@pytest.mark.parametrize("function", [causal_conv3d, upsample_conv3d, downsample_conv3d])
def test_real_channels_on_a_gpu(function, channels, dtype, monkeypatch, impl):
    """With the tiles of this GPU."""
    monkeypatch.undo()
    C, O = channels  # noqa: E741
    name = function.__name__
    weight = torch.randn(O, C, *((3, 3, 3) if function is causal_conv3d else (1, 3, 3))) / (27 * C) ** 0.5
    tensors = dict(x=torch.randn(1, C, 3, 20, 36).contiguous(memory_format=LAST), weight=weight, bias=torch.randn(O))
    tensors = {n: t.to(DEVICE, dtype) for n, t in tensors.items()}
    if function is causal_conv3d and O > 3:
        tensors["norm_weight"] = torch.ones(O, device=DEVICE)
    with torch.backends.cudnn.flags(allow_tf32=False):
        judged(function, functools.partial(plain, name), tensors, {}, terms_of, impl=impl)


CHUNKED = ["causal_conv3d norm", "causal_conv3d stride 2", "upsample_conv3d in time", "downsample_conv3d in time"]


@pytest.mark.parametrize("cuts", [(2, 4, 0, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_are_the_bits_of_the_whole(name, cuts, impl):
    """The sum of a pixel does not know where its chunk begins. Of integers it is exact in any order: the interpreter's
    products are NumPy's, whose order depends on the row, and cuDNN chooses by the size. So does the norm after it."""
    function, kernel, kwargs, past = STREAMS[name]
    kwargs = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()} | dict(impl=impl)
    exact = DEVICE == "cpu" or impl == "cudnn"
    draw = (lambda *size, device: torch.randint(-3, 4, size, device=device).float()) if exact else torch.randn
    x, weight = draw(1, 3, 8, 3, 4, device=DEVICE), draw(4, 3, *kernel, device=DEVICE)
    weight = weight[..., :1, :] if function is not downsample_conv3d else weight[..., :2, :2]
    whole = function(x, weight, **kwargs)
    cache, parts = torch.zeros(1, 3, past, 3, 4, device=DEVICE), []
    for piece in x.split(cuts, 2):
        part, cache = function(piece, weight, cache=cache, **kwargs)
        parts.append(part)
    tolerance = 1e-6 if impl == "cudnn" and "norm" in name else 0.0
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=tolerance, atol=tolerance)


def sliced_channels_last(t):
    """Inside a larger tensor of NaN whose channels lie side by side: read in place, or its neighbours are."""
    if t.ndim != 5:
        return t
    big = t.new_full([n + 2 for n in t.shape], float("nan")).contiguous(memory_format=LAST)
    view = big[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


ARRANGE = {name: functools.partial(arrange, layout=name) for name in ("sliced", "transposed", "expanded")}
ARRANGE["sliced channels last"] = sliced_channels_last
WITH_CACHE = ["causal_conv3d everything", "upsample_conv3d cache", "downsample_conv3d cache"]


@pytest.mark.parametrize(
    "name, layout",
    [(WITH_CACHE[0], layout) for layout in ARRANGE] + [(name, "sliced channels last") for name in WITH_CACHE[1:]],
)
def test_layouts_of_inputs_and_gradients_change_no_bit(name, layout, impl):
    function, tensors, kwargs = draw(name, torch.float32)
    arranged = {n: ARRANGE[layout](t) for n, t in on_device(tensors).items()}
    dense = {n: t.contiguous() for n, t in arranged.items()}
    douts = [ARRANGE[layout](torch.randn_like(o)) for o in function(**dense, **kwargs)]
    run = functools.partial(outputs_and_grads, lambda **ts: function(**ts, **kwargs, impl=impl))
    expected, actual = run(dense, [d.contiguous() for d in douts]), run(arranged, douts)
    for key in expected:
        if key == "grad bias":  # a sum by torch, which goes through memory in its order
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(actual[key], expected[key]), key


def test_channels_last_stays_channels_last(impl):
    x = torch.randn(2, 4, 2, 3, 5, device=DEVICE).to(memory_format=LAST)
    weight = torch.randn(5, 4, 1, 3, 3, device=DEVICE)
    for function in (causal_conv3d, upsample_conv3d, downsample_conv3d):
        y = function(x, weight, impl=impl)
        assert y.is_contiguous(memory_format=LAST)
        assert torch.equal(y, function(x.contiguous(), weight.contiguous(memory_format=LAST), impl=impl))


@pytest.mark.parametrize("name", WITH_CACHE[:2])
def test_64_bit_offsets_change_no_bit(name, monkeypatch):
    function, tensors, kwargs = draw(name, torch.float32)
    tensors = on_device(tensors)
    douts = [torch.randn_like(o) for o in function(**tensors, **kwargs)]
    run = functools.partial(outputs_and_grads, lambda **ts: function(**ts, **kwargs, impl="triton"), tensors, douts)
    expected = run()
    for module in (kernels_conv, kernels_dweight):
        monkeypatch.setattr(module, "is_wide", lambda *videos: True)
    actual = run()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_frames_that_need_64_bit_offsets_are_recognised():
    def video(*shape):
        return torch.empty(shape, device="meta").to(memory_format=LAST)

    assert not kernels_conv.is_wide(video(1, 128, 99, 4096, 4095), None)
    assert kernels_conv.is_wide(video(1, 1, 1, 1, 1), None, video(1, 128, 1, 4096, 4097))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    x = torch.zeros(1, 32, 70, 1024, 1024, device=DEVICE, dtype=torch.float16).to(memory_format=LAST)
    x[:, :, -3:].normal_()
    weight = torch.randn(32, 32, 3, 1, 1, device=DEVICE, dtype=torch.float16)
    y = causal_conv3d(x, weight, impl="triton")[:, :, -1:]
    expected = causal_conv3d(x[:, :, -3:].contiguous(memory_format=LAST), weight, impl="triton")[:, :, -1:]
    assert torch.equal(y, expected)


def test_chunks_of_pixels_are_added_in_their_order(tiles, monkeypatch):
    """Partial sums of many programs, the same bits each time, within the rule."""
    monkeypatch.setattr(kernels_dweight, "PROGRAMS", 12)
    tiles(16, 16)
    x, weight = torch.randn(2, 3, 3, 4, 5), torch.randn(5, 3, 1, 1, 3)
    judged(causal_conv3d, lambda ts, kw: by_reference(causal_conv3d, ts, kw), on_device(dict(x=x, weight=weight)), {},
           terms_of, scale=0.1, impl="triton")  # fmt: skip


@pytest.mark.parametrize("name", WITH_CACHE)
def test_only_the_gradients_asked_for(name, impl):
    function, tensors, kwargs = draw(name, torch.float32)
    tensors = on_device(tensors)

    def grads(wanted):
        ts = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in tensors.items()}
        out = function(**ts, **kwargs, impl=impl)
        sum(o.cos().sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
        return {n: ts[n].grad for n in wanted}

    together = grads(set(tensors))
    with poison_empty():
        for n in ("x", "weight", "cache"):
            assert torch.equal(grads({n})[n], together[n]), n


def test_a_stride_beyond_the_kernel_leaves_zeros(impl):
    """Pixels that no tap reads have a gradient of 0, not what was in memory."""
    x = torch.randn(1, 3, 4, 5, 6, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 3, 1, 1, 1, device=DEVICE)
    with poison_empty():
        causal_conv3d(x, weight, stride=(2, 3, 2), impl=impl).sum().backward()
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::3, ::2] = weight.sum(0)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (1, 3, 0, 4, 4), (1, 3, 2, 0, 4)], ids=str)
def test_empty_in_empty_out(shape, impl):
    x, weight = torch.randn(shape, device=DEVICE).requires_grad_(), torch.randn(4, 3, 3, 3, 3, device=DEVICE)
    weight.requires_grad_()
    norm = torch.ones(4, device=DEVICE)
    calls = [functools.partial(causal_conv3d, norm_weight=norm), upsample_conv3d, downsample_conv3d]
    for function in calls:
        y = function(x, weight, impl=impl)
        assert y.numel() == 0 and y.shape[0] == shape[0]
        y.sum().backward()
        assert x.grad.shape == shape
    assert weight.grad.eq(0).all()


def test_the_first_image_of_a_clip_has_the_weight_gradient_of_its_only_frame(impl):
    """Taps on frames that are not there are skipped, and their gradient is 0."""
    x, weight = torch.randn(2, 3, 1, 4, 5, device=DEVICE), torch.randn(5, 3, 3, 1, 1, device=DEVICE).requires_grad_()
    with poison_empty():
        causal_conv3d(x, weight, impl=impl).square().sum().backward()
    last = weight.detach()[:, :, 2:].requires_grad_()
    causal_conv3d(x, last, impl="reference").square().sum().backward()
    assert not weight.grad[:, :, :2].any()
    torch.testing.assert_close(weight.grad[:, :, 2:], last.grad, rtol=1e-4, atol=1e-4)


def test_parameters_of_another_dtype_are_rounded_to_that_of_x(impl):
    x = torch.randn(1, 4, 2, 3, 3, device=DEVICE).half()
    weight, bias = torch.randn(4, 4, 1, 3, 3, device=DEVICE), torch.randn(4, device=DEVICE)
    call = functools.partial(causal_conv3d, x, bias=bias, norm_weight=torch.ones(4, device=DEVICE), impl=impl)
    assert torch.equal(call(weight), call(weight.half()))
    weight.requires_grad_()
    upsample_conv3d(x, weight, impl=impl).sum().backward()
    assert weight.grad.dtype == torch.float32


def test_double_precision_is_refused(impl):
    x = torch.zeros(1, 2, 1, 1, 1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(Unavailable, match=f"{impl} takes float32, bfloat16 or float16"):
        causal_conv3d(x, torch.zeros(2, 2, 1, 1, 1, device=DEVICE), impl=impl)
