"""What `patch_model` gains: diffusers' Wan transformer patched and not, step by step and whole, in one interleaved run.

    python -m benchmarks.patched [--case ID ...] [--dtype fp32|bf16] [--budget S] [--device cpu|cuda] [--json FILE]
    python -m benchmarks.patched --report FILE        the table of a recorded run, as Markdown

Each candidate is the same model with other steps brought in, one by one and all of them, eager and by `torch.compile`
of each block; forward, and forward with backward. `verify_patch` comes first: a patch that does not agree gets no
figure. Weights are random. Rows carry the machine; ratios are of medians, above 1 where the patched model is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

from sora_kernels.info import end_with_the_reader
from sora_kernels.integrations import patch_model, verify_patch

from . import machine, peers, run, timing

CASES: dict[str, tuple[dict[str, int], tuple[int, int, int]]] = {  # config and grid of tokens
    "toy": (dict(num_layers=2, num_attention_heads=3, attention_head_dim=64, ffn_dim=512, text_dim=64), (5, 8, 8)),
    "wan1.3b-width": (dict(num_layers=1, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960), (5, 15, 26)),
}
BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
STEPS: dict[str, Any] = {  # what is brought in
    "host": (),
    "adaLN chain": BLOCK,
    "qk_norm_rope": ("qk_norm_rope",),
    "and attention": ("qk_norm_rope", "spacetime_attention"),
    "patch_embed3d, final_layer": ("patch_embed3d", "final_layer"),
    "all": "all",
}


def measure(name: str, dtype: torch.dtype, device: torch.device, budget_s: float) -> Iterator[dict[str, Any]]:
    """Rows of one case: mode, pass, what was brought in, and its time."""
    from sora_kernels.integrations.diffusers import wan

    config, grid = CASES[name]
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # all candidates share the code of one class
    host = peers._import("diffusers", "diffusers").WanTransformer3DModel(**config).to(device, dtype).eval()
    inputs = wan.example(host, grid)
    for compiled in (False, True):
        models = {step: _prepared(host, ops, compiled) for step, ops in STEPS.items()}
        for direction, call in (("fwd", _forward), ("fwd + bwd", _training)):
            calls = {step: _bound(call, model, inputs) for step, model in models.items()}
            times = timing.interleaved(calls, budget_s, device=device, warmup=2)
            for step, stats in times.items():
                yield {
                    "case": name, "dims": config | {"grid": grid}, "dtype": str(dtype).removeprefix("torch."),
                    "mode": "compiled blocks" if compiled else "eager", "pass": direction, "step": step,
                    "p20_us": stats.p20 * 1e6, "p50_us": stats.p50 * 1e6, "p80_us": stats.p80 * 1e6,
                    "samples": stats.samples, "speedup": times["host"].p50 / stats.p50,
                }  # fmt: skip


def _prepared(host: nn.Module, ops: Any, compiled: bool) -> nn.Module:
    model = copy.deepcopy(host)
    if ops:
        patch_model(model, ops)
        if not compiled and not (verification := verify_patch(model)).ok:
            raise SystemExit(f"{ops}: the patched model does not agree with the host\n{verification}")
    for block in model.blocks if compiled else ():
        block.compile()
    return model


def _bound(call: Callable[..., None], model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
    return lambda: call(model, inputs)


@torch.no_grad()
def _forward(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    model(*inputs, return_dict=False)


def _training(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    model(*inputs, return_dict=False)[0].square().mean().backward()
    model.zero_grad(set_to_none=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of the host, and how many times as fast each step makes it."""
    steps = [step for step in STEPS if step != "host"]
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["case"], row["dtype"], row["mode"], row["pass"]), {})[row["step"]] = row
    lines = [f"| case | dtype | mode | pass | host, ms | {' | '.join(steps)} |", "|---" * (5 + len(steps)) + "|"]
    for key, by_step in found.items():
        cells = [*key, f"{by_step['host']['p50_us'] / 1e3:.1f}", *(f"{by_step[s]['speedup']:.2f}×" for s in steps)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patched", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds a comparison (default 10)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="append one line per row")
    parser.add_argument("--report", metavar="FILE", type=Path, help="the table of a recorded run")
    args = parser.parse_args(argv)
    if args.report:
        try:
            print(table([json.loads(line) for line in args.report.read_text(encoding="utf-8").splitlines()]))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--report {args.report}: expected rows that --json has written; {error}")
        return 0
    if not args.budget > 0 or (args.threads is not None and args.threads < 1):
        parser.error("--threads: expected at least 1; --budget: expected seconds > 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = run._device(args.device)
    except run.BadRequest as error:
        parser.error(str(error))
    dtype = run.DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    facts, rows = machine.facts(device), []
    for name in args.case:
        for row in measure(name, dtype, device, args.budget):
            rows.append(row | facts)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    end_with_the_reader()
    sys.exit(main())
