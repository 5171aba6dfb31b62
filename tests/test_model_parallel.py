"""SoraDiT over several processes gives what one gives, velocity and every gradient; what does not fit is told."""

from __future__ import annotations

import itertools
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from in_ranks import as_torchrun_does, in_ranks
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import scaling
from sora_kernels import spacetime_attention
from sora_model import Sora, exchange, parallel, tiling
from sora_model.attention import AttentionMode
from sora_model.dit import DiTConfig, SoraDiT
from sora_model.divided import Tiles
from sora_model.memory import Memory
from sora_model.packed import packed
from sora_model.ranks import RankError, started
from sora_model.vae import CausalVAE, VAEConfig

SIZES = dict(dim=48, heads=4, layers=1, ffn_dim=32, in_channels=4, out_channels=3, text_dim=8, freq_dim=16)
SHAPE = 2, 4, 5, 6, 4  # 5 x 3 x 2 tokens: neither frames nor rows are even
MODES = {
    "dense": AttentionMode(),
    "window": AttentionMode(window=(3, 2, 2)),
    "tiles": AttentionMode(window=(3, 2, 2), stride=(2, 1, 1)),
    "causal": AttentionMode(causal="frame"),
    "chunks": AttentionMode(causal=2),
    "causal window": AttentionMode(window=(2, 3, 1), stride=(1, 3, 1), causal="frame"),
    "sink": AttentionMode(window=(2, 2, 2), causal="frame", sink=1),
}
SINKS = {
    "two sinks": AttentionMode(window=(2, 2, 2), causal="frame", sink=2),
    "sink, both ways": AttentionMode(window=(3, 2, 2), sink=1),
    "sink, chunks": AttentionMode(window=(2, 2, 2), causal=2, sink=1),
    "sink, strides": AttentionMode(window=(2, 2, 2), stride=(2, 1, 1), causal="frame", sink=1),
}
TIMES = {"clip": (2,), "frame": (2, 5), "token": (2, 30)}


def make(dtype=torch.float32):
    torch.manual_seed(0)
    dit = SoraDiT(DiTConfig(**SIZES))
    torch.nn.init.normal_(dit.head.weight, std=0.3)
    return dit.to(dtype)


def drawn(times="clip", dtype=torch.float32, shape=SHAPE):
    torch.manual_seed(1)
    t = 1000 * torch.rand(TIMES[times])
    return torch.randn(shape).to(dtype), t, torch.randn(shape[0], 7, 8).to(dtype)


def loss_of(v):
    return (v.float() * torch.linspace(-1, 1, v.numel()).view_as(v)).sum()


def run(dit, inputs, mode, mesh=None, context=None):
    """Velocity and gradients by name."""
    dit.zero_grad()
    with context or torch.enable_grad():
        v = dit(*inputs, torch.tensor([7, 4]), attention=mode)
    loss_of(v).backward()
    if mesh is not None:
        parallel.sum_gradients(dit.parameters(), mesh)
    return {"velocity": v.detach()} | {name: p.grad.clone() for name, p in dit.named_parameters()}


def drawn_apart():
    """Clips of 12, 2 and 15 tokens, with a time for each clip, frame and token."""
    torch.manual_seed(2)
    latents = [torch.randn(4, *size) for size in ((3, 4, 4), (2, 2, 2), (5, 6, 2))]
    return latents, [1000 * torch.rand(shape) for shape in ((), (2,), (15,))], torch.randn(3, 7, 8)


def run_packed(dit, mode, mesh=None, context=None):
    dit.zero_grad()
    with context or torch.enable_grad():
        velocities = packed(dit, *drawn_apart(), torch.tensor([7, 4, 5]), attention=mode)
    sum(loss_of(v) for v in velocities).backward()
    if mesh is not None:
        parallel.sum_gradients(dit.parameters(), mesh)
    found = {f"velocity {i}": v.detach() for i, v in enumerate(velocities)}
    return found | {name: p.grad.clone() for name, p in dit.named_parameters()}


