"""Every value of a checkpoint's JSON files replaced by hostile ones: each gives one clear error, or loads and runs."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_model_pipeline import make_wan_directory

from sora_kernels._dispatch import Unavailable
from sora_model.checkpoint import CheckpointError
from sora_model.machine import TooLargeError
from sora_model.pipeline import Sora

CLEAN = (ValueError, OSError, FloatingPointError, Unavailable)  # what the command makes one line of
HOSTILE = (
    None, True, False, 0, 1, -1, 5, 64, 4096, 2**20, 2**31, 10**300, 0.5, -0.5, 1e-300, 1e300, math.inf, -math.inf,
    math.nan, "", "x", "4", "../x", "a\0b", [], [None], [1, 2, 3], [[1]], ["x"], {}, {"a": 1},
)  # fmt: skip
SECONDS, BYTES = 60, 3 << 30  # a hang and a flood, not measures of speed


def values(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of every value inside a JSON tree; of a long list or table, of the first three."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for count, (key, value) in enumerate(items):
        if len(tree) > 40 and count == 3:
            break
        yield (*path, key)
        yield from values(value, (*path, key))


def mutations(folder: Path) -> Iterator[tuple[Path, tuple, object]]:
    for file in sorted(folder.rglob("*.json")):
        tree = json.loads(file.read_text())
        for path in values(tree):
            before = tree
            for key in path:
                before = before[key]
            for value in HOSTILE:
                if value != before or type(value) is not type(before):
                    yield file, path, value


def mutated(tree: object, path: tuple, value: object) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def run(folder: Path) -> str:
    """What came of it: "ran", or a clear error in one line; anything else goes on as it is."""
    try:
        sora = Sora.from_pretrained(folder, device="cpu")
        size = sora.defaults.size if sora.defaults.size[0] <= 64 else (16, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clip = sora.generate("a red circle", steps=1, size=size, seconds=min(1, sora.defaults.frames) / 8, fps=8)
        assert clip.frames.std() >= 0
        return "ran"
    except CLEAN as error:
        assert isinstance(error, CheckpointError | TooLargeError | FloatingPointError) or str(error), repr(error)
        return f"{type(error).__name__}: {error}"


class Hung(KeyboardInterrupt):
    """Past everything that takes any Exception for a damaged file."""


def hang(number, frame):
    raise Hung(f"not done in {SECONDS} seconds")


def check(folder: Path, chosen: list[tuple[Path, tuple, object]]) -> dict[str, int]:
    """Tries each; returns how many ran and how many did not."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limit[1]))
    failures, told = [], {"ran": 0, "refused": 0}
    try:
        for file, path, value in chosen:
            before = file.read_text()
            tree = json.loads(before)
            mutated(tree, path, value)
            file.write_text(json.dumps(tree))
            signal.alarm(SECONDS)
            try:
                said = run(folder)
                told["ran" if said == "ran" else "refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) and not isinstance(error, Hung):
                    raise
                where = f"{file.relative_to(folder)} {path} = {value!r:.40}"
                failures.append(f"{where}: {type(error).__name__}: {error!s:.200}")
            finally:
                signal.alarm(0)
                file.write_text(before)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, handler)
    assert not failures, f"{len(failures)} of {len(chosen)}:\n" + "\n".join(failures)
    return told


@pytest.fixture
def own(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "own")


def test_hostile_values_in_a_checkpoint_are_refused_or_run(own):
    told = check(own, list(mutations(own))[::23])
    assert told["refused"] > 50 and told["ran"] > 1


def test_the_command_makes_one_line_of_each(sora, own):  # noqa: F811
    tried = set()
    for file, path, value in list(mutations(own))[::197]:
        before = file.read_text()
        tree = json.loads(before)
        mutated(tree, path, value)
        file.write_text(json.dumps(tree))
        code, out, err = sora("generate", "a ring", "--weights", own, "--out", "a.mp4", "--steps", 1, "--seconds", 0.1)
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert (code, len(lines), Path("a.mp4").exists()) in ((0, 0, True), (1, 1, False)), (path, value, err)
        tried.add(code)
        Path("a.mp4").unlink(missing_ok=True)
        file.write_text(before)
    assert 1 in tried


@pytest.mark.slow
def test_every_hostile_value_in_a_checkpoint_is_refused_or_runs(own):
    check(own, list(mutations(own)))


@pytest.mark.slow
def test_every_hostile_value_in_a_wan_directory_is_refused_or_runs(tmp_path):
    folder = make_wan_directory(tmp_path / "wan")
    check(folder, list(mutations(folder)))
