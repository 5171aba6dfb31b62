"""The tests of the CPU kernels under GCC's sanitizers: `make sanitize`, or `make sanitize SANITIZER=thread` for one.

    address   AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set of this machine. Leaks are not
              looked for: Python's own would drown them.
    thread    ThreadSanitizer, on the best instruction set: races between the pieces of a parallel loop. The loops run
              on the threads of sanitize_loops.cpp. Before the tests, a loop whose pieces overlap must be reported.

What the kernels load in assembly, 16-bit values on avx2 and avx512, neither sees: on baseline they load nothing so.

A copy of the tree in build/sanitize/ is built with each and its tests run there, the runtimes loaded before Python. The
first report ends a run. Needs GCC and minutes to build; -k EXPRESSION narrows the tests further, as pytest does.
"""

from __future__ import annotations

import argparse
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
FLAGS = {
    "address": f"-fsanitize=address {UNDEFINED} --param=asan-instrumentation-with-call-threshold=0",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
# torch and Python are not compiled with ThreadSanitizer: what their atomics order would be reported as races. For the
# same reason torch's own loops stay on one thread.
OPTIONS = {
    "address": dict(ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1", OMP_NUM_THREADS="2"),
    "thread": dict(TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1", OMP_NUM_THREADS="1"),
}
TESTS = (
    "test_csrc", "test_modulation", "test_qknorm_rope", "test_patchify", "test_patchify_cpu", "test_patchify_uint8",
    "test_attention", "test_attention_heads", "test_causal_conv", "test_causal_conv_cpu", "test_operands",
    "test_long_sums", "test_layers", "test_watermark",
)  # fmt: skip
# Not what starts compilers, looks at the library as a file, runs another implementation, or starts processes on another
# instruction set, of which each has a run of its own.
CHOSEN = (
    "not triton and not reference and not cudnn and not compile and not cuda and not machine_code and not abi "
    "and not sm_ and not instruction_set"
)
# One loop of several pieces.
OVERLAP = """
import torch
from sora_kernels import norm_modulate
norm_modulate(torch.ones(1, 64, 64), torch.ones(1, 1, 64), torch.ones(1, 1, 64), impl="cpu")
"""


def copied(target: pathlib.Path) -> None:
    """The files of the working tree, those that changed: what was built from the others stays."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        source, to = ROOT / name, target / name
        if source.is_file() and not (to.exists() and to.read_bytes() == source.read_bytes()):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to)


def instruction_sets() -> list[str]:
    """Values of SORA_KERNELS_CPU_ISA. The empty one is the best set with products of bf16 pairs, which have no name."""
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    named = (("avx2", "avx2"), ("avx512", "avx512vl"), ("", "avx512_bf16"))
    return ["baseline", *(name for name, flag in named if flag in flags)]


def built(sanitizer: str, target: pathlib.Path) -> dict[str, str]:
    """Builds the copy in `target`; the environment of its tests."""
    compiler, flags = shlex.split(os.environ.get("CXX", "g++")), FLAGS[sanitizer].split()
    copied(target)
    build = dict(SORA_KERNELS_BUILD="cpu", CXX=shlex.join([*compiler, *flags]), CXXFLAGS=COMMON)
    setup = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(setup, cwd=target, env=os.environ | build, check=True)
    names = (f"-print-file-name={runtime}" for runtime in RUNTIMES[sanitizer])
    preloaded = [subprocess.check_output([*compiler, name], text=True).strip() for name in names]
    if sanitizer == "thread":
        import torch

        preloaded.append(str(target / "build" / "loops.so"))
        include = pathlib.Path(torch.__file__).parent / "include"
        command = [*compiler, *flags, *COMMON.split(), "-std=c++20", "-fPIC", "-shared", f"-I{include}"]
        subprocess.run([*command, "tests/sanitize_loops.cpp", "-o", preloaded[-1]], cwd=target, check=True)
    return os.environ | OPTIONS[sanitizer] | dict(LD_PRELOAD=" ".join(preloaded), PYTHONPATH=str(target))


def reports_overlap(target: pathlib.Path, environment: dict[str, str]) -> bool:
    command, variables = [sys.executable, "-c", OVERLAP], environment | {"SORA_OVERLAP": "1"}
    run = subprocess.run(command, cwd=target, env=variables, capture_output=True, text=True)
    reported = "ThreadSanitizer: data race" in run.stderr
    if not reported:
        print(f"A loop whose pieces overlap was not reported.\n{run.stdout}{run.stderr}", file=sys.stderr)
    return reported


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="*", metavar="SANITIZER", help="address or thread; both by default")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only the tests that also match, as in pytest")
    arguments = parser.parse_args()
    for name in arguments.sanitizers:
        if name not in FLAGS:
            parser.error(f"expected address or thread, got {name!r}")
    chosen = f"({arguments.k}) and {CHOSEN}" if arguments.k else CHOSEN
    tests = [f"tests/{test}.py" for test in TESTS]
    # The file descriptor of stderr stays as it is, or a report is lost with the process that it ends.
    pytest = ["pytest", "-q", "-x", "--capture=sys", "-k", chosen, "-m", "not slow and not gpu", *tests]
    for sanitizer in arguments.sanitizers or FLAGS:
        target = ROOT / "build" / "sanitize" / sanitizer
        environment = built(sanitizer, target)
        if sanitizer == "thread" and not reports_overlap(target, environment):
            return 1
        for isa in instruction_sets() if sanitizer == "address" else instruction_sets()[-1:]:
            print(f"==> {sanitizer}, {isa or 'bf16 products'}", flush=True)
            command = [sys.executable, "-m", *pytest]
            if code := subprocess.run(command, cwd=target, env=environment | {"SORA_KERNELS_CPU_ISA": isa}).returncode:
                return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
