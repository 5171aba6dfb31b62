"""The core, compiled once for each version of its sources into a cache of the user's."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Callable

CORE = pathlib.Path(__file__).parent / "core"
# No contraction: an add after a mul is not an fma.
FLAGS = [
    "-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-fPIC",
]  # fmt: skip


def cache_directory() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "sora_kernels" / "ptx"


def once(path: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """`path`; where it is missing, one process makes it, in a folder of its own, and the others wait."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = pathlib.Path(folder) / path.name
                make(made)
                made.replace(path)
    return path


def compiled() -> pathlib.Path:
    """The path of the library, which is compiled where it is missing."""
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr([version, platform.processor(), _cpu(), FLAGS]).encode())
    for path in sorted(CORE.glob("*")):
        key.update(path.read_bytes())

    def compile_core(library: pathlib.Path) -> None:
        objects, running = [], []
        for source in CORE.glob("*.cpp"):
            objects.append(str(library.with_name(f"{source.stem}.o")))
            running.append(subprocess.Popen([compiler, *FLAGS, "-c", source, "-o", objects[-1]]))
        if any([process.wait() for process in running]):
            raise RuntimeError(f"{compiler} could not compile {CORE}; its errors are above")
        subprocess.run([compiler, "-shared", "-o", library, *objects], check=True)

    return once(cache_directory() / f"core-{key.hexdigest()[:16]}.so", compile_core)


def _cpu() -> str:
    """What -march=native depends on."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


@functools.cache
def core() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiled()))
    library.ptx_operation_name.restype = ctypes.c_char_p
    return library


@functools.cache
def operations() -> dict[str, int]:
    """What the core can do: the name of each operation and its number."""
    library = core()
    return {library.ptx_operation_name(i).decode(): i for i in range(library.ptx_operation_count())}
