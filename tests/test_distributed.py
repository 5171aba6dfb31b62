"""Operations over several processes: DTensors are refused, `local_map` serves them; a norm of heads over ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks

import sora_kernels
from sora_kernels import _library, norm_modulate
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dtensor_is_refused_with_what_to_do(mesh):
    from test_registration import CALLS  # which every rank would import too
    from torch.distributed.tensor import distribute_tensor

    for function, make in CALLS.values():
        tensors = make(2)
        for i in range(len(tensors)):
            given = [distribute_tensor(t, mesh) if i == j else t for j, t in enumerate(tensors)]
            with pytest.raises(TypeError, match=r"must be a plain .* got a DTensor placed as \(Rep.*local_map"):
                function(*given)


def test_so_are_integers_and_videos(mesh):
    from torch.distributed.tensor import distribute_tensor

    x, heads, index = torch.randn(2, 6, 8), torch.randn(2, 6, 2, 8), torch.zeros(2, 6, dtype=torch.int64)
    frames = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)
    given = index, index[:, 0], torch.randn(1, 3, 2, 4, 4), frames
    places, lens, video, frames = (distribute_tensor(t, mesh) for t in given)
    for call in (
        lambda: norm_modulate(x, x[0], None, index=places),
        lambda: sora_kernels.spacetime_attention(heads, heads, heads, kv_lens=lens),
        lambda: sora_kernels.video_to_uint8(video),
        lambda: sora_kernels.embed_watermark(frames, x[0]),
    ):
        with pytest.raises(TypeError, match="got a DTensor placed as"):
            call()


def test_private_operations_refuse_dtensors_in_any_place(mesh):
    from test_registration import SAMPLES
    from torch.distributed.tensor import distribute_tensor

    for op, args in SAMPLES:
        tensors = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor)]
        for impl, places in itertools.product(_library.ops()[op], [tensors, *([i] for i in tensors)]):
            given = [distribute_tensor(t.detach(), mesh) if i in places else t for i, t in enumerate(args)]
            with pytest.raises(RuntimeError, match="sharding strategy registered|got mixed torch.Tensor and DTensor"):
                _library.call(op, impl)(*given)


def test_what_a_collective_still_gathers_is_waited_for(mesh):
    from test_registration import CALLS
    from torch.distributed import _functional_collectives as functional

    for function, make in CALLS.values():
        tensors = make(2)
        with torch.no_grad():
            pending = [functional.all_reduce(t, "sum", dist.group.WORLD) for t in tensors]
            assert all(type(t) is functional.AsyncCollectiveTensor for t in pending)
            torch.testing.assert_close(function(*pending), function(*tensors), rtol=0, atol=0)


def _local_map_of_rows(rank, folder):
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    given = torch.load(f"{folder}/given.pt")
    places = [Shard(1)], [Replicate()], [Replicate()]
    leaves = [distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(given, places, strict=True)]
    gradients = [Shard(1)], [Partial()], [Partial()]
    run = local_map(
        norm_modulate, out_placements=[Shard(1)], in_placements=places, in_grad_placements=gradients, device_mesh=mesh
    )
    out = run(*leaves)
    results = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    torch.save([t.full_tensor().detach() for t in results], f"{folder}/{rank}.pt")


def test_local_map_gives_what_one_process_gives_where_the_gradients_of_rows_are_partial(tmp_path):
    given = [torch.randn(2, 6, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)]
    torch.save(given, tmp_path / "given.pt")
    in_ranks(_local_map_of_rows, 2, tmp_path)
    leaves = [t.requires_grad_() for t in given]
    out = norm_modulate(*leaves)
    expected = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=1e-5)


WIDTH, HEADS, GRID = 48, 4, (2, 3, 2)


def _projected(x, q_proj, k_proj, q_norm, k_norm, norms, **rest):
    """q and k [B, S, H, E] of the heads whose channels the projections have."""
    q, k = (torch.nn.functional.linear(x, w).unflatten(2, (-1, WIDTH // HEADS)) for w in (q_proj, k_proj))
    return norms(q, k, q_weight=q_norm, k_weight=k_norm, across="width", grid=GRID, **rest)


def _columns_of_a_rank(rank, folder):
    """Projections divided by columns, on two ranks: three heads of four, and one."""
    from torch.distributed import _functional_collectives as functional
    from torch.distributed import nn

    given, grads = torch.load(f"{folder}/given.pt")
    heads, channels = (slice(0, 3), slice(3, 4))[rank], (slice(0, 36), slice(36, 48))[rank]
    x = given.pop("x").requires_grad_()
    own = {name: t[channels].clone().requires_grad_() for name, t in given.items()}

    def run(all_reduce):
        def norms(q, k, **rest):
            stats = all_reduce(sora_kernels.qk_norm_stats(q, k))
            return sora_kernels.qk_norm_rope(q, k, stats=stats, width=WIDTH, **rest)

        outputs = _projected(x, **own, norms=norms)
        dx, *parts = torch.autograd.grad(outputs, [x, *own.values()], [g[:, :, heads] for g in grads])
        dist.all_reduce(dx)  # of what every rank has
        return [t.detach() for t in outputs], dx, parts

    results = run(lambda t: functional.all_reduce(t, "sum", dist.group.WORLD))
    torch.testing.assert_close(run(nn.functional.all_reduce), results, rtol=0, atol=0)
    torch.save(results, f"{folder}/{rank}.pt")


def test_a_norm_over_the_width_of_divided_heads_is_that_of_one_process(tmp_path):
    """Outputs and every gradient, beside fp64, by the error rule."""
    from sora_kernels.qknorm_rope import reference

    shapes = dict(x=(2, 12, 40), q_proj=(WIDTH, 40), k_proj=(WIDTH, 40), q_norm=(WIDTH,), k_norm=(WIDTH,))
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    grads = [torch.randn(2, 12, HEADS, WIDTH // HEADS) for _ in "qk"]
    torch.save((given, grads), tmp_path / "given.pt")
    in_ranks(_columns_of_a_rank, 2, tmp_path)

    def whole(**tensors):
        return _projected(**tensors, norms=reference.qk_norm_rope)

    oracle = outputs_and_grads(whole, {n: t.double() for n, t in given.items()}, [g.double() for g in grads])
    baseline = outputs_and_grads(whole, given, grads)
    (outs, dx, parts), (more_outs, same_dx, more_parts) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    ours = [torch.cat(pair, 2) for pair in zip(outs, more_outs, strict=True)] + [dx]
    ours += [torch.cat(pair) for pair in zip(parts, more_parts, strict=True)]
    assert torch.equal(dx, same_dx)
    for (name, expected), result in zip(oracle.items(), ours, strict=True):
        terms = {"output0": 40, "output1": 40, "grad x": 2 * WIDTH}.get(name, 24)  # channels, else tokens
        assert_matches_oracle(result, expected, baseline[name], name, terms)
