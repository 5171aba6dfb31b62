"""The tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

A copy of the tree in build/sanitize is built with them, and its tests run there on every instruction set of this
machine, the sanitizers' runtimes loaded before Python. The first report ends a run. Leaks are not looked for: Python's
own would drown them. Needs GCC and minutes to build.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# -O1 and calls in the place of inlined checks: kernels that are compiled as one function take an hour otherwise.
COMMON = "-O1 -g1 -fno-omit-frame-pointer"
UNDEFINED = "-fsanitize=undefined -fno-sanitize=null,object-size,vptr,pointer-overflow -fno-sanitize-recover=undefined"
SANITIZERS = f"-fsanitize=address {UNDEFINED} --param=asan-instrumentation-with-call-threshold=0"
RUNTIMES = ("libasan.so", "libubsan.so")
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
TESTS = (
    "test_csrc", "test_modulation", "test_qknorm_rope", "test_patchify", "test_patchify_cpu", "test_patchify_uint8",
    "test_attention", "test_attention_heads", "test_causal_conv", "test_causal_conv_cpu", "test_layers",
)  # fmt: skip
# Not what starts compilers, looks at the library as a file, or runs another implementation.
CHOSEN = "not triton and not reference and not cudnn and not compile and not cuda and not machine_code and not abi"


def copied(target: pathlib.Path) -> None:
    """The files of the working tree, those that changed: what was built from the others stays."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        source, to = ROOT / name, target / name
        if source.is_file() and not (to.exists() and to.read_bytes() == source.read_bytes()):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to)


def instruction_sets() -> list[str]:
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    return ["baseline", *(name for name, flag in (("avx2", "avx2"), ("avx512", "avx512vl")) if flag in flags)]


def main() -> int:
    target, compiler = ROOT / "build" / "sanitize", shlex.split(os.environ.get("CXX", "g++"))
    copied(target)
    flags = SANITIZERS.split()
    build = dict(SORA_KERNELS_BUILD="cpu", CXX=shlex.join([*compiler, *flags]), CXXFLAGS=COMMON)
    setup = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(setup, cwd=target, env=os.environ | build, check=True)
    paths = (subprocess.check_output([*compiler, f"-print-file-name={r}"], text=True).strip() for r in RUNTIMES)
    environment = os.environ | OPTIONS | dict(LD_PRELOAD=" ".join(paths), PYTHONPATH=str(target), OMP_NUM_THREADS="2")
    tests = [f"tests/{test}.py" for test in TESTS]
    for isa in instruction_sets():
        print(f"==> {isa}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", CHOSEN, "-m", "not slow and not gpu", *tests]
        if code := subprocess.run(command, cwd=target, env=environment | {"SORA_KERNELS_CPU_ISA": isa}).returncode:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
