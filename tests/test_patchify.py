"""patch_embed3d, unpatchify3d, final_layer: the formula, the layouts, gradients, contract."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sora_kernels import Unavailable, _dispatch, final_layer, norm_modulate, patch_embed3d, unpatchify3d
from sora_kernels.patchify import reference
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ["reference", "cpu", "triton"]
KERNELS = ["cpu", "triton"]
# (implementation, device); the Triton interpreter, which runs on the CPU, computes bf16 on raw bits
ON = [(impl, "cpu") for impl in IMPLS] + [
    pytest.param((impl, "cuda"), marks=pytest.mark.gpu, id=f"{impl}-cuda") for impl in ("reference", "triton")
]
NORMS = dict(layer=torch.nn.functional.layer_norm, rms=torch.nn.functional.rms_norm)


@pytest.fixture
def on(require):
    """Skip where an implementation cannot run a call of this dtype on this device, backward included."""

    def check(op, impl, device="cpu", dtype=torch.float32):
        require(op, impl, device, dtype, grad=True)
        if impl == "triton" and device == "cpu" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
            pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")

    return check


def check_rule(function, plain, inputs, grad, terms=1):
    """The error rule on the output and every gradient; `plain` is the formula in the dtype of its inputs."""
    with poison_empty():
        ours = outputs_and_grads(function, inputs, [grad])
    oracle = outputs_and_grads(
        plain, {n: None if t is None else t.double() for n, t in inputs.items()}, [grad.double()]
    )
    dtype = grad.dtype
    same = {n: None if t is None else t.to(dtype) for n, t in inputs.items()}
    baseline = outputs_and_grads(plain, same, [grad])
    for name, result in ours.items():
        reduced = name.startswith("grad") and name not in ("grad video", "grad x")
        assert_matches_oracle(result, oracle[name], baseline[name].to(result.dtype), name, terms if reduced else 1)


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    empty = torch.empty_like
    video, weight, bias, pos = (
        torch.randn(2, 3, 2, 4, 6),
        torch.randn(5, 3, 1, 2, 2),
        torch.randn(5),
        torch.randn(1, 12, 5),
    )
    tokens = torch.randn(2, 12, 5)
    grid = (2, 2, 3)
    features, clip = torch.randn(2, 12, 12), torch.randn(2, 3, 2, 4, 6)
    shift, scale, out_weight, out_bias = torch.randn(2, 1, 5), torch.randn(2, 1, 5), torch.randn(12, 5), torch.randn(12)
    inputs = (tokens, shift, scale, out_weight, out_bias)
    settings = (*grid, False, 1e-6)
    return [
        ("patch_embed3d_fwd", (video, weight, bias, pos, empty(tokens))),
        ("patch_embed3d_fwd", (video, weight, None, None, empty(tokens))),
        ("patch_embed3d_bwd", (tokens, video, weight, bias, pos, *map(empty, (video, weight, bias, pos)))),
        ("patch_embed3d_bwd", (tokens, video, weight, None, None, None, empty(weight), None, None)),
        ("unpatchify3d_fwd", (features, *grid, empty(clip))),
        ("unpatchify3d_bwd", (clip, *grid, empty(features))),
        ("final_layer_fwd", (*inputs, *settings, empty(clip))),
        ("final_layer_bwd", (clip, *inputs, *settings, *map(empty, inputs))),
        ("final_layer_bwd", (clip, tokens, None, None, out_weight, None, *settings, empty(tokens), *[None] * 4)),
    ]


# patch_embed3d

EMBED = [
    # B, C, (T, H, W) in patches, patch, D, bias, pos
    (2, 3, (2, 3, 4), (1, 2, 2), 5, True, 3),
    (1, 1, (3, 1, 5), (2, 1, 3), 7, True, 2),
    (3, 5, (1, 2, 1), (1, 1, 1), 1, False, 0),
    (1, 16, (1, 1, 1), (1, 2, 2), 33, False, 2),
    (5, 2, (2, 5, 7), (1, 1, 2), 70, True, 2),  # several blocks and chunks; pos summed over clips
    (1, 128, (1, 2, 3), (2, 4, 4), 40, True, 0),  # K = 4096
]
TILES = [  # several tiles of tokens, of D, of features and, where it is no power of two, a rest of each
    (2, 6, (3, 5, 5), (1, 2, 2), 70, True, 2),
    (1, 9, (1, 2, 2), (2, 3, 5), 5, True, 3),
]


def embed_inputs(case, dtype=torch.float64):
    B, C, grid, patch, D, bias, pos = case
    torch.manual_seed(0)
    S = grid[0] * grid[1] * grid[2]
    inputs = dict(
        video=torch.randn(B, C, *(n * p for n, p in zip(grid, patch, strict=True))),
        weight=torch.randn(D, C, *patch) / 3,
        bias=torch.randn(D) if bias else None,
        pos={0: None, 2: torch.randn(S, D), 3: torch.randn(B, S, D)}[pos],
    )
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}


def conv3d(video, weight, bias, pos):
    """What a model writes: a Conv3d, flattened to tokens, and an addition."""
    tokens = torch.nn.functional.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).mT
    return tokens if pos is None else tokens + pos


@pytest.mark.parametrize("case", EMBED)
def test_patch_embed3d_is_a_strided_conv3d(case):
    inputs = embed_inputs(case)
    B, S, D = case[0], case[2][0] * case[2][1] * case[2][2], case[4]
    grads = [torch.randn(B, S, D, dtype=torch.float64)]
    ours, theirs = (outputs_and_grads(f, inputs, grads) for f in (patch_embed3d, conv3d))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ON, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*EMBED, *TILES])
def test_patch_embed3d_error_rule(case, dtype, where, on):
    impl, device = where
    on("patch_embed3d", impl, device, dtype)
    inputs = {name: None if t is None else t.to(device) for name, t in embed_inputs(case, dtype).items()}
    S = case[2][0] * case[2][1] * case[2][2]
    grad = torch.randn(case[0], S, case[4]).to(device, dtype)
    check_rule(partial(patch_embed3d, impl=impl), conv3d, inputs, grad, terms=case[0] * S)


GPU_EMBED = [  # Wan 1.3B; Wan image to video, 36 channels; LTX; a video of pixels
    (1, 16, (21, 30, 52), (1, 2, 2), 1536, True, 0),
    (2, 36, (5, 15, 26), (1, 2, 2), 1536, True, 2),
    (2, 128, (3, 16, 24), (1, 1, 1), 2048, True, 3),
    (1, 3, (4, 28, 52), (2, 4, 4), 1152, True, 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_EMBED)
def test_triton_patch_embed3d_at_the_shapes_of_models(case, dtype):
    inputs = {name: None if t is None else t.cuda() for name, t in embed_inputs(case, dtype).items()}
    S = case[2][0] * case[2][1] * case[2][2]
    grad = torch.randn(case[0], S, case[4]).to("cuda", dtype)
    check_rule(partial(patch_embed3d, impl="triton"), conv3d, inputs, grad, terms=case[0] * S)


@pytest.mark.parametrize("where", ON, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patch_embed3d_rounds_once_for_mixed_dtypes(dtype, where, on):
    impl, device = where
    on("patch_embed3d", impl, device, dtype)
    inputs = {name: t.to(device) for name, t in embed_inputs(EMBED[0], torch.float32).items()}
    inputs["video"] = inputs["video"].to(dtype)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    out = patch_embed3d(**leaves, impl=impl)
    out.float().square().sum().backward()
    assert out.dtype == dtype
    assert {name: t.grad.dtype for name, t in leaves.items()} == {name: t.dtype for name, t in inputs.items()}
    oracle = conv3d(*(t.detach().double() for t in inputs.values()))
    assert (out.double() - oracle).abs().max() <= torch.finfo(dtype).eps / 2 * oracle.abs().max()


@pytest.mark.parametrize("reducers", [1, 5])
def test_triton_reduces_the_tiles_of_tokens_in_several_chunks(reducers, on, monkeypatch):
    """One program for all tokens, and several for more than one tile each, reached at test size by a small bound."""
    on("patch_embed3d", "triton")
    from sora_kernels.patchify import kernels_embed

    monkeypatch.setattr(kernels_embed, "REDUCERS", reducers)
    for case in TILES[0], (4, 2, (1, 9, 5), (1, 1, 2), 5, True, 3):
        grad = torch.randn(case[0], case[2][0] * case[2][1] * case[2][2], case[4])
        check_rule(partial(patch_embed3d, impl="triton"), conv3d, embed_inputs(case, torch.float32), grad, 1000)


@pytest.mark.parametrize("programs", [1, 7])
def test_triton_forward_gives_a_program_several_blocks_of_the_width(programs, on, monkeypatch):
    on("patch_embed3d", "triton")
    from sora_kernels.patchify import kernels_embed

    monkeypatch.setattr(kernels_embed, "PROGRAMS", programs)
    inputs = embed_inputs((2, 3, (1, 5, 9), (1, 2, 2), 230, True, 2), torch.float32)
    with torch.no_grad(), poison_empty():
        out = patch_embed3d(**inputs, impl="triton")
    oracle = conv3d(**{n: t.double() for n, t in inputs.items()})
    assert_matches_oracle(out, oracle, conv3d(**inputs))


# unpatchify3d


def test_unpatchify3d_element_by_element():
    (T, H, W), (pt, ph, pw), C = (2, 3, 1), (2, 1, 3), 2
    tokens = torch.arange(2.0 * T * H * W * pt * ph * pw * C).reshape(2, T * H * W, -1)
    out = unpatchify3d(tokens, (T, H, W), (pt, ph, pw), C)
    assert out.shape == (2, C, T * pt, H * ph, W * pw)
    for b, c, f, y, x in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        t, i, h, j, w, k = f // pt, f % pt, y // ph, y % ph, x // pw, x % pw
        assert out[b, c, f, y, x] == tokens[b, (t * H + h) * W + w, ((i * ph + j) * pw + k) * C + c]


@pytest.mark.parametrize("where", ON, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
@pytest.mark.parametrize("size, patch", [((2, 3, 4, 3, 10), (2, 3, 5)), ((1, 70, 1, 2, 8), (1, 2, 1))])
def test_unpatchify3d_inverts_patchify_and_so_does_its_gradient(size, patch, layout, dtype, where, require):
    impl, device = where
    require("unpatchify3d", impl, device, dtype, grad=True)
    video = torch.randn(size).to(device, dtype)
    grid = [n // p for n, p in zip(size[2:], patch, strict=True)]
    tokens = reference.patchify3d(video, patch)
    assert torch.equal(unpatchify3d(tokens, grid, patch, size[1], impl=impl), video)
    if layout == "channels last":
        arranged, grad = tokens.requires_grad_(), video.to(memory_format=torch.channels_last_3d)
    else:
        arranged, grad = arrange(tokens, layout).requires_grad_(), arrange(video, layout)
    with poison_empty():
        out = unpatchify3d(arranged, grid, patch, size[1], impl=impl)
        (result,) = torch.autograd.grad(out, arranged, grad)
    assert torch.equal(out, reference.unpatchify3d(arranged, grid, patch, size[1]))
    assert torch.equal(result, reference.patchify3d(grad, patch))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_unpatchify3d_at_the_shape_of_wan(dtype):
    video = torch.randn(1, 16, 21, 90, 160).to("cuda", dtype)
    tokens = reference.patchify3d(video, (1, 2, 2)).requires_grad_()
    with poison_empty():
        out = unpatchify3d(tokens, (21, 45, 80), (1, 2, 2), 16, impl="triton")
        (result,) = torch.autograd.grad(out, tokens, out.detach())
    assert torch.equal(out, video) and torch.equal(result, tokens)


# final_layer

FINAL = [
    # B, grid, patch, C, D, shape of shift, shape of scale, norm, bias
    (2, (2, 2, 3), (1, 2, 2), 3, 8, (2, 1, 8), (2, 1, 8), "layer", True),
    (2, (3, 1, 2), (2, 1, 3), 1, 5, (2, 3, 5), (2, 6, 5), "rms", False),
    (1, (1, 1, 1), (1, 1, 1), 16, 33, (33,), (1, 33), "layer", True),
    (3, (1, 2, 2), (1, 2, 1), 2, 16, None, (16,), "rms", True),
    (1, (2, 1, 2), (1, 1, 2), 2, 6, (1, 2, 6), None, "layer", False),
    (2, (2, 5, 13), (1, 2, 2), 5, 130, (2, 1, 130), (130,), "layer", True),  # a modulation row over several chunks
    (2, (13, 3, 5), (1, 2, 2), 16, 70, (2, 13, 70), (2, 195, 70), "rms", True),  # rows of tokens side by side
    (2, (2, 1, 3), (1, 1, 1), 2, 9, (1, 2, 9), (1, 9), "layer", True),  # rows of all clips
]
FINAL_TILES = [  # several tiles of tokens, of D, of features and, where it is no power of two, a rest of each
    (1, (2, 5, 13), (1, 2, 2), 17, 40, (1, 2, 40), (1, 2, 40), "layer", True),
    (2, (3, 2, 6), (1, 1, 1), 5, 33, (2, 36, 33), (2, 1, 33), "layer", True),
    (2, (2, 3, 6), (2, 3, 1), 2, 20, (2, 18, 20), (2, 18, 20), "rms", True),
    (1, (1, 1, 5), (1, 1, 1), 300, 9, (9,), None, "layer", False),
]


def final_inputs(case, dtype=torch.float64):
    B, grid, patch, C, D, shift, scale, norm, bias = case
    torch.manual_seed(0)
    features = patch[0] * patch[1] * patch[2] * C
    inputs = dict(
        x=torch.randn(B, grid[0] * grid[1] * grid[2], D) * 2 + 1,
        shift=None if shift is None else torch.randn(shift),
        scale=None if scale is None else torch.randn(scale) / 2,
        weight=torch.randn(features, D) / D**0.5,
        bias=torch.randn(features) if bias else None,
    )
    inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    return inputs, dict(grid=grid, patch=patch, norm=norm)


def composition(x, shift, scale, weight, bias, *, grid, patch, norm):
    """Norm, modulate, linear, einops' rearrange: everything in the dtype of x."""

    def rows(t):
        t = t[:, None] if t.ndim == 2 else t
        return t if t.ndim == 1 else t.repeat_interleave(x.shape[1] // t.shape[1], 1)

    y = NORMS[norm](x, x.shape[-1:], eps=1e-6)
    y = y if scale is None else y * (1 + rows(scale))
    y = y if shift is None else y + rows(shift)
    y = torch.nn.functional.linear(y, weight, bias)
    (T, H, W), (pt, ph, pw) = grid, patch
    y = y.reshape(-1, T, H, W, pt, ph, pw, weight.shape[0] // (pt * ph * pw))
    return torch.einsum("bthwijkc->bctihjwk", y).reshape(-1, y.shape[-1], T * pt, H * ph, W * pw)


def final_grad(case, dtype):
    B, grid, patch, C = case[:4]
    return torch.randn(B, C, *(n * p for n, p in zip(grid, patch, strict=True))).to(dtype)


@pytest.mark.parametrize("case", FINAL)
def test_final_layer_is_the_composition(case):
    inputs, settings = final_inputs(case)
    grads = [final_grad(case, torch.float64)]
    ours, theirs = (
        outputs_and_grads(lambda f=f, **kw: f(**kw, **settings), inputs, grads) for f in (final_layer, composition)
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


def test_final_layer_is_the_ops_one_after_another():
    inputs, settings = final_inputs(FINAL[1])
    x, shift, scale, weight, _ = inputs.values()
    tokens = norm_modulate(x, shift, scale, norm="rms") @ weight.T
    expected = unpatchify3d(tokens, settings["grid"], settings["patch"], 1)
    torch.testing.assert_close(final_layer(**inputs, **settings), expected, rtol=1e-12, atol=1e-12)


def check_final(case, dtype, impl, device="cpu"):
    inputs, settings = final_inputs(case, dtype)
    inputs = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    grad = final_grad(case, dtype).to(device)
    terms = inputs["x"].shape[0] * inputs["x"].shape[1]
    check_rule(partial(final_layer, **settings, impl=impl), partial(composition, **settings), inputs, grad, terms)


@pytest.mark.parametrize("where", ON, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*FINAL, *FINAL_TILES])
def test_final_layer_error_rule(case, dtype, where, on):
    impl, device = where
    on("final_layer", impl, device, dtype)
    check_final(case, dtype, impl, device)


GPU_FINAL = [  # Wan 1.3B per clip, Wan 14B per frame, Wan 5B with a row per token and 48 channels, LTX
    (1, (21, 30, 52), (1, 2, 2), 16, 1536, (1, 1, 1536), (1, 1, 1536), "layer", True),
    (1, (21, 15, 26), (1, 2, 2), 16, 5120, (1, 21, 5120), (1, 21, 5120), "layer", True),
    (2, (5, 22, 40), (1, 2, 2), 48, 3072, (2, 4400, 3072), (2, 4400, 3072), "layer", True),
    (2, (3, 16, 24), (1, 1, 1), 128, 2048, (2, 2048), (2, 2048), "rms", True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_FINAL)
def test_triton_final_layer_at_the_shapes_of_models(case, dtype):
    check_final(case, dtype, "triton", "cuda")


@pytest.mark.parametrize("where", ON, ids="-".join)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_final_layer_takes_parameters_of_another_dtype(kind, where, on):
    impl, device = where
    dtype = torch.float16 if kind == torch.float32 else torch.float32
    on("final_layer", impl, device, dtype)
    inputs, settings = final_inputs(FINAL_TILES[1], kind)
    inputs = {name: t.to(device) for name, t in inputs.items()} | {"x": inputs["x"].to(device, dtype)}
    grad = final_grad(FINAL_TILES[1], dtype).to(device)
    check_rule(partial(final_layer, **settings, impl=impl), partial(composition, **settings), inputs, grad, 72)


@pytest.mark.parametrize("where", ON, ids="-".join)
@pytest.mark.parametrize("row", ["far from zero", "one channel stands out", "one block stands out", "constant"])
def test_final_layer_statistics_of_difficult_rows(row, where, on):
    """Rows for which E[x²] − mean², or sums about a value taken from the row, would lose every digit.

    What no formula can avoid is the rounding of x against what is left of it, x − mean, and those of sums of D terms.
    """
    impl, device = where
    on("final_layer", impl, device)
    case = (1, (1, 2, 3), (1, 2, 2), 4, 200, (200,), (200,), "layer", True)
    inputs, settings = final_inputs(case, torch.float32)
    x = torch.randn_like(inputs["x"])
    if row == "far from zero":
        x = 1000 + 0.1 * x
    elif row == "one channel stands out":
        x[..., 0] = 1e4
    elif row == "one block stands out":
        x[..., :16] += 1e3
    else:
        x[:] = 3.3
    inputs = {name: t.to(device) for name, t in (inputs | {"x": x}).items()}
    grads = [final_grad(case, torch.float32).to(device)]
    ours = outputs_and_grads(partial(final_layer, **settings, impl=impl), inputs, grads)
    double = {name: t.double() for name, t in inputs.items()}
    oracle = outputs_and_grads(partial(composition, **settings), double, [grads[0].double()])
    mean, variance = double["x"].mean(-1).abs(), double["x"].var(-1, correction=0)
    condition = 1 + (mean / (variance + 1e-6).sqrt()).max().item()
    for name, result in ours.items():
        bound = 200**0.5 * condition * torch.finfo(torch.float32).eps * oracle[name].abs().max()
        assert (result.double() - oracle[name]).abs().max() <= bound, name


@pytest.mark.parametrize("programs", [1, 4, 8])
def test_triton_backward_of_final_layer_splits_frames_and_bounds_its_partials(programs, on, monkeypatch):
    """Fewer programs than frames: rows go by token and are summed afterwards. More: each frame has several chunks."""
    on("final_layer", "triton")
    from sora_kernels.patchify import kernels_final

    monkeypatch.setattr(kernels_final, "PROGRAMS", programs)
    check_final((2, (2, 6, 12), (1, 2, 1), 5, 20, (2, 2, 20), (2, 2, 20), "layer", True), torch.float32, "triton")


# All of them


def calls():
    embed, (final, settings) = embed_inputs(EMBED[0]), final_inputs(FINAL[1])
    return {
        "patch_embed3d": (patch_embed3d, embed, torch.randn(2, 24, 5, dtype=torch.float64)),
        "final_layer": (partial(final_layer, **settings), final, final_grad(FINAL[1], torch.float64)),
    }


def floats(inputs):
    return {n: None if t is None else t.float() for n, t in inputs.items()}


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_inputs_and_gradients(impl, layout, name, on):
    on(name, impl)
    function, inputs, grad = calls()[name]
    if impl != "reference":  # kernels do the same whatever the strides: not a bit may change
        inputs, grad = floats(inputs), grad.float()
    arranged = {n: None if t is None else arrange(t, layout) for n, t in inputs.items()}
    dense = {n: None if t is None else t.contiguous() for n, t in arranged.items()}
    with poison_empty():
        ours = outputs_and_grads(partial(function, impl=impl), arranged, [arrange(grad, layout)])
    expected = outputs_and_grads(partial(function, impl=impl), dense, [arrange(grad, layout).contiguous()])
    tolerance = 1e-12 if impl == "reference" else 0.0
    for n, result in ours.items():
        torch.testing.assert_close(result, expected[n], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_channels_last_video(impl, on):
    on("patch_embed3d", impl)
    inputs = embed_inputs(EMBED[0], torch.float64 if impl == "reference" else torch.float32)
    grads = [torch.randn(2, 24, 5, dtype=inputs["video"].dtype)]
    expected = outputs_and_grads(partial(patch_embed3d, impl=impl), inputs, grads)
    inputs["video"] = inputs["video"].to(memory_format=torch.channels_last_3d)
    tolerance = 1e-13 if impl == "reference" else 0.0
    for n, result in outputs_and_grads(partial(patch_embed3d, impl=impl), inputs, grads).items():
        torch.testing.assert_close(result, expected[n], rtol=tolerance, atol=tolerance)


def check_each_alone(function, inputs, grad):
    """Each gradient by itself has the bits that it has beside all others."""
    together = outputs_and_grads(function, inputs, [grad])
    for n in (n for n, t in inputs.items() if t is not None):
        leaf = inputs[n].clone().requires_grad_()
        with poison_empty():
            (alone,) = torch.autograd.grad(function(**inputs | {n: leaf}), leaf, grad)
        assert torch.equal(alone, together[f"grad {n}"]), n


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_alone_equals_the_one_computed_with_all_others(impl, name, on):
    on(name, impl)
    function, inputs, grad = calls()[name]
    check_each_alone(partial(function, impl=impl), floats(inputs), grad.float())


@pytest.mark.parametrize("pos", [2, 3])
def test_triton_adds_tokens_in_one_order_whichever_gradients_are_wanted(pos, on, monkeypatch):
    """Of several blocks of features, chunks of tokens, and clips that share pos."""
    on("patch_embed3d", "triton")
    from sora_kernels.patchify import kernels_embed

    monkeypatch.setattr(kernels_embed, "REDUCERS", 6)
    inputs = embed_inputs((3, 24, (1, 9, 10), (1, 2, 2), 40, True, pos), torch.float32)
    check_each_alone(partial(patch_embed3d, impl="triton"), inputs, torch.randn(3, 90, 40))


@pytest.mark.parametrize("name", calls())
def test_gradcheck(name):
    function, inputs, _ = calls()[name]
    given = {n: t.requires_grad_() for n, t in inputs.items() if t is not None}
    absent = {n: None for n, t in inputs.items() if t is None}
    assert torch.autograd.gradcheck(
        lambda *args: function(**dict(zip(given, args, strict=True)), **absent), tuple(given.values()), fast_mode=True
    )


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("where", ON, ids="-".join)
def test_backward_repeats_bitwise(where, name, on):
    impl, device = where
    on(name, impl, device)
    function, inputs, grad = calls()[name]
    inputs = {n: None if t is None else t.to(device) for n, t in floats(inputs).items()}
    run = partial(function, impl=impl)
    first, second = (outputs_and_grads(run, inputs, [grad.float().to(device)]) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", calls())
def test_autocast_changes_nothing(name):
    function, inputs, grad = calls()[name]
    inputs = {n: None if t is None else t.float() for n, t in inputs.items()}
    expected = outputs_and_grads(function, inputs, [grad.float()])
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_grads(function, inputs, [grad.float()])
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, on):
    for op in ("patch_embed3d", "unpatchify3d", "final_layer"):
        on(op, impl)
    for shape in ((0, 3, 2, 4, 6), (2, 3, 0, 4, 6)):
        video = torch.empty(shape, requires_grad=True)
        weight, bias = torch.randn(5, 3, 1, 2, 2, requires_grad=True), torch.randn(5, requires_grad=True)
        tokens = patch_embed3d(video, weight, bias, impl=impl)
        tokens.sum().backward()
        assert tokens.shape == (shape[0], shape[2] * 6, 5)
        assert torch.equal(weight.grad, torch.zeros_like(weight)) and torch.equal(bias.grad, torch.zeros(5))
    x = torch.empty(0, 6, 4, requires_grad=True)
    out = final_layer(x, None, None, torch.randn(8, 4), grid=(1, 2, 3), patch=(1, 2, 2), impl=impl)
    out.sum().backward()
    assert out.shape == (0, 2, 1, 4, 6) and x.grad.shape == x.shape
    weight, bias = torch.empty(8, 0, requires_grad=True), torch.randn(8, requires_grad=True)
    out = final_layer(torch.empty(2, 6, 0), None, None, weight, bias, grid=(1, 2, 3), patch=(1, 2, 2), impl=impl)
    out.sum().backward()
    tokens = bias.detach().expand(2, 6, 8)
    assert torch.equal(out, reference.unpatchify3d(tokens, (1, 2, 3), (1, 2, 2), 2))
    assert torch.equal(bias.grad, torch.full((8,), 12.0))
    video, weight, bias = torch.empty(2, 0, 2, 4, 6), torch.empty(5, 0, 1, 2, 2), torch.randn(5, requires_grad=True)
    tokens = patch_embed3d(video, weight, bias, impl=impl)
    tokens.sum().backward()
    assert torch.equal(tokens, bias.detach().expand(2, 12, 5)) and torch.equal(bias.grad, torch.full((5,), 24.0))
    assert unpatchify3d(torch.empty(0, 6, 8), (1, 2, 3), (1, 2, 2), 2, impl=impl).shape == (0, 2, 1, 4, 6)


def test_compiles_whole_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(video, weight, out_weight, shift, scale):
        grid = (video.shape[2], video.shape[3] // 2, video.shape[4] // 2)
        tokens = patch_embed3d(video, weight)
        video = final_layer(tokens, shift, scale, out_weight, grid=grid, patch=(1, 2, 2))
        return unpatchify3d(tokens, grid, (1, 1, 1), tokens.shape[2]).sum() + video.sin().sum()

    for size in ((2, 4, 6), (3, 2, 8)):
        torch.manual_seed(0)
        shapes = (2, 3, *size), (5, 3, 1, 2, 2), (12, 5), (2, 1, 5), (5,)
        tensors = [torch.randn(s, requires_grad=True) for s in shapes]
        eager = run._torchdynamo_orig_callable(*tensors)
        compiled = run(*tensors)
        assert torch.equal(compiled, eager)
        for a, b in zip(torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


video, weight = torch.zeros(2, 3, 2, 4, 6), torch.zeros(5, 3, 1, 2, 2)
tokens = torch.zeros(2, 12, 12)
ERRORS = {
    patch_embed3d: (
        dict(video=video, weight=weight),
        [
            (dict(video=[1]), TypeError, "video must be a tensor .B, C, T, H, W.; got list"),
            (dict(video=video[0]), ValueError, "video must be .B, C, T, H, W.; got shape .3, 2, 4, 6."),
            (dict(video=video.long()), TypeError, "video must be float32"),
            (dict(weight=weight[0]), ValueError, "weight must be .D, C, pt, ph, pw."),
            (dict(weight=weight[:, :2]), ValueError, "video's C=3 channels; got 2"),
            (dict(weight=torch.zeros(5, 3, 1, 3, 2)), ValueError, "video's H must be a multiple of the patch 3; got 4"),
            (dict(weight=torch.zeros(5, 3, 1, 0, 2)), ValueError, "the patch .* must be at least 1"),
            (dict(bias=torch.zeros(4)), ValueError, r"bias must have shape \[5\].*got \[4\]"),
            (dict(pos=torch.zeros(11, 5)), ValueError, r"pos must have shape \[12, 5\].*got \[11, 5\]"),
            (dict(pos=torch.zeros(1, 12, 5)), ValueError, r"pos must have shape \[2, 12, 5\]"),
            (dict(bias=torch.zeros(5, device="meta")), ValueError, "bias must be on video's device"),
            (dict(impl="cuda"), Unavailable, "reference: usable"),
        ],
    ),
    unpatchify3d: (
        dict(tokens=tokens, grid=(2, 2, 3), patch=(1, 2, 2), channels=3),
        [
            (dict(tokens=tokens[0]), ValueError, "tokens must be"),
            (dict(grid=(2, 2, 2)), ValueError, r"grid \(2, 2, 2\) makes 8 tokens; tokens has 12"),
            (dict(grid=(2.0, 2, 3)), ValueError, "grid must be three integers"),
            (dict(patch=(1, -2, 2)), ValueError, "patch must be at least 1"),
            (dict(channels=4), ValueError, r"pt\*ph\*pw\*C = 16 features for patch \(1, 2, 2\) and channels 4; got 12"),
            (dict(channels=0), ValueError, "channels must be an integer of at least 1; got 0"),
            (dict(impl="cuda"), Unavailable, "reference: usable"),
        ],
    ),
    final_layer: (
        dict(x=tokens, shift=None, scale=None, weight=torch.zeros(8, 12), grid=(2, 2, 3), patch=(1, 2, 2)),
        [
            (dict(x=tokens[0]), ValueError, "x must be"),
            (dict(grid=(1, 2, 3)), ValueError, "makes 6 tokens; x has 12; text tokens must be cut off first"),
            (dict(shift=torch.zeros(2, 5, 12)), ValueError, "shift has F=5 rows, which must divide S=12"),
            (dict(scale=torch.zeros(3, 12)), ValueError, "scale must be .*B=2 .*S=12, D=12.*got .3, 12."),
            (dict(weight=torch.zeros(8, 11)), ValueError, "x's width D=12; got 11"),
            (dict(weight=torch.zeros(7, 12)), ValueError, r"multiple of pt\*ph\*pw = 4 rows for patch .*; got 7"),
            (dict(bias=torch.zeros(7)), ValueError, r"bias must have shape \[8\]"),
            (dict(norm="batch"), ValueError, "norm must be one of 'layer', 'rms'"),
            (dict(eps=-1.0), ValueError, "eps must be positive"),
            (dict(weight=torch.zeros(8, 12, device="meta")), ValueError, "weight must be on x's device"),
            (dict(impl="cuda"), Unavailable, "reference: usable"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "function, change, error, message",
    [(f, *case) for f, (_, cases) in ERRORS.items() for case in cases],
    ids=[f"{f.__name__}-{m}" for f, (_, cases) in ERRORS.items() for _, _, m in cases],
)
def test_errors(function, change, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**ERRORS[function][0] | change)
    assert function.__name__ in str(caught.value)
