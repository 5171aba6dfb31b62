"""A revision beside the present tree: the same case in two processes that take turns, and the ratio of their times.

    python -m benchmarks.run --base REV [--op NAME ...] [--shape ID ...] [--fail-under 0.95]

Both processes run this tree's definitions, each with the `sora_kernels` of its own tree: the revision's from a git
worktree, which is removed in the end, with libraries compiled once for each other state of csrc/, kept in build/base.
A round is a sample of each, in an order drawn anew; the ratio is the median over rounds of the revision's time by ours,
above 1 where ours is faster, with the 95 % interval of its bootstrap. Each side is first held to fp64, as in any run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sora_kernels._dispatch import Unavailable

from . import machine, peers, shapes, suite, timing

LIBRARIES = machine.ROOT / "build" / "base"
SAMPLE_S = 5e-3  # long beside the turn that is passed from one process to the other
SETTLE_S = 2e-3  # after its sample a process's threads wait for work before they sleep
MIN_ROUNDS, MAX_ROUNDS, DRAWS = 10, 1000, 2000
SERVE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("benchmarks", sys.argv[1], submodule_search_locations=[sys.argv[2]])
sys.path.insert(0, sys.argv[3])
sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from benchmarks import compare
compare.serve(sys.argv[3])
"""


class BadBase(Exception):
    """The revision cannot be measured. The message says why."""


def compare(
    revision: str, cases: Iterable[tuple[suite.Benchmark, shapes.Shape, tuple[str, ...]]], modes: tuple[str, ...], *,
    dtype: torch.dtype, device: torch.device, budget_s: float, seed: int, threads: int, fail_under: float | None,
) -> int:  # fmt: skip
    """Print a line for each case; 1 where one fails, or its ratio is below `fail_under` and its interval below 1."""
    slower = failed = 0
    shared = dict(dtype=str(dtype).removeprefix("torch."), device=str(device), seed=seed, threads=threads)
    with _worktree(revision, device) as (base, sha), _process(base) as theirs, _process(machine.ROOT) as ours:
        print(f"{sha} (base) beside this tree; ratios above 1: this tree is faster", flush=True)
        for benchmark, shape, impls in cases:
            for mode, impl in ((mode, impl) for mode in modes for impl in impls if benchmark.has(impl, mode)):
                name = f"{benchmark.name} {impl} {mode} at {shape.id}"
                asked = shared | dict(op=benchmark.name, shape=shape.id, impl=impl, mode=mode)
                answers = {"base": theirs(asked), "this tree": ours(asked)}
                reasons = [f"{side}: {answer['reason']}" for side, answer in answers.items() if "reason" in answer]
                if reasons:
                    failed += "failed" in answers["this tree"]
                    print(f"not compared: {name}: {'; '.join(reasons)}", flush=True)
                    continue
                pairs = _rounds(theirs, ours, max(answer["calls"] for answer in answers.values()), budget_s)
                ratio, low, high = interval([base / own for base, own in pairs])
                below = fail_under is not None and ratio < fail_under and high < 1
                slower += below
                us = timing.Stats.of([own for _, own in pairs]).p50 * 1e6
                print(
                    f"{ratio:6.3f}× [{low:.3f}, {high:.3f}]  {name}, {us:.1f} µs, {len(pairs)} rounds"
                    + (f"  below {fail_under:g}" if below else ""), flush=True,
                )  # fmt: skip
    if slower:
        print(f"{slower} below {fail_under:g}×, with an interval below 1")
    return int(bool(slower or failed))


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the 95 % interval of the medians of samples drawn from the ratios with replacement."""
    values = torch.tensor(ratios, dtype=torch.float64)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.quantile(0.5).item(), low, high


def _rounds(theirs: Callable, ours: Callable, calls: int, budget_s: float) -> list[tuple[float, float]]:
    """Seconds a call, (theirs, ours) of each round."""
    draw, pairs, end = random.Random(0), [], time.perf_counter() + budget_s
    while len(pairs) < MIN_ROUNDS or (time.perf_counter() < end and len(pairs) < MAX_ROUNDS):
        seconds, order = {}, [("base", theirs), ("own", ours)]
        draw.shuffle(order)
        for side, ask in order:
            seconds[side] = ask({"calls": calls})["seconds"]
            time.sleep(SETTLE_S)
        pairs.append((seconds["base"], seconds["own"]))
    return pairs


# The tree of the revision


@contextlib.contextmanager
def _worktree(revision: str, device: torch.device) -> Iterator[tuple[Path, str]]:
    """(path, short commit) of a worktree with its libraries; it is removed however this ends."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        why = found.stderr.strip() or f"there is no such commit in {machine.ROOT}"
        raise BadBase(f"--base {revision}: {why}; name a commit, a branch or a tag (git log --oneline lists commits)")
    sha = found.stdout.strip()
    folder = Path(tempfile.mkdtemp(prefix="sora-base-"))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        made = _git("worktree", "add", "--quiet", "--detach", str(folder / "tree"), sha)
        if made.returncode:
            raise BadBase(f"--base {revision}: git worktree add failed: {made.stderr.strip()}")
        _libraries(folder / "tree", sha, device)
        yield folder / "tree", sha[:12]
    finally:
        signal.signal(signal.SIGTERM, before)
        _git("worktree", "remove", "--force", str(folder / "tree"))
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")