PACKED = ("ring", "dense"), ("ring", "causal window"), ("ulysses", "window")
PAIR = [
    *[("ring", mode, "clip") for mode in MODES], ("ring", "dense", "frame"), ("ring", "dense", "token"),
    ("ring", "window", "frame"), ("ulysses", "dense", "frame"), ("ulysses", "causal window", "clip"),
]  # fmt: skip
FRAME = 2, 4, 1, 6, 4  # all of it sees all of it, causally too
EVEN = 2, 4, 4, 4, 4  # 4 x 2 x 2 tokens
DIVIDED = {("ring",): (4,), ("ulysses",): (4,), ("ring", "ulysses"): (2, 2)}
FOUR = [
    ("ring, ulysses", "dense", "frame"), ("ring, ulysses", "sink", "clip"), ("clips, ring", "window", "token"),
    ("ring", "sink", "clip"),
]  # fmt: skip


def _on_two(rank, folder):
    meshes = {name: init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in parallel.AXES}
    dit, results = make(), {}
    for name, mode, times in PAIR:
        mesh = meshes[name]
        results[name, mode, times] = run(dit, drawn(times), MODES[mode], mesh, parallel.over(dit, mesh))
    for name, mode in PACKED:
        mesh = meshes[name]
        results["packed", name, mode] = run_packed(dit, MODES[mode], mesh, parallel.over(dit, mesh))
    mesh = meshes["ring"]
    dit.checkpointing = True
    results["checkpointed"] = run(dit, drawn(), MODES["dense"], mesh, parallel.over(dit, mesh))
    results["sharded"] = sharded(make(), mesh)
    results["a frame"] = run(dit, drawn(shape=FRAME), MODES["causal"], mesh, parallel.over(dit, mesh))
    half = make(torch.bfloat16)
    results["bf16"] = run(half, drawn(dtype=torch.bfloat16), MODES["dense"], mesh, parallel.over(half, mesh))
    refuses(dit, meshes, rank)
    results["vae"] = coded(meshes["clips"])
    counted = ("ring", "dense"), ("ulysses", "dense"), ("ring", "causal")
    results["bytes"] = [bytes_sent(meshes[name], rank, mode) for name, mode in counted]
    torch.save(results, f"{folder}/{rank}.pt")


def _generate(rank, folder, command):
    from sora_model.cli import app

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the one that is left is sent
    try:
        with started("cpu", wait=120):
            app([*command, "--out", f"{folder}/together.mp4"], standalone_mode=False)
            with pytest.raises(ValueError, match="--n is 1 on rank 0, 2 on rank 1"):
                app([*command, "--out", f"{folder}/two.mp4", "--n", str(1 + rank)], standalone_mode=False)
            if rank:
                SoraDiT.forward = lambda *_, **__: os._exit(7)
            app([*command, "--out", f"{folder}/lost.mp4"], standalone_mode=False)
    except RankError as error:
        Path(folder, "error").write_text(str(error))


def test_the_processes_of_torchrun_generate_one_clip_or_say_that_one_is_lost(tmp_path, tiny_checkpoint):
    from sora_model.cli import app
    from sora_model.media import read_video

    command = ["generate", "a red ball moves up", "--weights", str(tiny_checkpoint), "--seconds", "1", "--steps", "2"]
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        as_torchrun_does(_generate, 2, tmp_path, command)
    said = (tmp_path / "error").read_text()
    assert "rank 0 of 2 lost rank 1 while the clip was made" in said and not (tmp_path / "lost.mp4").exists()
    assert said.endswith("; nothing of it is kept: start all again")
    app([*command, "--out", f"{tmp_path}/alone.mp4"], standalone_mode=False)
    together, alone = (np.stack([*read_video(tmp_path / f"{name}.mp4")]).astype(int) for name in ("together", "alone"))
    assert together.shape == alone.shape and together.std() > 5
    assert abs(together - alone).mean() < 0.01 * alone.std()  # other roundings, and coded twice


def _on_four(rank, folder):
    dit, results = make(), {}
    for names, mode, times in FOUR:
        sizes = (2, 2) if ", " in names else (4,)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names.split(", "))
        results[names, mode, times] = run(dit, drawn(times), MODES[mode], mesh, parallel.over(dit, mesh))
    for names, sizes in DIVIDED.items():
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        results["bytes", names] = bytes_sent(mesh, rank, "dense", EVEN)
    results["calls"] = calls_of_a_ring(init_device_mesh("cpu", (4,), mesh_dim_names=("ring",)))
    results["sharded beside"] = sharded_beside()
    torch.save(results, f"{folder}/{rank}.pt")


