"""One command for a GPU machine where nothing else is reachable: build, test, measure, within a time budget.

    python3 -m benchmarks.gpu --out DIR --minutes 8

It needs python3 with torch and triton, and nvcc for the CUDA library; no network, no pip, no virtual
environment. Every step runs in a process of its own and writes under DIR as it goes; a step that fails or
overruns does not stop the next. The CUDA C++ kernels come first: their tests, the same under compute-sanitizer, and
what docs/cuda.md predicts of their time. DIR then holds build.log, info.json, cuda.log, sanitizer.log, verify.log,
pytest.log, pytest.xml, verified.json, bench.log, bench.jsonl and summary.txt; `python -m benchmarks.report --add DIR`
files them and brings the README up to date. Where the tree has no git history, SORA_KERNELS_COMMIT says which commit it
is.

Without a GPU it checks what can be checked, says what it left out, and exits 0. Exit status 1: a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from sora_kernels import _library

from . import machine, report, shapes, suite, table, targets, verified
from .models import MODELS

# of the time left when the step begins; benchmarks take the rest
BUILD_SHARE, CUDA_SHARE, VERIFY_SHARE, TEST_SHARE = 0.4, 0.1, 0.2, 0.5
GRACE_S = 15  # for a stopped step to write what it has

# What docs/cuda.md predicts of the CUDA C++ kernels, to be confirmed in order of value: op, variant, mode and shapes.
PREDICTED = (
    ("spacetime_attention", "both", ("wan1.3b-length-4", "wan1.3b-480p")),
    ("spacetime_attention:causal", "both", ("wan1.3b-480p",)),
    ("spacetime_attention:tiles", "both", ("wan1.3b-480p",)),
    ("causal_conv3d", "fwd", ("wan1.3b-480p", "wan14b-480p", "wan1.3b-720p")),
    ("qk_norm_rope", "both", ("wan1.3b-480p", "wan14b-480p")),
    ("upsample_conv3d", "fwd", ("wan1.3b-480p",)),
    ("norm_silu", "fwd", ("wan1.3b-480p",)),
    ("norm_modulate", "both", ("wan1.3b-480p",)),
    ("gate_residual", "both", ("wan1.3b-480p",)),
    ("gate_residual_norm_modulate", "both", ("wan1.3b-480p",)),
    ("patch_embed3d", "fwd", ("wan1.3b-480p", "wan14b-480p")),
    ("final_layer", "fwd", ("wan1.3b-480p", "wan14b-480p")),
)
RIVALS = ("cuda", "triton", "cudnn", "sdpa")


@dataclass
class Step:
    name: str
    status: str  # ok | failed | timeout | skipped
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name:<12} {self.status:<8} {self.seconds:6.0f} s  {self.note}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tests", default="tests", metavar="PATH", help="what pytest -m gpu collects (default tests)")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "summary.txt").touch()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot write there: {error.strerror}")
    session = Session(args.out.resolve(), time.monotonic() + 60 * args.minutes, args.tests)
    steps = session.on_gpu() if torch.cuda.is_available() else session.without_gpu()
    return int(any(step.status in ("failed", "timeout") for step in steps))


class Session:
    def __init__(self, out: Path, end: float, tests: str):
        self.out, self.end, self.tests = out, end, tests
        self.steps: list[Step] = []

    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def done(self, step: Step) -> Step:
        self.steps.append(step)
        self.say(str(step))
        return step

    def on_gpu(self) -> list[Step]:
        facts = machine.facts("cuda")
        self.say(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
        self.build()
        info = [sys.executable, "-m", "sora_kernels.info", "--json"]
        self.step("info", info, self.out / "info.json", min(60.0, self.left()))
        self.confirm()
        check = [sys.executable, "-m", "sora_kernels.verify", "--device", "cuda"]
        self.step("verify", check, self.out / "verify.log", VERIFY_SHARE * self.left())
        self.test(facts)
        self.benchmark()
        self.say("\n" + self.table())
        return self.steps

    def build(self) -> None:
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        if shutil.which("nvcc") or (toolkit / "bin" / "nvcc").exists():
            targets = "cpu,cuda"
        else:
            targets = "cpu"
            self.done(Step("build cuda", "skipped", note=f"no nvcc in PATH or {toolkit}/bin: no CUDA library"))
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        limit = BUILD_SHARE * self.left()
        self.step(f"build {targets}", command, self.out / "build.log", limit, SORA_KERNELS_BUILD=targets)

    def confirm(self) -> None:
        """Do the CUDA C++ kernels run, without a fault that a sanitizer sees, and in the time that is predicted?"""
        if (reason := _library.load_error("cuda")) is not None:
            self.done(Step("cuda", "skipped", note=f"no CUDA library: {reason}"))
            return
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider",
                 "tests/test_csrc.py"]  # fmt: skip
        self.step("cuda tests", tests, self.out / "cuda.log", CUDA_SHARE * self.left())
        for tool in ("memcheck", "racecheck"):
            if shutil.which("compute-sanitizer") is None:
                self.done(Step(f"cuda {tool}", "skipped", note="no compute-sanitizer in PATH"))
                continue
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests]
            self.step(f"cuda {tool}", command, self.out / "sanitizer.log", CUDA_SHARE * self.left())
        for op, mode, named in PREDICTED:
            impls = [impl for impl in RIVALS if impl in _library.impls(f"{op.partition(':')[0]}_fwd")]
            command = [sys.executable, "-m", "benchmarks.run", "--op", op, "--mode", mode, "--budget", "0.5",
                       *(word for name in named for word in ("--shape", name)),
                       *(word for impl in impls for word in ("--impl", impl)),
                       "--device", "cuda", "--json", str(self.out / "bench.jsonl")]  # fmt: skip
            self.step(f"cuda {op}", command, self.out / "bench.log", CUDA_SHARE * self.left())

    def test(self, facts: dict[str, object]) -> None:
        if importlib.util.find_spec("pytest") is None:
            self.done(Step("tests", "failed", note="pytest is not installed: no GPU test ran, nothing is verified"))
            return
        junit = self.out / "pytest.xml"
        junit.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider",
                   f"--junitxml={junit}", self.tests]  # fmt: skip
        step = self.step("tests", command, self.out / "pytest.log", TEST_SHARE * self.left())
        if junit.exists():
            early = {"stopped_early": True} if step.status == "timeout" else {}
            records = verified.record(junit, self.out / "verified.json", facts | early)
            for family, impls in records.items():
                counts = (f"{impl} {n['passed']} passed, {n['failed']} failed" for impl, n in impls.items())
                self.say(f"  {family}: {'; '.join(counts)}")

    def benchmark(self) -> None:
        families = self.families()
        for done, (family, ops) in enumerate(families.items()):
            share = (self.left() - GRACE_S) / (len(families) - done)
            if share < 20:
                self.done(Step(f"bench {family}", "skipped", note="no time left"))
                continue
            budget = "3" if family == "model" else "0.5"
            command = [sys.executable, "-m", "benchmarks.run", "--peers", "--budget", budget, "--minutes",
                       f"{0.8 * share / 60:.2f}", *(word for op in ops for word in ("--op", op)),
                       "--device", "cuda", "--json", str(self.out / "bench.jsonl")]  # fmt: skip
            self.step(f"bench {family}", command, self.out / "bench.log", share)

    def families(self) -> dict[str, list[str]]:
        families: dict[str, list[str]] = defaultdict(list)
        for op, benchmark in suite.discover().items():
            families[suite.family(benchmark)].append(op)
        return families | {"model": list(MODELS)}

    def step(self, name: str, command: list[str], log: Path, limit: float, **env: str) -> Step:
        """Run a command under a time limit, its output appended to `log`."""
        start = time.monotonic()
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | env
        with log.open("ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                command, cwd=machine.ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code, status = process.wait(limit), None
            except subprocess.TimeoutExpired:
                code, status = _stop(process), "timeout"
        status = status or ("ok" if code == 0 else "failed")
        note = "" if status == "ok" else f"exit {code}, see {log.name}"
        step = self.done(Step(name, status, time.monotonic() - start, note))
        if status != "ok":
            written = log.read_bytes()[begin:].decode(errors="replace").splitlines()
            self.say("\n".join("    " + line for line in written[-12:]))
        return step

    def table(self) -> str:
        """Our fastest implementation of each case, in a few columns."""
        path = self.out / "bench.jsonl"
        rows = report.read_jsonl(path) if path.exists() else []
        cases: dict[tuple, dict[str, dict]] = defaultdict(dict)
        for row in rows:
            if row["status"] == "ok":
                cases[row["op"], row["shape"], row["mode"]][row["impl"]] = row
        lines = []
        for (op, shape, mode), own in cases.items():
            ours = [r for r in own.values() if r["kind"] == "ours"]
            if not ours:
                continue
            best = min(ours, key=lambda r: r["p50_us"])
            against = [f"{own[n]['p50_us'] / best['p50_us']:.2f}" if n in own else "" for n in ("eager", "compile")]
            figures = f"{best['p50_us']:.0f}", f"{best['percent_copy']:.0f}"
            lines.append((op, shape, mode, best["impl"], *figures, *against))
        failed = [f"{r['status']}: {r['op']} {r['impl']} {r['mode']} {r['shape']}: {r['reason']}"
                  for r in rows if r["kind"] == "ours" and r["status"] == "failed"]  # fmt: skip
        columns = ("op", "shape", "mode", "fastest", "p50 µs", "% copy", "x eager", "x compile")
        return "\n".join([table.plain_table(columns, lines), *targets.shortfalls(rows), *failed])

    def without_gpu(self) -> list[Step]:
        """What a GPU run would do, and a check of as much of it as runs here."""
        self.say("no GPU: torch sees no CUDA device here")
        would = "would run setup.py build_ext --inplace with SORA_KERNELS_BUILD=cpu,cuda"
        self.done(Step("build", "skipped", note=would))
        if importlib.util.find_spec("pytest") is None:
            self.done(Step("tests", "skipped", note="and pytest is not installed"))
        else:
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only", "-p", "no:cacheprovider",
                       self.tests]  # fmt: skip
            step = self.step("collect", command, self.out / "pytest.log", self.left())
            if step.status == "failed" and "exit 5" in step.note:  # pytest: nothing collected
                step.status = "ok"
            self.done(Step("tests", "skipped", note="pytest -m gpu needs a GPU; pytest.log lists what it would run"))
        for family, ops in self.families().items():
            named = [MODELS[op].default["cuda"] for op in ops] if family == "model" else [shapes.DEFAULT["cuda"]]
            cases = ", ".join(dict.fromkeys(name for names in named for name in names))
            self.done(Step(f"bench {family}", "skipped", note=f"would measure {', '.join(ops)} at {cases}"))
        return self.steps


def _stop(process: subprocess.Popen) -> int:
    """SIGINT first, on which pytest still writes its report; after a grace SIGKILL, to all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
