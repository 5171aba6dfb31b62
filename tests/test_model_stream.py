"""Streams of the VAE: every chunking gives the same clip; chunks compile whole, wait for nothing, and hold no state."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from test_model_vae import TINY, close, video_for
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from benchmarks import timing
from sora_model.stream import Pass
from sora_model.vae import CausalVAE, VAECache, VAEConfig

SMALL = VAEConfig(base_dim=2, z_dim=2, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return CausalVAE(TINY)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return CausalVAE(SMALL).requires_grad_(False)


# Chunks


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("frames", [11, 1, 2], ids=lambda n: f"{n} latent frames")
def test_every_chunking_gives_the_same_clip(tiny, chunk, frames):
    latents = torch.randn(2, 2, frames, 2, 3)
    with torch.no_grad():
        whole = tiny.decode(latents)
        pieces = list(tiny.decode_stream(latents, chunk=chunk))
        close(torch.cat(pieces, 2), whole)
        assert len(pieces) == -(-frames // chunk)
        mean, logvar = tiny.encode(whole)
        moments = list(tiny.encode_stream(iter(whole.split(3, 2)), chunk=chunk))
        close(torch.cat([m for m, _ in moments], 2), mean)
        close(torch.cat([v for _, v in moments], 2), logvar)


def test_memory_does_not_grow_with_the_clip(tiny):
    def decoded(frames):
        pieces = (torch.zeros(1, 2, 1, 8, 8) for _ in range(frames))
        return lambda: sum(video.shape[2] for video in tiny.decode_stream(pieces))

    def encoded(frames):
        pieces = (torch.zeros(1, 3, 1, 32, 32) for _ in range(2 * frames - 1))
        return lambda: sum(mean.shape[2] for mean, _ in tiny.encode_stream(pieces))

    with torch.no_grad():
        for code in (decoded, encoded):
            short, long = (timing.peak_memory(code(n), "cpu") for n in (4, 16))
            assert long == pytest.approx(short, rel=0.02)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_stream_drops_the_old_cache_as_it_is_read(tiny, direction, monkeypatch):
    """A stream would hold two sets of caches at the end of each chunk otherwise: most of its memory."""
    kept: list[list[weakref.ref]] = []
    make = CausalVAE._cache

    def made(self, *args):
        if kept:
            assert not any(ref() is not None for ref in kept[-1])
        cache = make(self, *args)
        kept.append([weakref.ref(t) for t in cache.tensors])
        return cache

    monkeypatch.setattr(CausalVAE, "_cache", made)
    clip = torch.randn(1, 2, 4, 2, 2) if direction == "decode" else torch.randn(1, 3, 7, 8, 8)
    with torch.no_grad():
        assert len(list(getattr(tiny, f"{direction}_stream")(clip))) == len(kept) == 4


@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize("chunk", [1, 2])
def test_every_layer_is_channels_last(tiny, chunk, tile, monkeypatch):
    """A layer that forgot the layout would pass its slower one to all that follow, and through the caches for ever."""
    seen, conv = [], Pass.conv

    def watched(self, x, *args, **kwargs):
        seen.extend((x, *(self.past or ()), y := conv(self, x, *args, **kwargs)))
        return y

    monkeypatch.setattr(Pass, "conv", watched)
    with torch.no_grad():
        for _ in tiny.decode_stream(torch.randn(1, 2, 3, 3, 2), chunk=chunk, tile=tile):
            pass
        for _ in tiny.encode_stream(torch.randn(1, 3, 5, 24, 16), chunk=chunk, tile=tile):
            pass
    assert seen and all(has_dense_channels(t) for t in seen)


def has_dense_channels(t):
    return t.numel() == 0 or t[0, 0].numel() == 1 or t.shape[1] == 1 or t.stride(1) == 1


# Compiling


@pytest.mark.parametrize("tile", [None, 4])
def test_chunks_compile_whole_and_once_for_all_later_ones(small, tile):
    latents, video = torch.randn(1, 2, 5, 2, 4), video_for(small, (2, 4), 9)  # two tiles, or one
    with torch.no_grad():
        whole, mean = small.decode(latents), small.encode(video)[0]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        decode = torch.compile(small.decode_chunk, fullgraph=True, backend=counter)
        frames, cache, graphs = [], None, []
        for z in latents.split(1, 2):
            video_chunk, cache = decode(z, cache, tile=tile)
            frames.append(video_chunk)
            graphs.append(counter.frame_count)
        close(torch.cat(frames, 2), whole)
        assert graphs == [1, 2, 2, 2, 2]  # the first chunk has no past
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        encode = torch.compile(small.encode_chunk, fullgraph=True, backend=counter)
        means, cache, graphs = [], None, []
        for chunk in video.split([1, 2, 2, 2, 2], 2):
            m, _, cache = encode(chunk, cache, tile=tile)
            means.append(m)
            graphs.append(counter.frame_count)
        close(torch.cat(means, 2), mean)
        assert graphs == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tile", [None, 4])
def test_chunks_read_no_value_on_the_host(device, tile):
    """Fake tensors have shapes and no values: to ask for one, as a synchronisation does, is an error."""
    vae = CausalVAE(SMALL)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.device(device):
        for module in vae.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape)))
        latents, video = torch.empty(1, 2, 1, 3, 4), torch.empty(1, 3, 2, 6, 8)
        cache, other = None, vae.encode_chunk(video[:, :, :1], tile=tile)[2]
        for _ in range(2):
            frames, cache = vae.decode_chunk(latents, cache, tile=tile)
            mean, _, other = vae.encode_chunk(video, other, tile=tile)
        assert frames.shape == (1, 3, 2, 6, 8) and frames.device.type == mean.device.type == device
        with pytest.raises(DataDependentOutputException):
            frames.sum().item()


def test_a_cache_is_a_pytree_of_tensors(small):
    _, cache = small.decode_chunk(torch.randn(1, 2, 1, 2, 2))
    leaves, form = tree_flatten(cache)
    assert all(a is b for a, b in zip(leaves, cache.tensors, strict=True))
    doubled = tree_map(lambda t: 2 * t, cache)
    assert isinstance(doubled, VAECache) and torch.equal(doubled.tensors[0], 2 * leaves[0])
    assert tree_unflatten(leaves, form) == dataclasses.replace(cache, tensors=tuple(leaves))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [None, 4])
def test_chunks_replay_from_a_cuda_graph(tile):
    """One graph of a later chunk, its cache copied back after each replay, decodes and encodes a clip."""
    torch.manual_seed(0)
    vae = CausalVAE(SMALL).requires_grad_(False).cuda()
    latents, video = torch.randn(1, 2, 6, 3, 4, device="cuda"), video_for(vae, (3, 4), 11).cuda()
    for code, whole, clip, step in (
        (vae.decode_chunk, vae.decode(latents), latents, 1),
        (vae.encode_chunk, vae.encode(video)[0], video, 2),
    ):
        first, *later = clip.split([1, *[step] * 5], 2)
        pieces = [(out := code(first, tile=tile))[0]]
        x, cache = later[0].clone(), out[-1]
        past = [t.clone() for t in cache.tensors]
        static = dataclasses.replace(cache, tensors=tuple(past))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            code(x, static, tile=tile)  # kernels compile outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = code(x, static, tile=tile)
            for old, new in zip(past, out[-1].tensors, strict=True):
                old.copy_(new)
        for piece in later:
            x.copy_(piece)
            graph.replay()
            pieces.append(out[0].clone())
        close(torch.cat(pieces, 2), whole)


# Bad input


Z = torch.zeros(1, 2, 1, 2, 2)
V = torch.zeros(1, 3, 1, 8, 8)


def cache_of(vae, z=Z):
    return vae.decode_chunk(z)[1]


OTHER = dataclasses.replace(TINY, num_res_blocks=2)
BAD = {
    "height": (lambda v: v.decode_chunk(torch.zeros(1, 2, 1, 3, 2), cache_of(v)), r"\[1, 2, 2\], this one has \[1, 3"),
    "width": (lambda v: v.decode_chunk(torch.zeros(1, 2, 1, 2, 1), cache_of(v)), r"this one has \[1, 2, 1\]"),
    "batch": (lambda v: v.decode_chunk(torch.zeros(2, 2, 1, 2, 2), cache_of(v)), r"has \[2, 2, 2\]; a clip keeps"),
    "dtype": (
        lambda v: v.decode_chunk(Z, tree_map(torch.Tensor.double, cache_of(v))),
        "the chunk before was torch.float64 on cpu, this one is torch.float32",
    ),
    "device": (
        lambda v: v.decode_chunk(Z, tree_map(lambda t: t.to("meta"), cache_of(v))),
        "the chunk before was torch.float32 on meta, this one is torch.float32 on cpu",
    ),
    "a chunk in another dtype": (lambda v: v.decode_chunk(Z.double(), cache_of(v)), "latents must be torch.float32"),
    "direction": (lambda v: v.encode_chunk(torch.zeros(1, 3, 2, 8, 8), cache_of(v)), "got that of decode_chunk"),
    "model": (lambda v: v.decode_chunk(Z, cache_of(CausalVAE(OTHER))), "of another VAE.*num_res_blocks=2"),
    "video": (lambda v: v.encode_chunk(torch.zeros(1, 3, 2, 8, 4), v.encode_chunk(V)[2]), r"\[1, 8, 8\], this one has"),
    "no frames": (lambda v: v.decode_chunk(Z[:, :, :0], cache_of(v)), "latents must be .*none of them 0"),
    "no pieces": (lambda v: list(v.decode_stream([])), "at least one frame"),
    "no frames of video": (lambda v: list(v.encode_stream(V[:, :, :0])), "video must be .*none of them 0"),
    "pieces of two sizes": (
        lambda v: list(v.decode_stream([Z, torch.zeros(1, 2, 1, 3, 2)], chunk=2)),
        r"got \[1, 2, 1, 3, 2\] after \[1, 2, 1, 2, 2\]",
    ),
    "chunks of two sizes": (
        lambda v: list(v.decode_stream([Z, torch.zeros(1, 2, 1, 3, 2)])), "the pieces of a clip must differ in their",
    ),
    "a list": (lambda v: list(v.decode_stream([[0.0]])), "latents must be a tensor.*got list"),
    "half a chunk": (lambda v: list(v.decode_stream(Z, chunk=1.5)), "chunk must be at least 1.*got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tiny, case):
    call, message = BAD[case]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(tiny)


def test_new_statistics_do_not_end_a_stream():
    vae = CausalVAE(TINY)
    with torch.no_grad():
        cache = cache_of(vae)
        vae.set_latent_statistics((0.1, 0.2), (1.0, 2.0))
        vae.decode_chunk(Z, cache)
