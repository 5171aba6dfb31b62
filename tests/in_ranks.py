"""Functions on several processes of this machine, by gloo; whoever waits for another longer than two minutes fails."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket

import torch
import torch.distributed as dist

# what most functions need, imported once by the process that forks the others: each would be at it for seconds
PRELOADED = ["numpy", "pytest", "torch.distributed.checkpoint", "torch.distributed.fsdp", "sora_model.parallel",
             "sora_model.sharded", "sora_model.train"]  # fmt: skip


def in_processes(function, world, *args):
    """function(rank, *args) in `world` processes of one thread, with the environment that this one has now."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    how = dict(nprocs=world, start_method="forkserver")
    torch.multiprocessing.start_processes(_alone, (dict(os.environ), function, *args), **how)


def in_ranks(function, world, folder, *args):
    """function(rank, folder, *args) in `world` processes that have met."""
    in_processes(_rank, world, function, world, str(folder), *args)


def as_torchrun_does(function, world, folder, *args):
    """The same in processes that have not met: with the environment that torchrun gives them."""
    in_processes(_started, world, function, world, free_port(), str(folder), *args)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _alone(rank, environment, function, *args):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(rank, *args)


def _started(rank, function, world, port, folder, *args):
    place = dict(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in place.items()}
    function(rank, folder, *args)


def _rank(rank, function, world, folder, *args):
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    try:
        function(rank, folder, *args)
    finally:
        dist.destroy_process_group()
