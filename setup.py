"""A pure-Python wheel by default; the compiled libraries of csrc/ only when they are asked for.

    pip install .                                                       no compiler, no torch at build time
    SORA_KERNELS_BUILD=cpu pip install .                                + sora_kernels/_C*.so and _cpu.so
    SORA_KERNELS_BUILD=cpu,cuda python setup.py build_ext --inplace     + sora_kernels/_cuda.so; no network, no pip

The operations use the LibTorch Stable ABI only, so one build serves every torch >= 2.11, and _cuda.so compiles against
any torch wheel, a CPU-only one included: it needs nvcc, not a GPU. Nothing here guesses and nothing downloads.

Environment: SORA_KERNELS_BUILD (cpu, cuda or both, comma separated), CXX (g++), CXXFLAGS (they follow ours), CUDA_HOME
(else nvcc from PATH or /usr/local/cuda), MAX_JOBS (parallel compiler calls; ninja's own default otherwise).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
BUILD = Path("build") / "csrc"
TARGETS = ("cpu", "cuda")

TORCH_MINIMUM = (2, 11)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# No -ffast-math: NaN and infinity keep their meaning. Reductions are vectorised by `omp simd` where the source says so.
# -Wno-psabi: vectors are passed to inlined functions only, never by a calling convention.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
             "-fopenmp-simd", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-missing-field-initializers",
             *shlex.split(os.environ.get("CXXFLAGS", ""))]
# sm_80 also carries PTX, for devices newer than this list.
CUDA_ARCHITECTURES = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a",
                      "arch=compute_100,code=sm_100"]
NVCC_MINIMUM = (12, 8)  # the first that knows sm_100
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads=0", "-DUSE_CUDA",
              "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xcudafe=--diag_suppress=20208"]


def fail(problem: str, remedy: str) -> SystemExit:
    return SystemExit(f"\nsora-kernels: {problem}\n    {remedy}\n")


def requested_targets() -> list[str]:
    """The targets named by SORA_KERNELS_BUILD; none when it is unset or empty."""
    value = os.environ.get("SORA_KERNELS_BUILD", "")
    names = [name.strip() for name in value.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TARGETS]:
        raise fail(
            f"SORA_KERNELS_BUILD={value!r} asks for {unknown[0]!r}; expected 'cpu', 'cuda' or 'cpu,cuda'.",
            "Leave SORA_KERNELS_BUILD unset for the pure-Python install.",
        )
    return sorted(set(names))


def find_torch() -> Path:
    """The directory of the installed torch, found without importing it.

    pip's isolated build hides what is installed beside it, but for its own folder; what is built runs with that torch.
    """
    spec = importlib.util.find_spec("torch")
    installed = [Path(spec.origin).parent] if spec and spec.origin else []
    installed += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    root = next((folder for folder in installed if (folder / "__init__.py").exists()), None)
    if root is None:
        raise fail(
            f"torch is not installed for {sys.executable}, and compiling csrc/ needs its headers.",
            "Install torch first; a front end whose isolated builds are environments of their own (uv, build) then "
            "needs --no-build-isolation, and setuptools>=77 beside torch.",
        )
    header = root / "include" / "torch" / "headeronly" / "version.h"
    found = re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text() if header.exists() else "")
    if tuple(map(int, found)) < TORCH_MINIMUM:
        raise fail(
            f"torch at {root} is {'.'.join(found) or 'too old to say its version'}; "
            f"the compiled libraries need {'.'.join(map(str, TORCH_MINIMUM))} or newer.",
            "Upgrade torch, or leave SORA_KERNELS_BUILD unset.",
        )
    return root


def find_cxx() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if path := shutil.which(candidate[0]):
            return [path, *candidate[1:]]
    raise fail(
        f"no C++ compiler: {' '.join(named) or 'g++, c++ and clang++'} not found.",
        "Install one (Debian: apt install g++) or name it in CXX; or leave SORA_KERNELS_BUILD unset.",
    )


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [f"{home}/bin" for home in homes] or [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise fail(
            f"SORA_KERNELS_BUILD asks for cuda, but nvcc is not in {', '.join(homes) or 'PATH or /usr/local/cuda'}.",
            "Install the CUDA toolkit (no GPU is needed), set CUDA_HOME, or build SORA_KERNELS_BUILD=cpu.",
        )
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", report)
    if release is None or tuple(map(int, release.groups())) < NVCC_MINIMUM:
        raise fail(
            f"{nvcc} is {release[0] if release else 'of an unknown release'}; "
            f"expected {'.'.join(map(str, NVCC_MINIMUM))} or newer.",
            "Point CUDA_HOME at a newer toolkit, or build SORA_KERNELS_BUILD=cpu.",
        )
    return nvcc


def find_pybind11(torch: Path) -> Path:
    """pybind11's headers: the package's own, else the copy that torch ships."""
    if (spec := importlib.util.find_spec("pybind11")) and spec.origin:
        return Path(spec.origin).parent / "include"
    return torch / "include"


@dataclass
class Step:
    """One compiler call: `output` from `inputs`; `depfile` lists the headers it read."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None

    @property
    def line(self) -> str:
        return shlex.join(self.command)