def sharded(dit, mesh):
    """FSDP over the ranks that share the tokens: it averages, so that the loss is multiplied."""
    for block in dit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(dit, mesh=mesh)
    with parallel.over(dit, mesh):
        v = dit(*drawn(), torch.tensor([7, 4]))
    (mesh.size() * loss_of(v)).backward()
    gradients = {name: p.grad.full_tensor() for name, p in dit.named_parameters()}
    return {"velocity": v.detach()} | gradients


def sharded_beside():
    """FSDP over another dimension than the tokens, whose ranks have a clip each: its average is theirs alone."""
    mesh, dit = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring")), make()
    for module in (*dit.blocks, dit):
        fully_shard(module, mesh=mesh["data"])
    clip = mesh.get_local_rank("data")
    inputs = [t[clip : clip + 1] for t in (*drawn(), torch.tensor([7, 4]))]
    with parallel.over(dit, mesh["ring"]):
        v = dit(*inputs)
    weights = torch.linspace(-1, 1, 2 * v.numel()).view(2, *v.shape[1:])  # loss_of both clips
    (2 * (v[0] * weights[clip]).sum()).backward()
    parallel.sum_gradients(dit.parameters(), mesh["ring"])
    return {name: p.grad.full_tensor() for name, p in dit.named_parameters()}


def coded(mesh=None):
    """Posterior and clip, whole and streamed, of tiles that share no size."""
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    latents, video = torch.randn(1, 4, 3, 5, 3), torch.randn(1, 3, 5, 40, 24)
    with torch.no_grad(), parallel.tiles_over(vae, mesh) if mesh else torch.no_grad():
        if mesh:
            ranks = Tiles(mesh.get_group(), mesh.get_local_rank(), 2, "cpu")
            (only,) = ranks.each(lambda n: torch.ones(1, 1, 1, 2, n), [3], [(2, 3)])
            assert torch.equal(only, torch.ones(1, 1, 1, 2, 3))
        with pytest.MonkeyPatch.context() as patch:
            computed, one = [], tiling._one
            patch.setattr(tiling, "_one", lambda *args: computed.append(args[3]) or one(*args))
            whole = vae.encode(video)[0], vae.decode(latents)
            areas = [math.prod(span.stop - span.start for span in window) for window in computed]
            if mesh:  # 5 x 3 latents are 2 x 3 and 3 x 3
                assert areas == [(6, 9)[ranks.rank], 64 * (6, 9)[ranks.rank]]
        streamed = torch.cat(list(vae.decode_stream(latents, chunk=1, tile=16)), 2)
        tiled = {"mean": vae.encode(video, tile=16)[0], "clip": vae.decode(latents, tile=16), "streamed": streamed}
        return tiled | {"whole": whole}


def bytes_sent(mesh, rank, mode, shape=SHAPE):
    """To other ranks, in one layer's forward, and in its backward."""
    sent, swap, pass_on = [0], exchange.dist.all_to_all_single, exchange.dist.batch_isend_irecv

    def count_swap(received, given, out_sizes, in_sizes, **how):
        sent[0] += given.itemsize * (sum(in_sizes) - in_sizes[dist.get_rank(how["group"])])
        return swap(received, given, out_sizes, in_sizes, **how)

    def count_pass(ops):
        sent[0] += sum(op.tensor.nbytes for op in ops if op.op is exchange.dist.isend)
        return pass_on(ops)

    dit = make()
    with pytest.MonkeyPatch.context() as patch, parallel.over(dit, mesh):
        patch.setattr(exchange.dist, "all_to_all_single", count_swap)
        patch.setattr(exchange.dist, "batch_isend_irecv", count_pass)
        loss = loss_of(dit(*drawn(shape=shape), attention=MODES[mode]))
        forward, sent[0] = sent[0], 0
        loss.backward()
    return forward, sent[0]


