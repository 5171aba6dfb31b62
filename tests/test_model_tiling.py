"""Tiles of a frame equal the whole frame, in every size, in both directions, in one shot and in a stream."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_model_vae import TINY, close, video_for

from sora_model import tiling
from sora_model.tiling import Span
from sora_model.vae import CausalVAE, VAEConfig

WAN = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1)  # Wan's levels: 8 pixels per latent
TILES = [16, (8, 40), (24, 8), (48, 16), (1000, 32)]  # of 40 x 72 pixels


@pytest.fixture(scope="module")
def wan():
    return build(WAN)


def folding() -> CausalVAE:
    """As many pixels per latent, of which the first level sees four as one."""
    return build(VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 2, 4), num_res_blocks=1, patch=2,
                           temporal_downsample=(False, True)))  # fmt: skip


def residual() -> CausalVAE:
    """Wan 2.2's: with shortcuts around each level, half as many pixels per latent."""
    return build(VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, patch=2, residual=True,
                           temporal_downsample=(True, False)))  # fmt: skip


def build(config: VAEConfig) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(config)
    with torch.no_grad():  # borders must show: a bias makes a padded zero differ from what the layers compute there
        for name, p in vae.named_parameters():
            if name.endswith("bias"):
                p.uniform_(-0.5, 0.5)
    return vae


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("form", ["Wan 2.1", "patches", "Wan 2.2"])
def test_tiles_equal_the_whole(wan, tile, form):
    """To the last digits in fp64; in fp32 no further from fp64 than twice what the untiled result is."""
    wan = {"Wan 2.1": lambda: wan, "patches": folding, "Wan 2.2": residual}[form]()
    video = video_for(wan, (5, 9), 5)
    double = CausalVAE(wan.config).double()
    double.load_state_dict(wan.state_dict())
    with torch.no_grad():
        mean, logvar = double.encode(video.double())
        for actual, expected in zip(double.encode(video.double(), tile=tile), (mean, logvar), strict=True):
            close(actual, expected, 1e-12)
        whole = double.decode(mean, clamp=False)
        close(double.decode(mean, clamp=False, tile=tile), whole, 1e-12)
        latents = mean.float()
        exact = double.decode(latents.double(), clamp=False)
        untiled, tiled = (wan.decode(latents, clamp=False, tile=t).double() for t in (None, tile))
        eps = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (tiled - exact).abs().max() <= 2 * (untiled - exact).abs().max() + 4 * eps


def test_there_is_no_seam(wan):
    """Steps across the borders of tiles are those that the whole frame has there."""
    latents = torch.randn(1, 4, 1, 6, 6)
    with torch.no_grad():
        whole, tiled = wan.decode(latents), wan.decode(latents, tile=16)
    assert whole.diff(dim=4).abs().max() > 0.01
    close(tiled.diff(dim=4)[..., 15::16], whole.diff(dim=4)[..., 15::16])


