"""What `make demo` runs: a clip of $PROMPT in out/, then every operation beside its fp64 oracle, eager PyTorch and
torch.compile.

PROMPT="a blue square bounces" python -m sora_model.demo
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import sora_kernels
from sora_kernels import _dispatch
from sora_kernels._dispatch import Unavailable
from sora_kernels.qknorm_rope import reference as qknorm_rope
from sora_kernels.testing import error_bound, max_error, poison_empty

from .pipeline import Sora
from .terminal import bars, console, error, forgive_encodings, notes, say

PROMPT = "a red ball bounces around"
SECONDS_PER_OP, COMPILE_BUDGET_S = 0.6, 60.0

B, GRID, D, H, PATCH, C = 2, (5, 16, 16), 192, 6, (1, 2, 2), 24
S = math.prod(GRID)
VIDEO = (1, C, 4, 64, 64)

Case = tuple[dict[str, Any], Callable[..., Any]]
"""(arguments, the lines that a model has without the op)."""


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
        "patch_embed3d": (dict(video=latents, weight=draw(D, 8, *PATCH) / 6), embed),
        "unpatchify3d": (
            dict(tokens=draw(B, S, 32), grid=GRID, patch=PATCH, channels=8), unpatchify
        ),
        "final_layer": (dict(x=x, **rows, weight=head, grid=GRID, patch=PATCH), finish),
        "spacetime_attention": (
            dict(q=heads(), k=heads(), v=heads()), attend
        ),
        "norm_silu": (dict(x=video, weight=draw(C)), silu),
        "causal_conv3d": (dict(x=video, weight=filters), conv),
        "upsample_conv3d": (dict(x=video, weight=plane), up),
        "downsample_conv3d": (dict(x=video, weight=plane), down),
    }  # fmt: skip


def main() -> None:
    """Makes the clip, prints the table. Exit code 1 with one line for a bad prompt, 2 if an operation is wrong."""
    forgive_encodings()
    prompt, out = os.environ.get("PROMPT", "").strip() or PROMPT, console()
    try:
        generate(prompt, out)
    except (ValueError, OSError, Unavailable) as failure:
        error(console(stderr=True), failure)
        sys.exit(1)
    sys.exit(2 if table(out) else 0)


def generate(prompt: str, out: Console) -> None:
    started = time.perf_counter()
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "clip"
    path = Path("out") / f"{name}.mp4"
    path.parent.mkdir(exist_ok=True)
    sora = Sora.from_pretrained()
    with notes(out), bars(out, transient=True) as progress:
        sora.generate_to(path, prompt, progress=progress)
    took = time.perf_counter() - started
    say(out, f"“{prompt}” → ", Text(str(path), "bold"), f" in {took:.1f} s, on {sora.device}")


def table(out: Console) -> list[str]:
    """Prints the table and returns the names of operations whose error exceeds its bound."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    result = Table(box=None, pad_edge=False)
    for column in ("operation", "auto is", "error", "bound", "ms", "eager", "compile"):
        result.add_column(column, justify="left" if column in ("operation", "auto is") else "right", no_wrap=True)
    wrong, began, every = [], time.perf_counter(), cases(device)
    drawn = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=out, transient=True
    )
    with drawn, torch.no_grad():
        task = drawn.add_task("checking and timing", total=len(every))
        for op, (arguments, eager) in every.items():
            drawn.update(task, description=f"checking and timing {op}")
            first = next(value for value in arguments.values() if isinstance(value, Tensor))
            function = getattr(sora_kernels, op)
            wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
            exact = function(**wide, impl="reference")
            with poison_empty():
                actual = function(**arguments)
            terms = arguments["weight"][0].numel() if op.endswith("conv3d") else 1
            off, bound = judge(actual, exact, eager(**arguments), terms)
            if not off <= bound:
                wrong.append(op)
            candidates = {
                "ours": lambda f=function, a=arguments: f(**a),
                "eager": lambda f=eager, a=arguments: f(**a),
            }
            if time.perf_counter() - began < COMPILE_BUDGET_S:
                compiled = compile_quietly(eager, arguments)
                if compiled is not None:
                    candidates["compile"] = lambda f=compiled, a=arguments: f(**a)
            ms = interleaved(candidates, device)
            result.add_row(
                op, _dispatch.choose(op, "auto", first),
                f"{off:.1e}", Text(f"{bound:.1e}", "red" if op in wrong else "green"),
                f"{ms['ours']:.3g}",
                *(f"{ms[name] / ms['ours']:.2f}x" if name in ms else "-" for name in ("eager", "compile")),
            )  # fmt: skip
            drawn.advance(task)
    out.print(result)
    out.print(
        f"\nForward, fp32, {device.type}{threads}; {B} x {S} tokens of width {D}; video {list(VIDEO)}.\n"
        "error: the largest, against fp64; bound: 2 x that of eager PyTorch + rounding.\n"
        "eager, compile: their time over ours; 2x means that ours takes half of it."
    )
    if wrong:
        say(out, Text("beyond its bound: ", "bold red"), ", ".join(wrong))
    return wrong


def judge(actual: Any, exact: Any, plain: Any, terms: int = 1) -> tuple[float, float]:
    """(error, bound) of the output that comes closest to its bound; `terms`: values summed into each element."""
    outputs = zip(*(value if isinstance(value, tuple) else (value,) for value in (actual, exact, plain)), strict=True)
    pairs = ((max_error(a, e), error_bound(e, p, terms)) for a, e, p in outputs)
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-300))


def compile_quietly(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any] | None:
    """`torch.compile` of it, warmed up, or None where the compiler does not work here."""
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    try:
        compiled(**arguments)
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
    end = time.perf_counter() + SECONDS_PER_OP
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, call in candidates.items():
            times[name].append(once(call, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
