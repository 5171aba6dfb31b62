"""What `make demo` runs: a clip of $PROMPT in out/, then every operation, forward and backward, beside its fp64 oracle,
eager PyTorch and torch.compile.

PROMPT="a blue square bounces" python -m sora_model.demo         # `clip` or `check` behind it: one of the two
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import sora_kernels
from sora_kernels import _dispatch, _library
from sora_kernels._dispatch import Unavailable
from sora_kernels.qknorm_rope import reference as qknorm_rope
from sora_kernels.testing import error_bound, max_error, poison_empty

from .files import make_folder
from .pipeline import Sora
from .terminal import bars, console, error, forgive_encodings, notes, say

PROMPT, SEED = "a blue square passes behind a wall and reappears", 1
SECONDS_A_ROW, COMPILE_BUDGET_S = 0.4, 90.0

B, GRID, D, H, PATCH, C = 2, (5, 16, 16), 192, 6, (1, 2, 2), 24
S = math.prod(GRID)
VIDEO = (1, C, 4, 64, 64)

Case = tuple[dict[str, Any], Callable[..., Any]]
"""(arguments, the lines that a model has without the op)."""
Results = dict[str, Tensor]
"""Outputs and gradients, by name."""


def cases(device: torch.device) -> dict[str, Case]:
    """Every public operation at the sizes of a 256x256 clip in the toy model, in fp32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x, y, row = draw(B, S, D), draw(B, S, D), lambda: draw(B, 1, D)
    heads = lambda: draw(B, S, H, D // H)  # noqa: E731
    video, filters = draw(*VIDEO), draw(C, C, 3, 3, 3) / 25
    plane = draw(C, C, 1, 3, 3) / 15
    rows = dict(shift=row(), scale=row())
    latents, head = draw(B, 8, GRID[0], 2 * GRID[1], 2 * GRID[2]), draw(4 * 8, D) / 14

    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift

    def gate_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate * y
        return x, modulate(x, shift, scale)

    def rotate(
        q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, grid: tuple, across: str
    ) -> tuple[Tensor, Tensor]:
        return qknorm_rope.qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, grid=grid, across=across)

    def squares(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([x.square().sum((2, 3)) for x in (q, k)], 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def embed(video: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(video, weight, stride=PATCH).flatten(2).transpose(1, 2)

    def unpatchify(tokens: Tensor, grid: tuple, patch: tuple, channels: int) -> Tensor:
        split = tokens.unflatten(2, (*patch, channels)).unflatten(1, grid)
        return split.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def finish(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, grid: tuple, patch: tuple) -> Tensor:
        return unpatchify(F.linear(modulate(x, shift, scale), weight), grid, patch, 8)

    def silu(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(F.normalize(x, dim=1) * C**0.5 * weight.view(-1, 1, 1, 1))

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight)

    def gated(x: Tensor, gate: Tensor) -> Tensor:
        return x * (2 * torch.sigmoid(gate)).unsqueeze(-1)

    def to_bytes(video: Tensor) -> Tensor:
        return video.permute(0, 2, 3, 4, 1).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)

    def mark(tile: Tensor, frames: Tensor) -> Tensor:
        (height, width), shown = frames.shape[2:4], frames.flatten(0, 1).float()
        green = shown[..., 1].unsqueeze(1)
        mean, square = (F.avg_pool2d(x, 8).squeeze(1) for x in (green, green * green))
        busy = (square - mean * mean).clamp(min=0).sqrt().div(8).clamp(max=1)
        gain = (1 + busy / 2).repeat_interleave(8, 1).repeat_interleave(8, 2)
        levels = gain * tile.repeat(height // tile.shape[0], width // tile.shape[1])
        return (shown + levels.unsqueeze(-1)).round().clamp(0, 255).to(torch.uint8).view(frames.shape)

    def up(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"), weight, padding=(0, 1, 1))

    def down(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, stride=(1, 2, 2))

    turned = dict(q=heads(), k=heads(), q_weight=draw(D), k_weight=draw(D), grid=GRID, across="width")
    return {
        "norm_modulate": (dict(x=x, **rows), modulate),
        "gate_residual": (dict(x=x, y=y, gate=row()), lambda x, y, gate: x + gate * y),
        "gate_residual_norm_modulate": (
            dict(x=x, y=y, gate=row(), **rows), gate_modulate
        ),
        "qk_norm_rope": (turned, rotate),
        "qk_norm_stats": (dict(q=heads(), k=heads()), squares),
        "patch_embed3d": (dict(video=latents, weight=draw(D, 8, *PATCH) / 6), embed),
        "unpatchify3d": (
            dict(tokens=draw(B, S, 32), grid=GRID, patch=PATCH, channels=8), unpatchify
        ),
        "final_layer": (dict(x=x, **rows, weight=head, grid=GRID, patch=PATCH), finish),
        "spacetime_attention": (
            dict(q=heads(), k=heads(), v=heads()), attend
        ),
        "gate_heads": (dict(x=heads(), gate=draw(B, S, H)), gated),
        "norm_silu": (dict(x=video, weight=draw(C)), silu),
        "causal_conv3d": (dict(x=video, weight=filters), conv),
        "upsample_conv3d": (dict(x=video, weight=plane), up),
        "downsample_conv3d": (dict(x=video, weight=plane), down),
        "video_to_uint8": (dict(video=draw(1, 3, *VIDEO[2:])), to_bytes),
        "embed_watermark": (dict(tile=draw(16, 16), frames=to_bytes(draw(1, 3, *VIDEO[2:]) / 4)), mark),
    }  # fmt: skip


def main(part: str = "") -> None:
    """Makes the clip ("clip"), prints the table ("check"), or both ("").

    Exit code 1 with one line for a bad prompt or part, 2 if an operation is wrong.
    """
    forgive_encodings()
    prompt, out = os.environ.get("PROMPT", "").strip() or PROMPT, console()
    if part not in ("", "clip", "check"):
        error(console(stderr=True), f"the part of the demo must be clip, check or left out for both; got {part!r}")
        sys.exit(1)
    if part != "check":
        try:
            generate(prompt, out)
        except (ValueError, OSError, Unavailable) as failure:
            error(console(stderr=True), failure)
            sys.exit(1)
    sys.exit(2 if part != "clip" and table(out) else 0)


def generate(prompt: str, out: Console) -> None:
    started = time.perf_counter()
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "clip"
    path = Path("out") / f"{name}.mp4"
    make_folder(path.parent)
    sora = Sora.from_pretrained()
    with notes(out), bars(out, transient=True) as progress:
        sora.generate_to(path, prompt, seed=SEED, progress=progress)
    took, made = time.perf_counter() - started, sora.defaults
    say(
        out, f"“{prompt}” → ", Text(str(path), "bold"), f": {made.frames} frames of {made.size[1]}x{made.size[0]}, "
        f"seed {SEED}, in {took:.1f} s on {sora.device} with {_kernels(sora.device)}",
    )  # fmt: skip


def _kernels(device: torch.device) -> str:
    like = torch.empty(0, device=device)
    if _dispatch.choose("norm_modulate", "auto", like) == "reference":
        return "plain PyTorch (impl=reference), which needs nothing compiled"
    return "the kernels of this project"


@dataclass
class Row:
    """One operation: (error, bound) of what comes closest to its bound, and milliseconds, for each direction it has."""

    op: str
    impl: str
    judged: dict[str, tuple[float, float]] = field(default_factory=dict)
    ms: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return not all(off <= bound for off, bound in self.judged.values())


def table(out: Console) -> list[str]:
    """Prints the table and returns the names of operations whose error exceeds its bound."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = Table(box=None, pad_edge=False)
    for column in ("operation", "auto is", "", "error", "ms", "eager", "compile"):
        result.add_column(column, justify="left" if column in ("operation", "auto is", "") else "right", no_wrap=True)
    every, rows = cases(device), []
    drawn = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=out, transient=True)
    # a compiled backward is timed again and again over one graph
    with drawn, torch._functorch.config.patch(donated_buffer=False):
        task = drawn.add_task("checking and timing", total=len(every))
        for row in measure(every, device):
            rows.append(row)
            drawn.update(task, description=f"checking and timing {row.op}", advance=1)
            for way in row.ms:
                result.add_row(*((row.op, row.impl) if way == "fwd" else ("", "")), *_cells(row, way))
    out.print(result)
    compiled = sum("compile" in ms for row in rows for ms in row.ms.values())
    timed = sum(len(row.ms) for row in rows)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    out.print(
        f"\n{len(rows)} operations checked and timed on {device.type}{threads}, in fp32, by themselves:\n"
        f"{B} x {S} tokens of width {D}, video {list(VIDEO)}.\n"
        "error          the largest of an output (fwd) or gradient (bwd) against fp64,\n"
        "               in % of its bound: 2 x the error of eager PyTorch + rounding\n"
        "ms             the median of a call\n"
        "eager, compile their time over ours: 2x means that ours takes half of it;\n"
        f"               {compiled} of {timed} were compiled in the {COMPILE_BUDGET_S:.0f} s given to torch.compile"
    )
    wrong = [row.op for row in rows if row.wrong]
    if wrong:
        say(out, Text("beyond its bound: ", "bold red"), ", ".join(wrong))
    return wrong


def _cells(row: Row, way: str) -> tuple[str | Text, ...]:
    (off, bound), ms = row.judged[way], row.ms[way]
    share = Text(f"{100 * off / bound:.0f}%", "green" if off <= bound else "red")
    ratios = (f"{ms[name] / ms['ours']:.2f}x" if name in ms else "-" for name in ("eager", "compile"))
    return way, share, f"{ms['ours']:.3g}", *ratios


def measure(every: dict[str, Case], device: torch.device) -> Iterator[Row]:
    """Checks every case against the reference in fp64, then times it beside eager and, within the budget, compile."""
    began = time.perf_counter()
    for op, (arguments, eager) in every.items():
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        function, row = getattr(sora_kernels, op), Row(op, _dispatch.choose(op, "auto", first))
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        of_video = op.endswith(("conv3d", "silu"))
        terms = {  # summed into an element of an output, of a gradient
            "fwd": arguments["weight"][0].numel() if op.endswith("conv3d") else 1,
            "bwd": math.prod(VIDEO[2:]) if of_video else B * S,
        }  # fmt: skip
        ways = ("fwd", "bwd") if _library.impls(f"{op}_bwd") else ("fwd",)
        for way in ways:
            exact = run(lambda f=function, **a: f(**a, impl="reference"), wide, way)
            with poison_empty():
                actual = run(function, arguments, way)
            row.judged[way] = judge(actual, exact, run(eager, arguments, way), terms[way])
        candidates = {"ours": function, "eager": eager}
        if time.perf_counter() - began < COMPILE_BUDGET_S and (compiled := compile_quietly(eager, arguments, ways)):
            candidates["compile"] = compiled
        for way in ways:
            calls = {name: timed_call(candidate, arguments, way) for name, candidate in candidates.items()}
            row.ms[way] = interleaved(calls, device)
        yield row


def run(function: Callable[..., Any], arguments: dict[str, Any], way: str) -> Results:
    """Outputs by number (forward), or the gradients of every tensor (backward), of a fixed incoming gradient."""
    if way == "fwd":
        with torch.no_grad():
            return {f"output {i}": value for i, value in enumerate(_several(function(**arguments)))}
    outputs, leaves, grads = _recorded(function, arguments)
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True))


def timed_call(function: Callable[..., Any], arguments: dict[str, Any], way: str) -> Callable[[], object]:
    """The forward alone, or the backward alone over one recorded graph."""
    if way == "fwd":
        return torch.no_grad()(lambda: function(**arguments))
    outputs, leaves, grads = _recorded(function, arguments)
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)


def _recorded(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[tuple[Tensor, ...], Results, list]:
    leaves = {name: v.detach().requires_grad_() for name, v in arguments.items() if isinstance(v, Tensor)}
    outputs = _several(function(**(arguments | leaves)))
    draws = (torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in outputs)
    return outputs, leaves, [draw.to(o.device, o.dtype) for draw, o in zip(draws, outputs, strict=True)]


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def judge(actual: Results, exact: Results, plain: Results, terms: int = 1) -> tuple[float, float]:
    """(error, bound) of what comes closest to its bound; `terms`: values summed into each element. Integers may be one
    off: fp64 may round the other way."""
    pairs = []
    for name, oracle in exact.items():
        bound = error_bound(oracle, plain[name], terms) if plain[name].is_floating_point() else 1.0
        pairs.append((max_error(actual[name], oracle.double()), bound))
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-300))


def compile_quietly(
    function: Callable[..., Any], arguments: dict[str, Any], ways: tuple[str, ...]
) -> Callable[..., Any] | None:
    """`torch.compile` of it, warmed up, or None where the compiler does not work here."""
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    try:
        for way in ways:
            run(compiled, arguments, way)
    except Exception:  # a missing or broken compiler costs a column, not the demonstration
        return None
    return compiled


def interleaved(candidates: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median milliseconds a call, the candidates taking turns."""

    def once(call: Callable[[], Any], calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls * 1e3

    calls = {
        name: max(1, min(100, int(1 / max(once(call, 1), once(call, 1), 1e-3)))) for name, call in candidates.items()
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + SECONDS_A_ROW
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, call in candidates.items():
            times[name].append(once(call, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except KeyboardInterrupt:
        sys.exit(130)