def calls_of_a_ring(mesh):
    """In one layer's forward, and in its backward: which block of keys a rank sends, attends to and waits for, numbered
    as it comes to hold them; those of the gradients that go round are called so."""
    calls, held, dist = [], [], exchange.dist
    pass_on, forward, backward = dist.batch_isend_irecv, exchange.attention_forward, exchange.attention_backward

    def number(block):
        return next(i for i, other in enumerate(held) if other.data_ptr() == block.data_ptr())

    def watched_pass(ops):
        works, (sent, received) = pass_on(ops), (op.tensor for op in ops)
        if ops[0].tag:
            name = coming = "gradients"
        else:
            held.extend([received] if held else [sent, received])  # kept: no other block gets its memory
            name, coming = number(sent), number(received)
        calls.append(("send", name))
        wait = works[1].wait
        works[1] = SimpleNamespace(wait=lambda: (calls.append(("wait", coming)), wait()))
        return works

    def watched(attention, keys):
        return lambda *args, **how: (calls.append(("attend", number(args[keys]))), attention(*args, **how))[1]

    dit = make()
    with pytest.MonkeyPatch.context() as patch, parallel.over(dit, mesh):
        patch.setattr(dist, "batch_isend_irecv", watched_pass)
        patch.setattr(exchange, "attention_forward", watched(forward, 1))
        patch.setattr(exchange, "attention_backward", watched(backward, 2))
        loss = loss_of(dit(*drawn()))
        there, calls, held = calls, [], []
        loss.backward()
    return there, calls


def assert_the_next_block_comes_while_one_is_attended(there, back):
    """Of four ranks; gradients are sent when a block has been attended to, and come while the next one is."""
    sent = [[("send", i), ("attend", i)] for i in range(3)] + [[("attend", 3)]]
    waits = [[("wait", i + 1)] for i in range(3)] + [[]]
    assert there == list(itertools.chain(*(a + b for a, b in zip(sent, waits, strict=True))))
    on, come = [("send", "gradients")], [("wait", "gradients")]
    assert back == [
        *sent[0], *waits[0], *sent[1], *on, *waits[1], *sent[2], *come, *on, *waits[2], *sent[3], *come, *on, *come
    ]  # fmt: skip


def assert_four_send_what_is_counted(parts):
    """Of equal shares, in a ring, by Ulysses and by both; and the velocity of own tokens to others, gathered twice."""
    B, S, D, b, own = EVEN[0], 16, 48, 4, 4 * 3 * 4
    for names, sizes in DIVIDED.items():
        degrees = dict(zip(names, sizes, strict=True))
        gathered, held = 0, own
        for size in reversed(sizes):
            gathered, held = gathered + held * (size - 1), held * size
        forward, backward = (B * scaling.sent(S, D, b, **degrees, backward=way) for way in (False, True))
        for results in parts:
            assert results["bytes", names] == (forward + B * gathered * b, backward), names


