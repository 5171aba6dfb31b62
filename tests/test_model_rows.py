"""A VAE's rows over several processes give what one process gives, whole and in streams; what does not fit is told."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sora_model import exchange, parallel
from sora_model.vae import CausalVAE, VAEConfig

WAN = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1)
WAN22 = VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, patch=2, residual=True, temporal_downsample=(True, False)
)
FORMS = {"Wan 2.1": WAN, "Wan 2.2": WAN22}
CHUNKS = None, 1, 3
FRAMES, SIZE = 3, (5, 2)  # of latents: neither 2 nor 3 ranks divide the rows


def make(config, dtype=torch.float64):
    torch.manual_seed(0)
    vae = CausalVAE(config).requires_grad_(False)
    for name, p in vae.named_parameters():  # a bias makes a padded zero differ from what the layers compute there
        if name.endswith("bias"):
            p.uniform_(-0.5, 0.5)
    return vae.to(dtype)


def drawn(vae, frames=FRAMES, size=SIZE, batch=1):
    torch.manual_seed(1)
    t, s, dtype = vae.config.temporal_factor, vae.config.spatial_factor, vae.quant_conv.weight.dtype
    video = torch.randn(batch, 3, t * (frames - 1) + 1, *(s * n for n in size), dtype=dtype)
    return video, torch.randn(batch, 4, frames, *size, dtype=dtype)


def coded(vae, video, latents, chunk=None):
    """Posterior and clip: whole, or streamed and joined again."""
    if chunk is None:
        return {"posterior": torch.cat(vae.encode(video)), "clip": vae.decode(latents, clamp=False)}
    moments = [torch.cat(pair) for pair in vae.encode_stream(video, chunk=chunk)]
    clip = list(vae.decode_stream(latents, chunk=chunk, clamp=False))
    return {"posterior": torch.cat(moments, 2), "clip": torch.cat(clip, 2)}


@contextmanager
def counting():
    """Numbers of bytes that this process sends to others, and of exchanges, in [bytes, exchanges]."""
    counted, (swap, pass_on) = [0, 0], (exchange.dist.all_to_all_single, exchange.dist.batch_isend_irecv)

    def count_swap(received, given, out_sizes, in_sizes, **how):
        counted[0] += given.itemsize * (sum(in_sizes) - in_sizes[dist.get_rank(how["group"])])
        counted[1] += 1
        return swap(received, given, out_sizes, in_sizes, **how)

    def count_pass(ops):
        peers = {op.group_peer for op in ops}
        assert peers <= {dist.get_rank(ops[0].group) - 1, dist.get_rank(ops[0].group) + 1}
        counted[0] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        counted[1] += 1
        return pass_on(ops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.dist, "all_to_all_single", count_swap)
        patch.setattr(exchange.dist, "batch_isend_irecv", count_pass)
        yield counted


def _on_three(rank, folder):
    """Rows over all three processes, and over two of them."""
    three, two = init_device_mesh("cpu", (3,), mesh_dim_names=("clips",)), DeviceMesh("cpu", [0, 1])
    results = {"coded": {}}
    cases = ("Wan 2.1", three, 1), ("Wan 2.1", two, 2), ("Wan 2.2", three, 2), ("Wan 2.2", two, None)
    for name, mesh, chunk in cases:
        if mesh.get_coordinate() is not None:
            vae = make(FORMS[name])
            with parallel.rows_over(vae, mesh):
                results["coded"][name, mesh.size(), chunk] = coded(vae, *drawn(vae), chunk)
    vae = make(WAN, torch.float32)
    with parallel.rows_over(vae, three["clips"]):
        results["fp32"] = coded(vae, *drawn(vae, batch=2))
        results["counted"] = counted(vae)
        results["kept"] = [t.shape for t in vae.decode_chunk(drawn(vae)[1])[1].tensors]
    refuses(vae, three, rank)
    torch.save(results, f"{folder}/{rank}.pt")


def counted(vae):
    """Bytes sent and exchanges of each chunk of a clip, in both directions."""
    (video, latents), found = drawn(vae), {}
    for kind, stream, x in (("encode", vae.encode_stream, video), ("decode", vae.decode_stream, latents)):
        with counting() as sent:
            for number, _ in enumerate(stream(x, chunk=1)):
                found[kind, number], sent[:] = tuple(sent), (0, 0)
    return found


def refuses(vae, mesh, rank):
    """What is wrong is told on every rank, and the next call runs."""
    video, latents = drawn(vae)
    alone, one = vae.decode_chunk(latents)[1], rank == 1

    def refused(said, call):
        with pytest.raises(ValueError, match=said):
            call()

    with parallel.rows_over(vae, mesh):
        few = "rows_over: 3 ranks need 3 rows of latents or more; the frames have 2: take 2 or fewer ranks, or parallel"
        refused(few, lambda: vae.decode(latents[:, :, :, :2]))
        refused(few, lambda: vae.encode(video[:, :, :, :16]))
        tiles = r"tile must be None inside of parallel.rows_over, .*; got tiles of \(1, 1\) latents"
        refused(tiles, lambda: vae.decode(latents, tile=8))
        wants = "rows_over is for inference, as no gradients are sent between ranks; .*torch.no_grad"
        refused(wants, lambda: vae.decode(latents.clone().requires_grad_()))
        vae.requires_grad_(True)
        refused(wants, lambda: vae.decode(latents))
        with torch.no_grad():
            vae.decode(latents[:, :, :1])
        vae.requires_grad_(False)
        began, now = "the chunk before was coded by", "this one by 3 ranks in rows; a clip goes on as it began"
        refused(f"{began} one process, {now}", lambda: vae.decode_chunk(latents, alone))
        begun = vae.decode_chunk(latents)[1]

        same = "all ranks must pass the same inputs: the (latents to decode|frames to encode) are .* on the first; the"
        other = f"{same} .* on rank 1 of the 3 that share the rows"
        wrong = torch.zeros(1, 3, 5, 9, 16) if rank == 1 else video
        for call in (
            lambda: vae.decode(latents + one),
            lambda: vae.decode(latents[:, :, : 1 + one]),
            lambda: vae.decode(latents[:, :, :, : 5 - 3 * one]),
            lambda: vae.decode_chunk(latents, begun if one else None),
            lambda: vae.decode(latents, tile=8 if one else None),
            lambda: vae.encode(wrong),
            lambda: vae.decode(latents.double() if one else latents),
            lambda: list(vae.decode_stream(latents[:, :, : 2 + one])),
            lambda: list(vae.decode_stream(latents.split(2 + 2 * one, 3))),
            lambda: list(vae.decode_stream(latents, chunk=int(not one))),
        ):
            refused(other, call)
        vae.decode(latents[:, :, :1])
    refused(f"{began} 3 ranks in rows, this one by one process", lambda: vae.decode_chunk(latents, begun))
    square = init_device_mesh("cpu", (3, 1), mesh_dim_names=("clips", "rows"))
    for other, got in (None, "NoneType"), (square, "2 dimensions"):
        message = f"rows_over: mesh must be a DeviceMesh of one dimension; got {got}"
        refused(message, lambda other=other: parallel.rows_over(vae, other).__enter__())
    with pytest.raises(TypeError, match="rows_over: vae must be a CausalVAE; got a Linear"):
        parallel.rows_over(torch.nn.Linear(2, 2), mesh).__enter__()
    assert vae.ranks is None


def test_rows_of_two_and_three_ranks_are_those_of_one_process(tmp_path):
    """To the last digits in fp64; and they send what is counted, to the ranks beside them but for two gathers."""
    from benchmarks import scaling

    in_ranks(_on_three, 3, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [len(results["coded"]) for results in parts] == [4, 4, 2]
    wholes = {name: coded(vae := make(config), *drawn(vae)) for name, config in FORMS.items()}
    for results in parts:
        for case, found in results["coded"].items():
            for key, expected in wholes[case[0]].items():
                most = 1e-12 * expected.abs().max().item()
                torch.testing.assert_close(found[key], expected, rtol=0, atol=most, msg=lambda m, at=case: f"{at}: {m}")
    vae = make(WAN, torch.float32)
    expected, kept = coded(vae, *drawn(vae, batch=2)), vae.decode_chunk(drawn(vae)[1])[1].tensors
    for rank, results in enumerate(parts):
        torch.testing.assert_close(results["fp32"], expected, rtol=1e-5, atol=1e-5)
        for (kind, number), found in results["counted"].items():
            numbers, exchanges = scaling.rows_sent(vae, kind, 1, SIZE, rank, 3, number == 0)
            assert found == (4 * numbers, exchanges), (kind, number)
        beside = (0 < rank) + (rank < 2)
        for mine, whole in zip(results["kept"], kept, strict=True):  # a band, and what was fetched
            scale = whole.shape[3] // SIZE[0]
            assert mine[3] - scale * (1, 2, 2)[rank] in (0, beside)
            assert mine[:3] + mine[4:] == whole.shape[:3] + whole.shape[4:]


@torch.no_grad()
def _beside_distvae(rank, folder, size):
    from distvae.vae import parallelize_decoder
    from test_model_vae import wan

    config = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2)  # Wan's layers, a twelfth as wide
    theirs, mesh = wan(config), init_device_mesh("cpu", (2,))
    vae, latents, gather = CausalVAE.from_wan(theirs), torch.randn(1, 4, 3, *size), dist.all_gather
    results = {"one process": (theirs.decode(latents).sample,)}
    for name, over in (("rows", parallel.rows_over), ("tiles", parallel.tiles_over)):
        with over(vae, mesh), counting() as sent:
            clip = torch.cat(list(vae.decode_stream(latents)), 2)
        results[name] = clip, *sent
    parallelize_decoder(theirs, mesh.get_group())
    with counting() as sent, pytest.MonkeyPatch.context() as patch:

        def count_gather(received, given, **how):
            sent[:] = sent[0] + given.nbytes, sent[1] + 1
            return gather(received, given, **how)

        patch.setattr(dist, "all_gather", count_gather)
        clip = theirs.decode(latents).sample
    results["distvae"] = clip, *sent
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(6, 8), (7, 6)], ids=str)
def test_beside_distvae(tmp_path, size):
    """distvae 0.1.0, which divides rows too, gives the same; what it sends and how often is printed (pytest -s)."""
    pytest.importorskip("distvae", reason="distvae is not installed: pip install --no-deps distvae==0.1.0")
    in_ranks(_beside_distvae, 2, tmp_path, size)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        (expected,) = results.pop("one process")
        for name, (clip, sent, exchanges) in results.items():
            apart = f"{(clip - expected).abs().max():.1e} apart, of a deviation of {expected.std():.2f}"
            print(f"{size}, rank {rank}, {name}: {sent} bytes in {exchanges} exchanges, {apart}")
            torch.testing.assert_close(clip, expected, rtol=1e-4, atol=1e-5)
        assert results["tiles"][1] < results["rows"][1] < results["distvae"][1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_rows_on_any_ranks(tmp_path, world):
    """From one row of latents a rank to more than two."""
    in_ranks(_sweep, world, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for (name, config), rows in itertools.product(FORMS.items(), range(world, 2 * world + 2)):
        vae = make(config)
        expected = coded(vae, *drawn(vae, 4, (rows, 2)))
        for results, chunk, (what, whole) in itertools.product(parts, CHUNKS, expected.items()):
            found, most = results[name, rows, chunk][what], 1e-12 * whole.abs().max().item()
            torch.testing.assert_close(found, whole, rtol=0, atol=most)


def _sweep(rank, folder):
    mesh, results = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for name, config in FORMS.items():
        vae = make(config)
        with parallel.rows_over(vae, mesh):
            for rows, chunk in itertools.product(range(mesh.size(), 2 * mesh.size() + 2), CHUNKS):
                results[name, rows, chunk] = coded(vae, *drawn(vae, 4, (rows, 2)), chunk)
    torch.save(results, f"{folder}/{rank}.pt")
