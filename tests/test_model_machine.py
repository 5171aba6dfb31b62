"""The memory that is there: what control groups leave of it, versions 1 and 2, nested, in a container, broken."""

from __future__ import annotations

import pytest
import torch

from sora_model import machine

CPU, GIB = torch.device("cpu"), 1 << 30
V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
MEMINFO = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GIB),
        ({"proc/self/cgroup": "0::/a/b\n", V2 + "a/b/memory.max": "max\n", V2 + "a/b/memory.current": "7"}, 8 * GIB),
        # the limit of a group above holds as well
        ({"proc/self/cgroup": "0::/a/b\n", V2 + "a/b/memory.max": "max", V2 + "a/memory.max": str(4 * GIB),
          V2 + "a/memory.current": str(GIB), V2 + "a/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n"}, 3.5 * GIB),
        # in a container: the host's path, and the group's files at the root
        ({"proc/self/cgroup": "0::/docker/4f\n", V2 + "memory.max": str(2 * GIB), V2 + "memory.current": "0"}, 2 * GIB),
        ({"proc/self/cgroup": "9:pids:/\n4:cpu,memory:/job\n0::/\n", V1 + "job/memory.limit_in_bytes": str(GIB),
          V1 + "job/memory.usage_in_bytes": str(GIB // 2), V1 + "job/memory.stat": "total_inactive_file 0\n"}, GIB / 2),
        ({"proc/self/cgroup": "4:memory:/\n", V1 + "memory.limit_in_bytes": str(2**63 - 4096),
          V1 + "memory.usage_in_bytes": str(GIB)}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": str(GIB), V2 + "memory.current": str(2 * GIB)}, 0),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "what", V2 + "memory.current": "ever"}, 8 * GIB),
    ],
)  # fmt: skip
def test_the_memory_that_a_control_group_leaves(tmp_path, monkeypatch, files, free):
    for name, text in (MEMINFO | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine.available(CPU) == free


def test_without_any_of_those_files_the_memory_is_that_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine.available(CPU) >= GIB // 4


def test_what_a_whole_model_can_run_with():
    for impl in ("auto", "reference", "cpu", "triton"):
        machine.check_impl(impl)
    for impl in ("cuda", "cudnn", "sdpa", "warp", ""):
        with pytest.raises(ValueError, match=f"impl must be one of auto, reference, cpu, triton, .*; got '{impl}'"):
            machine.check_impl(impl)