def assert_sends_what_the_page_says(counted):
    """docs/distributed.md, for 2 ranks of 2 clips of 30 tokens; and the velocity of a rank's tokens to the other."""
    B, S, D, b, frame, features = 2, 30, 48, 4, 6, 3 * 4
    ring_sends, swaps = 2 * B * S * D * b // 2, 4 * B * (S // 2) * D * b // 2
    assert ring_sends == B * scaling.sent(S, D, b, ring=2) and swaps == B * scaling.sent(S, D, b, ulysses=2)
    gathered = [B * own * features * b for own in (15, 15)]
    for rank, (ring, ulysses, _) in enumerate(counted):
        assert ring == (ring_sends + gathered[rank], ring_sends + 2 * B * S * D * 4 // 2)
        assert ulysses == (swaps + gathered[rank], swaps)
    halos = [2 * B * 2 * frame * D * b, 0], [0, 2 * B * 2 * frame * D * b]  # two of five frames go on, gradients back
    tokens = 12, 18
    for rank, (*_, causal) in enumerate(counted):
        assert causal == (halos[0][rank] + B * tokens[rank] * features * b, halos[1][rank])


def refuses(dit, meshes, rank):
    """What is wrong is told on every rank, and the next call runs."""
    latents, t, text = drawn()
    ring, ulysses = meshes["ring"], meshes["ulysses"]
    with parallel.over(dit, ring):
        dit(latents, t, text)
        for name, given in {
            "the values of latents": (latents[:, :, :4] + rank, t, text),
            "the shape of latents": (latents[: 2 - rank], t, text),
            "the shape of text": (latents, t, text[:, : 7 - rank]),
        }.items():
            given = (given[0], t[: len(given[0])], given[2][: len(given[0])])
            with pytest.raises(ValueError, match=rf"same seed\): {name} is .* on rank 0, .* on rank 1"):
                dit(*given)
        for name, how in {
            "the values of text_lens": {"text_lens": torch.tensor([7, 4 - rank])},
            "the attention mode": {"attention": MODES[("window", "tiles")[rank]]},
        }.items():
            with pytest.raises(ValueError, match=rf"same seed\): {name} is .* on rank 0, .* on rank 1"):
                dit(latents, t, text, **how)
        clips, times, texts = drawn_apart()
        with pytest.raises(ValueError, match="the values of latents of clip 1 is .* on rank 0, .* on rank 1"):
            packed(dit, [clips[0], clips[1] + rank, clips[2]], times, texts)
        with pytest.raises(ValueError, match="memory must be None inside of parallel.over"):
            dit(latents, t, text, memory=Memory(2))
        with pytest.raises(ValueError, match="ring=2 ranks need 2 frames or more; the clip has 1: take ring=1"):
            dit(latents[:, :, :1], t, text, attention=MODES["window"])
        with pytest.raises(ValueError, match="divided already"), parallel.over(dit, ring):
            pass
        dit(latents, t, text)
    bias = dit.blocks[0].ffn[0].bias
    for change, refused in (1e-9, False), (1e-2, True):  # NCCL may round otherwise on each rank
        with torch.no_grad():
            kept = bias.clone()
            bias += rank * change
        said = r"the same weights \(of one seed, .* their norm is .* on rank 0, .* on rank 1"
        with pytest.raises(ValueError, match=said) if refused else torch.no_grad(), parallel.over(dit, ring):
            dit(latents, t, text)
        bias.data.copy_(kept)
    message = "ulysses=2 ranks need 2 tokens or more; the least of the 1 parts of the ring has 1: take ulysses=1"
    with parallel.over(dit, ulysses), pytest.raises(ValueError, match=message):
        dit(latents[:, :, :1, :2, :2], t, text)
    with parallel.over(dit, meshes["clips"]), pytest.raises(ValueError, match="the batch has 1: take clips=1"):
        dit(latents[:1], t[:1], text[:1])
    message = "clips=2 ranks cannot divide packed clips, which are one sequence: take clips=1"
    with parallel.over(dit, meshes["clips"]), pytest.raises(ValueError, match=message):
        packed(dit, *drawn_apart())
    odd = SoraDiT(DiTConfig(**SIZES | {"heads": 3}))
    message = "ulysses=2 ranks must divide the 3 heads; 1, 3 would"
    with pytest.raises(ValueError, match=message), parallel.over(odd, ulysses):
        pass
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh"), parallel.over(dit, None):
        pass
    vae = CausalVAE(VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    with torch.no_grad(), parallel.tiles_over(vae, ring):
        zeros, bad = torch.zeros(1, 4, 1, 2, 2), (None, 20)[rank]  # which one of them would refuse alone
        for given, tile in ((zeros + rank, None), (torch.zeros(1, 4, 1, 2, 2 + rank), None), (zeros, bad)):
            with pytest.raises(ValueError, match=r"same inputs: the latents to decode are .* on rank 1 of the 2"):
                vae.decode(given, tile=tile)
        _, cache = vae.decode_chunk(zeros)
        with pytest.raises(ValueError, match=r"the latents to decode are at their end on rank 1 of the 2"):
            list(vae.decode_stream(torch.zeros(1, 4, 3 - rank, 2, 2)))
    with torch.no_grad(), pytest.raises(ValueError, match="coded by 2 ranks in tiles, this one by one process"):
        vae.decode_chunk(zeros, cache, tile=(16, 8))
    for divide, what in ((parallel.over, "dit must be a SoraDiT"), (parallel.tiles_over, "vae must be a CausalVAE")):
        with pytest.raises(TypeError, match=f"{what}; got a Linear"), divide(torch.nn.Linear(2, 2), ring):
            pass
        lone = DeviceMesh("cpu", [0], mesh_dim_names=("ring",))
        message = "mesh must have this process in it, rank 1; it has 0"
        held = pytest.raises(ValueError, match=message) if rank else torch.no_grad()
        with held, divide(dit if divide is parallel.over else vae, lone):
            pass
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ring", "ulysses"))
    message = "tiles_over: mesh must be a DeviceMesh of one dimension; got 2 dimensions"
    with pytest.raises(ValueError, match=message), parallel.tiles_over(vae, square):
        pass
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    message = "some of the dimensions clips, ring, ulysses; got"
    with pytest.raises(ValueError, match=message), parallel.over(dit, other):
        pass


@pytest.mark.parametrize(
    ("function", "world", "cases"),
    [(_on_two, 2, [*PAIR, "checkpointed", "sharded", "bf16"]), (_on_four, 4, FOUR)],
    ids=["two", "four"],
)
def test_velocity_and_gradients_are_those_of_one_process(tmp_path, function, world, cases):
    in_ranks(function, world, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    if world == 2:
        for results in parts:
            torch.testing.assert_close(results["vae"], coded(), rtol=1e-5, atol=1e-5)
        assert_sends_what_the_page_says([results["bytes"] for results in parts])
    else:
        assert_four_send_what_is_counted(parts)
        for results in parts:
            assert_the_next_block_comes_while_one_is_attended(*results["calls"])
    dit, known = make(), {}
    if world == 4:
        expected = run(dit, drawn(), MODES["dense"])
        del expected["velocity"]
        for results in parts:
            assert_close(results["sharded beside"], expected, 2e-5, "sharded beside")
    if world == 2:
        others = {("packed", *case): run_packed(dit, MODES[case[-1]]) for case in PACKED}
        others["a frame"] = run(dit, drawn(shape=FRAME), MODES["causal"])
        for (case, expected), results in itertools.product(others.items(), parts):
            assert_close(results[case], expected, 2e-5, case)
    for case in cases:
        _, mode, times = case if isinstance(case, tuple) else (None, "dense", "clip")
        if (mode, times) not in known:
            known[mode, times] = run(dit, drawn(times), MODES[mode])
        for rank, results in enumerate(parts):
            assert_close(results[case], known[mode, times], 0.05 if case == "bf16" else 2e-5, (case, rank))


def assert_close(found, known, tolerance, case):
    for name, expected in known.items():
        error = (found[name].float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        assert error < tolerance, (case, name, error.item())


@pytest.mark.parametrize("name", [name for name in MODES | SINKS if name != "dense"])
def test_the_frames_that_ranks_fetch_are_those_that_they_see(name):
    """A frame is seen where an own query's result has a gradient by its values. More is fetched to where a stride, or
    behind a sink a chunk, begins and ends; and attention to what is fetched alone is that to all."""
    torch.manual_seed(0)
    frames, size, mode = 8, 6, (MODES | SINKS)[name]
    step = math.lcm(mode.stride[0], mode.causal if isinstance(mode.causal, int) else 1)
    q, k, v = (torch.randn(1, frames * size, 1, 8) for _ in range(3))
    out = spacetime_attention(q, k, v.requires_grad_(), **mode.keywords((frames, 3, 2)), impl="reference")
    for start, stop in itertools.chain(*(parallel.cut(0, frames, ranks) for ranks in (2, 3, 4, 8))):
        own = out[:, start * size : stop * size]
        (by,) = torch.autograd.grad(own.sum(), v, retain_graph=True)
        seen = {i for i, frame in enumerate(by[0].split(size)) if frame.abs().max() > 0}
        sink, run = parallel.frames_seen(frames, start, stop, mode)
        fetched = [*range(*sink), *range(*run)]
        assert seen <= set(fetched) and len(set(fetched) - seen) < 2 * step - (step == 1)
        keys, values = (torch.cat([t.split(size, 1)[i] for i in fetched], 1) for t in (k, v))
        asking = torch.cat([q[:, start * size : stop * size], q.new_zeros(1, (run[1] - stop) * size, 1, 8)], 1)
        alone = spacetime_attention(asking, keys, values, **mode.keywords((len(fetched), 3, 2)), impl="reference")
        torch.testing.assert_close(alone[:, : own.shape[1]], own, rtol=1e-5, atol=1e-6)


def test_a_prediction_is_of_what_is_counted():
    """By hand, of the largest: what a rank of four sends in Ulysses, products, attention; and the page says so."""
    machine = scaling.Machine()
    gigabytes, products, attention, *_ = scaling.step("480x832x81", (2, 1, 4), machine)
    tokens, width, layers = 32760, 5120, 40
    velocity = tokens / 4 * 64 * 2 * 7
    assert gigabytes * 1e9 == pytest.approx(layers * 4 * tokens / 4 * width * 2 * 3 / 4 + velocity)
    assert attention == pytest.approx(layers * 4 * tokens**2 * width / 4 / 400e12)
    linear = layers * (6 * width**2 + 2 * width * 13824) * tokens / 4 + layers * 2 * width**2 * 512
    assert products == pytest.approx(2 * linear / 400e12, rel=1e-3)  # and the patches
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    for table in scaling.tables():
        assert table in page, "run python -m benchmarks.scaling and put its tables on the page"


def refuses_other_weights(sora, rank, lora):
    """Each part is named, and a LoRA before the weights that it changes."""

    def refused(name):
        message = f"must be started alike: the checksum of the {name} is '\\w+' on rank 0, '\\w+' on rank 1"
        with pytest.raises(ValueError, match=message), parallel.sampling(sora):
            pass

    for name, part in {"transformer": sora.dit, "VAE": sora.vae, "text encoder": sora.text}.items():
        weight = next(part.parameters())
        kept = weight.data.clone()
        weight.data.view(-1)[-1:] += rank
        refused(name)
        weight.data.copy_(kept)
    for weight, merge in (1 - rank / 2, True), (1 - rank / 2, False), (1, rank == 0):
        sora.load_lora(lora, weight, merge=merge)
        refused("LoRA files of the transformer")
        sora.unload_loras()
    sora.vae.set_latent_statistics([rank] * sora.vae.config.z_dim, sora.vae.config.latents_std)
    refused("VAE")


def _asked(rank, folder):
    refuses_other_weights(Sora.from_pretrained("toy"), rank, f"{folder}/lora.safetensors")
    sora, how = Sora.from_pretrained("toy"), {"seconds": 0.2, "size": (32, 32), "steps": 1}
    with parallel.sampling(sora):
        for name, pair in {"steps": (1, 2), "guidance": (3.0, 5.0), "seed": (0, 1), "shift": (2.0, 3.0)}.items():
            message = f"{name} is {pair[0]} on rank 0, {pair[1]} on rank 1"
            with pytest.raises(ValueError, match=f"all processes must be started alike: {message}"):
                sora.generate("a red ball moves up", **how | {name: pair[rank]})
        sora._fit = lambda *args, **how: ((16, 16), (32, 32))[rank]  # by their free memory
        message = "the batch has 1: take clips=1, or give parallel.sampling the guidance of the clip"
        with pytest.raises(ValueError, match=message):
            sora.generate("a red ball moves up", **how, guidance=1.0)
        clip = sora.generate("a red ball moves up", **how)
        sora.vae.fit_tile = lambda *args, **how: (((16, 16), (32, 32))[rank], 0)
        moved = sora.animate(clip.frames[0], "a red ball moves up", **how)
    torch.save([torch.from_numpy(made.frames.copy()) for made in (clip, moved)], f"{folder}/{rank}.pt")
    if rank:
        os._exit(7)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    said = "lost another process while the clip was made .*; nothing of it is kept: start all again"
    with pytest.raises(RankError, match=said), parallel.sampling(sora):
        pass
    Path(folder, "told").touch()


def test_processes_asked_for_other_clips_or_with_other_weights_say_so_and_agree_on_the_tile(tmp_path):
    width, name = Sora.from_pretrained("toy").dit.config.dim, "transformer.blocks.0.attn1.to_q"
    halves = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}
    save_file(halves, tmp_path / "lora.safetensors")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        in_ranks(_asked, 2, tmp_path)
    assert (tmp_path / "told").exists()
    sora, how = Sora.from_pretrained("toy"), {"seconds": 0.2, "size": (32, 32), "steps": 1}
    for rank in range(2):
        clip, moved = torch.load(tmp_path / f"{rank}.pt")
        begun = sora.animate(clip[0].numpy(), "a red ball moves up", **how)
        alone = [sora.generate("a red ball moves up", **how), begun]
        for found, expected in zip((clip, moved), [made.frames for made in alone], strict=True):
            assert (found.int() - torch.from_numpy(expected.copy()).int()).abs().max() <= 1
