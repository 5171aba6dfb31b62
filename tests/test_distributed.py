"""Operations over several processes: DTensors are refused, `local_map` serves them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks

import sora_kernels
from sora_kernels import norm_modulate


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
    places, lens, video = (distribute_tensor(t, mesh) for t in (index, index[:, 0], torch.randn(1, 3, 2, 4, 4)))
    for call in (
        lambda: norm_modulate(x, x[0], None, index=places),
        lambda: sora_kernels.spacetime_attention(heads, heads, heads, kv_lens=lens),
        lambda: sora_kernels.video_to_uint8(video),
    ):
        with pytest.raises(TypeError, match="got a DTensor placed as"):
            call()


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
