"""Where a figure was taken: device, driver, versions, commit. Every row and test record carries these."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def device_name(device: torch.device | str) -> str:
    """`NVIDIA H200`; of a CPU with its instruction set, which virtual machines of one name differ in."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def slug(name: str) -> str:
    """A folder name: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def driver(device: torch.device | str) -> str | None:
    if torch.device(device).type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    return None


def installed(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def allocator() -> str | None:
    """What replaces the C library's malloc, and its settings. It decides whether large results lie on fresh pages."""
    preloaded = Path(os.environ.get("LD_PRELOAD", "")).name
    return " ".join(filter(None, (preloaded, os.environ.get("MALLOC_CONF")))) if "malloc" in preloaded else None


@functools.cache
def commit() -> tuple[str, bool | None]:
    """(commit, dirty). Results and the README, which is generated from them, do not make a tree dirty.

    In a copy of the tree without its history `SORA_KERNELS_COMMIT` ("<sha>" or "<sha>-dirty") says it.
    """
    told = os.environ.get("SORA_KERNELS_COMMIT")
    if told:
        return told.removesuffix("-dirty"), told.endswith("-dirty")

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
        return git("rev-parse", "--short=12", "HEAD"), bool(changed)
    return "unknown", None


def facts(device: torch.device | str) -> dict[str, object]:
    sha, dirty = commit()
    cpu = torch.device(device).type == "cpu"
    return {
        "device": device_name(device),
        "driver": driver(device),
        "threads": torch.get_num_threads() if cpu else None,
        "allocator": allocator() if cpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": sha,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def described(device: torch.device | str) -> dict[str, object]:
    """The first line of a run's file: what the rows say of the machine, and what only the whole of it has."""
    libraries = (
        "diffusers", "liger-kernel", "quack-kernels", "comfy-kitchen", "natten", "flash-attn-4", "flashinfer-python",
        "fastvideo-kernel",
    )  # fmt: skip
    return facts(device) | {
        "processors": os.cpu_count(), "load": os.getloadavg(), "platform": platform.platform(), "command": sys.argv[1:],
        "libraries": {name: version for name in libraries if (version := installed(name))},
    }  # fmt: skip
