"""Functions on several processes of this machine, by gloo; whoever waits for another longer than two minutes fails."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist


def in_ranks(function, world, folder, *args):
    """function(rank, folder, *args) in `world` processes of one thread."""
    torch.multiprocessing.spawn(_rank, (function, world, str(folder), *args), nprocs=world)


def _rank(rank, function, world, folder, *args):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    try:
        function(rank, folder, *args)
    finally:
        dist.destroy_process_group()