def _libraries(tree: Path, sha: str, device: torch.device) -> None:
    """Put the compiled libraries of the revision into its tree: this tree's own where the sources are the same."""
    own = sorted((machine.ROOT / "sora_kernels").glob("*.so"))
    same = not _git("diff", "--quiet", sha, "--", "csrc", "setup.py").returncode
    if own and not same:
        own = _compiled(tree, sha, ["cpu"] + ["cuda"] * (device.type == "cuda" and "_cuda.so" in {p.name for p in own}))
    for library in own:
        shutil.copy2(library, tree / "sora_kernels")


def _compiled(tree: Path, sha: str, targets: list[str]) -> list[Path]:
    sources = _git("ls-tree", "-r", sha, "csrc", "setup.py").stdout
    key = (sources, torch.__version__, sysconfig.get_platform(), sys.version, *targets)
    kept = LIBRARIES / hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    if not kept.exists():
        print(f"compiling csrc/ of {sha[:12]} for {', '.join(targets)}; kept in {kept}", flush=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = os.environ | {"SORA_KERNELS_BUILD": ",".join(targets)}
        built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if built.returncode:
            said = (built.stdout + built.stderr)[-2000:]
            raise BadBase(f"--base: csrc/ of {sha[:12]} does not compile here:\n{said}")
        partial = Path(tempfile.mkdtemp(dir=_made(LIBRARIES)))
        for library in (tree / "sora_kernels").glob("*.so"):
            shutil.copy2(library, partial)
        with contextlib.suppress(OSError):  # another run was first
            partial.rename(kept)
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(kept.iterdir())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(machine.ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise BadBase(f"--base needs git: {error.strerror}") from error


# The two processes


@contextlib.contextmanager
def _process(tree: Path) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A function that asks a process with the `sora_kernels` of `tree`."""
    package = Path(__file__).parent
    command = [sys.executable, "-c", SERVE, str(package / "__init__.py"), str(package), str(tree)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(question: dict[str, Any]) -> dict[str, Any]:
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise BadBase(f"the process of {tree} ended with exit code {process.wait()}; its last words are above")
        return json.loads(answer)

    try:
        yield ask
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def serve(tree: str) -> None:
    """Answer questions, a line of JSON each: first a case, then how many calls to time."""
    import sora_kernels

    assert Path(sora_kernels.__file__).is_relative_to(tree), f"{sora_kernels.__file__} is not of {tree}"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    benchmarks, timed = suite.discover(), None
    for line in sys.stdin:
        question = json.loads(line)
        if "op" in question:
            timed, answer = _prepared(benchmarks, question)
        else:
            answer = {"seconds": timed(question["calls"])}
        answers.write(json.dumps(answer) + "\n")


def _prepared(
    benchmarks: dict[str, suite.Benchmark], question: dict[str, Any]
) -> tuple[Callable[[int], float] | None, dict[str, Any]]:
    """(calls -> seconds a call, the answer) of a case that was found right; or the reason why not."""
    device, backward = torch.device(question["device"]), question["mode"] == "bwd"
    shape, dtype = shapes.SHAPES[question["shape"]], getattr(torch, question["dtype"])
    if question["threads"]:
        torch.set_num_threads(question["threads"])
    try:
        benchmark = benchmarks[question["op"]]
        case = suite.Prepared(benchmark, shape, dtype, device, question["seed"], with_grads=backward)
        call, _ = case.candidate(question["impl"], question["mode"])
        clock = timing.clock(device)

        def timed(calls: int) -> float:
            with torch.set_grad_enabled(backward):
                return clock(call, calls)

        timed(2)  # warm
        with torch.set_grad_enabled(backward):
            return timed, {"calls": timing.calls_per_sample(call, SAMPLE_S) if device.type == "cpu" else 1}
    except (Unavailable, peers.Missing) as error:
        return None, {"reason": str(error).splitlines()[0]}
    except Exception as error:  # of one case: the others are still to be compared
        return None, {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "failed": True}
