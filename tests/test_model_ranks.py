"""Training on several processes: the weights of one, and what happens when they disagree or one of them dies."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from in_ranks import as_torchrun_does, free_port, in_ranks

from sora_model import ranks
from sora_model.checkpoint import read_tensors
from sora_model.fit import fit
from sora_model.ranks import RankError, started
from sora_model.steps import Settings, generator_of, read_log

SETTINGS = Settings(steps=12, batch=5, lr=0.05, warmup=2, save_every=5, workers=1, ema=0.9)


def batch_at(step):
    clips = 1 if step % 4 == 3 else 5  # buckets have batches of their own, some of fewer clips than ranks
    x = torch.randn(clips, 6, generator=generator_of(3, step))
    return x, x.square().sum(1, keepdim=True)


def train(run, settings=SETTINGS, loss=lambda error: error.square().mean()):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return fit(module, batch_at, lambda x, y: loss(module(x) - y), settings, run, label="test", matrices=["0.weight"])


def state_of(run):
    return read_tensors(run / "state.safetensors", also=[torch.int64])


def _together(rank, folder):
    weights = train(f"{folder}/run", replace(SETTINGS, steps=7))
    train(f"{folder}/run")  # resumed, of the same decay: the last steps of a run are others
    torch.save(weights, f"{folder}/weights {rank}.pt")
    with pytest.raises(ValueError, match="all processes must be started alike: seed is 0 on rank 0, 1 on rank 1"):
        train(f"{folder}/unlike", replace(SETTINGS, seed=rank))
    with pytest.raises(ValueError, match="batch=1 clips are fewer than the 2 processes; start fewer"):
        train(f"{folder}/small", replace(SETTINGS, batch=1))
    with pytest.raises(FloatingPointError) if rank == 0 else torch.enable_grad():
        train(f"{folder}/diverged", loss=lambda error: error.sum() / 0)


def test_processes_train_what_one_process_trains_and_go_on_from_its_state(tmp_path):
    in_ranks(_together, 2, tmp_path)
    train(tmp_path / "alone", replace(SETTINGS, steps=7, workers=2))
    train(tmp_path / "alone", replace(SETTINGS, workers=2))
    together, alone = (state_of(tmp_path / run) for run in ("run", "alone"))
    assert int(together["step"]) == 12 and together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-7, msg=name)
    losses = [[row["loss"] for row in read_log(tmp_path / run)] for run in ("run", "alone")]
    assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not (tmp_path / "unlike").exists() and not (tmp_path / "small").exists()


def _one_dies(rank, folder):
    steps = iter(range(99))

    def loss(error):
        if rank == 1 and next(steps) == 6:  # of step 8: in two it has no clip
            os._exit(7)
        return error.square().mean()

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the one that is left is told that another ended
    try:
        train(f"{folder}/run", loss=loss)
    except RankError as error:
        Path(folder, "error").write_text(str(error))


def test_a_process_that_dies_leaves_a_state_to_go_on_from(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        in_ranks(_one_dies, 2, tmp_path)
    assert "rank 0 of 2 lost another process at step 8" in (tmp_path / "error").read_text()
    assert int(state_of(tmp_path / "run")["step"]) == 8
    train(tmp_path / "run")
    assert [row["step"] for row in read_log(tmp_path / "run")] == [10, 12]


def _one_of_three_dies(rank, folder):
    steps = iter(range(99))

    def loss(error):
        if rank == 1 and next(steps) == 2:
            os._exit(7)
        return error.square().mean()

    if rank == 2:
        lost = ranks._Pulse.lost
        ranks._Pulse.lost = lambda *args, **how: (time.sleep(3), lost(*args, **how))[1]  # a busy machine
    try:
        with started("cpu", wait=300):
            train(f"{folder}/run", loss=loss)
    except RankError as error:
        Path(folder, f"error {rank}").write_text(str(error))


def test_a_process_that_dies_is_named_by_those_that_are_left(tmp_path):
    """Rank 2 waits for rank 0 and learns by its end: it must name rank 1, by the store that rank 0 keeps."""
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        as_torchrun_does(_one_of_three_dies, 3, tmp_path)
    said = [(tmp_path / f"error {rank}").read_text() for rank in (0, 2)]
    assert said[0].startswith("rank 0 of 3 lost rank 1 at step 2 (") and said[1].startswith("rank 2 of 3 lost rank 1 ")


@pytest.mark.parametrize(
    ("there", "waiting", "late", "named"),
    [
        ([0, 2], [0, 2], False, "rank 1"), ([0, 1, 2], [0, 2], True, "rank 1"), ([0, 2], [0], True, "rank 1"),
        ([0, 1, 2], [0], True, "rank 1, 2"), ([0, 1, 2], [0, 2], False, "another process"),
    ],
    ids=["gone", "hangs", "gone before another has noticed", "two hang", "a broken line"],
)  # fmt: skip
def test_those_that_wait_name_who_is_gone_or_waits_for_nobody(monkeypatch, there, waiting, late, named):
    monkeypatch.setattr(ranks, "_BEAT", 0.05)
    monkeypatch.setattr(ranks, "_SILENT", 1.0)
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"pulse {rank}", "0")
    pulses = {rank: ranks._Pulse(store, rank, 3) for rank in there}
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        for pulse in pulses.values():
            stack.enter_context(pulse)
        assert list(pool.map(lambda rank: pulses[rank].lost(late=late), waiting)) == [named] * len(waiting)


@pytest.mark.parametrize(("there", "named"), [([0], "1, 2"), ([0, 2], "1"), ([0, 1, 2], "")])
def test_who_is_ended_because_another_is_gone_names_it_and_nobody_where_all_are_ended(monkeypatch, there, named):
    """torchrun ends the others when one is gone, often before their next exchange with it."""
    monkeypatch.setattr(ranks, "_BEAT", 0.05)
    monkeypatch.setattr(ranks, "_SILENT", 1.0)
    store = dist.HashStore()
    pulses = [ranks._Pulse(store, rank, 3) for rank in there]
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        for pulse in pulses:
            stack.enter_context(pulse)
        assert list(pool.map(lambda pulse: pulse.gone(), pulses)) == [named] * len(there)
        ended = pytest.raises(RankError, match=f"rank 0 of 1 is ended: rank {named} is gone; start all again")
        with ended if named else pytest.raises(SystemExit, match="143"), ranks._told_why_ended():
            sys.exit(128 + signal.SIGTERM)
        with pytest.raises(SystemExit, match="1$"), ranks._told_why_ended():
            sys.exit(1)


def _waits(rank, folder):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as the commands do
    try:
        with started("cpu", wait=300):
            dist.barrier()
            time.sleep(60 if rank == 0 else 0)
            os._exit(7)
    except RankError as error:
        Path(folder, "error").write_text(str(error))


def test_a_process_that_is_ended_before_it_can_miss_the_one_that_died_names_it(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        as_torchrun_does(_waits, 2, tmp_path)
    assert (tmp_path / "error").read_text() == "rank 0 of 2 is ended: rank 1 is gone; start all again"


def test_a_port_in_use_is_no_rank_that_did_not_come(monkeypatch):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        place = dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=used.getsockname()[1])
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        message = r"rank 0 of 2 cannot listen at 127.0.0.1:\d+; is the port in use\? Give all another MASTER_PORT"
        with pytest.raises(RankError, match=message), started("cpu", wait=30):
            pass


@pytest.mark.parametrize(
    ("rank", "said"),
    [(0, "rank 1, 2 of 3 did not come within 0:00:01.2"), (1, r"rank 0 of 3, at 127.0.0.1:\d+, did not come within")],
)
def test_who_does_not_come_is_named(monkeypatch, rank, said):
    for name, value in dict(RANK=rank, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RankError, match=said), started("cpu", wait=1.2):
        pass


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, and RANK, MASTER_ADDR, MASTER_PORT not: start all .* by torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, as torchrun sets it; got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "less than WORLD_SIZE=2"),
    ],
)
def test_variables_of_torchrun_that_are_missing_or_do_not_fit_are_named(monkeypatch, variables, said):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said), started("cpu"):
        pass


@pytest.mark.parametrize("wait", [0, -1, math.nan, math.inf, True, "60"])
def test_a_wait_that_is_none_is_refused(wait):
    with pytest.raises(ValueError, match="wait must be a number from 1 to 604800; got"), started("cpu", wait=wait):
        pass


def test_who_is_lost_while_processes_join_is_no_traceback(monkeypatch):
    def closed(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:553] Connection closed by peer\nmore")

    monkeypatch.setattr(dist, "init_process_group", closed)
    message = r"rank 0 of 1 cannot join the others \(Gloo connectFullMesh failed .* by peer\); start all$"
    with pytest.raises(RankError, match=message), started("cpu", alone=True):
        pass


def test_every_group_of_a_run_waits_as_long_as_the_run():
    """PyTorch gives 30 minutes to each, whatever the first one has."""
    limit = lambda group: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # noqa: E731
    with started("cpu", alone=True, wait=77):
        assert limit(dist.group.WORLD) == limit(dist.new_group([0])) == 77
    with started("cpu", alone=True):
        assert limit(dist.group.WORLD) == limit(dist.new_group([0])) == 1800


@pytest.mark.parametrize("command", [["generate", "a red ball moves up"], ["train", "vae"], ["train", "dit"]])
def test_commands_of_several_processes_refuse_such_a_wait(sora, command):
    code, _, said = sora(*command, "--wait", "0")
    assert code == 1 and "wait must be a number from 1 to 604800; got 0.0" in said