@pytest.mark.parametrize("form", ["Wan 2.1", "Wan 2.2"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_tiles_stream(wan, chunk, form):
    """Each tile has its own caches: a stream equals one shot, from the first chunk to an uneven last one."""
    wan = wan if form == "Wan 2.1" else residual()
    latents = torch.randn(2, 4, 3, 3, 5)
    with torch.no_grad():
        whole = wan.decode(latents)
        close(torch.cat(list(wan.decode_stream(latents, chunk=chunk, tile=(16, 8))), 2), whole)
        video = whole[:, :, :9]
        mean, _ = wan.encode(video)
        close(torch.cat([m for m, _ in wan.encode_stream(video, chunk=chunk, tile=(16, 8))], 2), mean)


def test_caches_of_tiles_do_not_grow_and_are_for_the_same_tiles(wan):
    latents = torch.randn(1, 4, 1, 3, 5)
    with torch.no_grad():
        _, first = wan.decode_chunk(latents, tile=16)
        _, second = wan.decode_chunk(latents, first, tile=(16, 16))
        assert [t.shape for t in first.tensors] == [t.shape for t in second.tensors]
        for other in (None, 8):
            with pytest.raises(ValueError, match="a clip keeps its tiles"):
                wan.decode_chunk(latents, first, tile=other)
        whole, cache = wan.decode_chunk(latents, tile=1000)
        close(wan.decode_chunk(latents, cache)[0], wan.decode_chunk(latents, cache, tile=(24, 40))[0])


def test_gradients_through_tiles(wan):
    latents = torch.randn(1, 4, 2, 3, 4)

    def grads(tile):
        z = latents.clone().requires_grad_()
        wan.zero_grad()
        wan.decode(z, clamp=False, tile=tile).sin().sum().backward()
        return z.grad, wan.decoder.conv_out.weight.grad.clone(), wan.decoder.up_blocks[0].resnets[0].norm1.grad.clone()

    for tiled, whole in zip(grads(16), grads(None), strict=True):
        close(tiled, whole, 2e-4)


@pytest.mark.parametrize("direction", ["encoder", "decoder"])
def test_windows_are_what_the_layers_see_and_no_more(direction):
    """One output of a network whose weights are all positive, against the inputs that have a gradient."""
    vae = CausalVAE(TINY).double()
    network = getattr(vae, direction)
    size = (48, 48) if direction == "encoder" else (16, 16)
    stages = network.stages
    channels = stages[0].convs[0].in_channels
    x = torch.ones(1, channels, 1, *size, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for p in network.parameters():
            p.uniform_(0.1, 1)
    y = tiling.apply(stages, x, tiling.Pass("reference"))
    for row, column in itertools.product((0, y.shape[3] // 2, y.shape[3] - 1), (5, y.shape[4] - 1)):
        spans = tuple(Span(n, n + 1, of) for n, of in zip((row, column), y.shape[3:], strict=True))
        (grad,) = torch.autograd.grad(y[0, :, 0, row, column].sum(), x, retain_graph=True)
        seen = grad[0, :, 0].abs().sum(0).nonzero()
        lowest, highest = seen.amin(0), seen.amax(0) + 1
        for axis, span in enumerate(tiling.needed(stages, spans)[0]):
            assert (span.start, span.stop, span.size) == (lowest[axis], highest[axis], size[axis])


def test_tiles_are_even_and_cover_the_frame_once(wan):
    for latents, tile in itertools.product(range(1, 12), range(1, 12)):
        rows = [row[0][0] for row in tiling.windows(wan.decoder.stages, (latents, 3), (tile, 3))]
        assert rows[0].start == 0 and rows[-1].stop == 8 * latents
        assert all(a.stop == b.start for a, b in itertools.pairwise(rows))
        sizes = [(row.stop - row.start) / 8 for row in rows]
        assert max(sizes) <= tile and max(sizes) - min(sizes) <= 1 and len(sizes) == -(-latents // tile)


@pytest.mark.parametrize(
    ("tile", "said"),
    [
        (0, "tile must be a number of pixels"),
        (-8, "tile must be a number of pixels"),
        ((8,), r"got \(8,\)"),
        ((8, True), "tile must be a number of pixels"),
        ("8x8", "got '8x8'"),
        (2.0, "got 2.0"),
        (20, r"multiples of 8 pixels; got 20; \(24, 24\) would fit"),
        ((8, 13), r"got \(8, 13\); \(8, 16\) would fit"),
    ],
)
def test_a_bad_tile_is_refused(wan, tile, said):
    with pytest.raises(ValueError, match=said):
        wan.decode(torch.zeros(1, 4, 1, 2, 2), tile=tile)
    with pytest.raises(ValueError, match=said):
        wan.encode_chunk(torch.zeros(1, 3, 1, 16, 16), tile=tile)


@pytest.mark.parametrize(
    ("tile", "size", "ranks", "expected"),
    [
        (None, (60, 104), 8, (30, 26)), (None, (90, 160), 8, (45, 40)), (None, (5, 3), 2, (3, 3)),
        (None, (5, 3), 3, (5, 1)), (None, (60, 104), 7, (60, 15)), (None, (2, 2), 8, (1, 1)),
        (None, (60, 104), 1, None), ((8, 8), (60, 104), 8, (8, 8)),
        ((40, 10), (60, 104), 8, (30, 10)), ((1, 1), (1, 1), 4, None),
    ],
)  # fmt: skip
def test_ranks_have_a_tile_each_or_more(tile, size, ranks, expected):
    assert tiling.shared(tile, size, ranks) == expected