def library_steps(name: str, target: Path, torch: Path) -> list[Step]:
    """The compiler calls that make one library: _C (pybind11 module), _cpu or _cuda (operations)."""
    cxx, include, lib = find_cxx(), torch / "include", torch / "lib"
    operations = [*STABLE_ABI, f"-DSORA_LIBRARY={name}", f"-I{CSRC}", "-isystem", str(include)]
    link_torch = [f"-L{lib}", "-ltorch_cpu"]
    steps = []

    def compile_all(sources: list[Path], compiler: list[str]) -> list[Path]:
        objects = []
        for source in sources:
            output = BUILD / name / (source.name + ".o")
            depfile = output.with_suffix(".d")
            command = [*compiler, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
            steps.append(Step(output, [source], command, depfile))
            objects.append(output)
        return objects

    shared_source = CSRC / "common" / "library.cpp"
    if name == "_C":
        headers = ["-isystem", str(find_pybind11(torch)), "-isystem", sysconfig.get_path("include")]
        objects = compile_all([CSRC / "bindings.cpp"], [*cxx, *CXX_FLAGS, *headers])
        link = [*cxx, "-shared"]
    elif name == "_cpu":
        objects = compile_all([*sorted((CSRC / "cpu").glob("*.cpp")), shared_source], [*cxx, *CXX_FLAGS, *operations])
        link = [*cxx, "-shared", "-Wl,-z,defs"]
    else:
        nvcc = find_nvcc()
        architectures = [f"-gencode={arch}" for arch in CUDA_ARCHITECTURES]
        kernels = sorted((CSRC / "cuda").glob("*.cu"))
        objects = compile_all(kernels, [nvcc, "-ccbin", cxx[0], *NVCC_FLAGS, *architectures, *operations])
        objects += compile_all([shared_source], [*cxx, *CXX_FLAGS, *operations])
        link = [nvcc, "-ccbin", cxx[0], "-shared", "-cudart=static", "-Xlinker=-z,defs"]
    libraries = link_torch if name != "_C" else []
    steps.append(Step(target, objects, [*link, "-o", str(target), *map(str, objects), *libraries]))
    return steps


def find_ninja() -> str | None:
    candidate = Path(sysconfig.get_path("scripts")) / "ninja"
    if candidate.exists():
        return str(candidate)
    if spec := importlib.util.find_spec("ninja"):
        if spec.origin and (bundled := Path(spec.origin).parent / "data" / "bin" / "ninja").exists():
            return str(bundled)
    return shutil.which("ninja")


def run_ninja(ninja: str, steps: list[Step]) -> int:
    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = ["ninja_required_version = 1.5", f"builddir = {BUILD}",
             "rule call", "  command = $line", "  description = $what",
             "rule compile", "  command = $line", "  description = $what", "  deps = gcc", "  depfile = $depfile"]
    for step in steps:
        rule = "compile" if step.depfile else "call"
        lines.append(f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}")
        lines.append(f"  line = {step.line.replace('$', '$$')}")
        lines.append(f"  what = {'compiling' if step.depfile else 'linking'} {step.output.name.removesuffix('.o')}")
        if step.depfile:
            lines.append(f"  depfile = {step.depfile}")
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    return subprocess.run([ninja, "-f", str(BUILD / "build.ninja"), *jobs]).returncode


def run_sequentially(steps: list[Step]) -> int:
    """Without ninja: one call after another, where anything in csrc/ or a link input is newer than the output."""
    newest_source = max(p.stat().st_mtime for p in [*CSRC.rglob("*"), Path("setup.py")] if p.is_file())
    for step in steps:
        inputs = max(newest_source, *(p.stat().st_mtime for p in step.inputs))
        if step.output.exists() and step.output.stat().st_mtime >= inputs:
            continue
        print(step.line, flush=True)
        if code := subprocess.run(step.command).returncode:
            return code
    return 0


class BuildLibraries(build_ext):
    """Compiles every requested library in one go and leaves the copying into place to setuptools."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] in ("_cpu", "_cuda"):  # loaded by torch, not imported: no Python tag
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        if not sys.platform.startswith("linux"):
            raise fail(f"csrc/ builds on Linux, not on {sys.platform}.", "Leave SORA_KERNELS_BUILD unset.")
        import fcntl  # not everywhere a pure wheel installs

        os.chdir(ROOT)
        torch = find_torch()
        steps = []
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            steps += library_steps(extension.name.rpartition(".")[2], target, torch)
        for step in steps:
            step.output.parent.mkdir(parents=True, exist_ok=True)
        ninja = find_ninja()
        with open(BUILD / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja's log takes one writer
            code = run_ninja(ninja, steps) if ninja else run_sequentially(steps)
        if code:
            raise fail(
                f"compiling csrc/ failed (exit status {code}); the first error is above.",
                "Correct it and run the same command again; what compiled is kept in build/.",
            )


def extensions() -> list[Extension]:
    """The sources are found when building; setuptools needs the names, and the files for a source distribution."""
    targets = requested_targets()
    names = ["_C"] * bool(targets) + [f"_{target}" for target in targets]
    return [Extension(f"sora_kernels.{name}", sources=[]) for name in names]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries})
