"""Functions on several processes of this machine, by gloo; whoever waits for another longer than two minutes fails."""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist


def in_ranks(function, world, folder, *args):
    """function(rank, folder, *args) in `world` processes of one thread."""
    torch.multiprocessing.spawn(_rank, (function, world, str(folder), *args), nprocs=world)


def as_torchrun_does(function, world, folder, *args):
    """The same in processes that have not met: with the environment that torchrun gives them."""
    torch.multiprocessing.spawn(_started, (function, world, free_port(), str(folder), *args), nprocs=world)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _started(rank, function, world, port, folder, *args):
    torch.set_num_threads(1)
    place = dict(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in place.items()}
    function(rank, folder, *args)


def _rank(rank, function, world, folder, *args):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    try:
        function(rank, folder, *args)
    finally:
        dist.destroy_process_group()
