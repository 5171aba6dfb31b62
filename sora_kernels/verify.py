"""Does every operation compute the right thing on your own device?  python -m sora_kernels.verify [--device cuda]

Runs every operation in every implementation and dtype that the device can use, forward and backward, and holds output
and gradients to the project's error rule: error against fp64 ≤ 2 × that of plain PyTorch in the same dtype, plus the
rounding nobody can avoid. Two runs must agree bit for bit. Prints the largest share of its bound that each reaches and
exits with 1 where one exceeds it, fails or is not deterministic. `python -m sora_kernels.info` says when that was last
done on this machine.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _dispatch, _library, info
from .attention import reference as attention
from .attention.mode import resolve
from .causal_conv import reference as causal_conv
from .modulation import reference as modulation
from .patchify import reference as patchify
from .qknorm_rope import reference as qknorm_rope
from .testing import error_bound, max_error, outputs_and_grads, poison_empty
from .watermark import reference as watermark

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call: the shapes of its tensors, its other arguments, the formula in plain torch, and how many terms the
    sums of an output and of a gradient have."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    arguments: Mapping[str, object] = field(default_factory=dict)
    terms: int = 1


def _attend(q, k, v, **mode):
    rule = dict(grid=None, grids=None, window=None, stride=1, dilation=1, causal=None)
    rule |= dict(sink=0, text_len=0, text_at="end") | mode
    return attention.spacetime_attention(
        q, k, v, None, *resolve("verify", q.shape[1], k.shape[1], **rule, heads=q.shape[2]), q.shape[-1] ** -0.5
    )[0]


def _cases() -> Iterator[Case]:
    """Odd sizes that meet every mask, and the widths of public models."""
    for S, D in ((21, 136), (40, 1536)):
        x, row = (2, S, D), (2, 1, D)
        tables = dict(shift_table=(D,), scale_table=(D,))
        for norm in ("layer", "rms"):
            shapes = dict(x=x, shift=row, scale=row, weight=(D,), bias=(D,))
            yield Case("norm_modulate", shapes, modulation.norm_modulate, dict(norm=norm), 2 * S)
        yield Case("gate_residual", dict(x=x, y=x, gate=x, gate_table=(D,)), modulation.gate_residual, {}, 2 * S)
        shapes = dict(x=x, y=x, gate=row, shift=row, scale=row, **tables)
        yield Case("gate_residual_norm_modulate", shapes, modulation.gate_residual_norm_modulate, {}, 2 * S)
        chosen, index = shapes | dict.fromkeys(("gate", "shift", "scale"), (3, D)), torch.arange(2 * S).view(2, S) % 3
        arguments = dict(norm="rms", y_norm="rms", index=index)
        yield Case("gate_residual_norm_modulate", chosen, modulation.gate_residual_norm_modulate, arguments, 2 * S)
    for H, E, across in ((3, 40, "head"), (12, 128, "width")):
        width = E if across == "head" else H * E
        shapes = dict(q=(2, 33, H, E), k=(2, 33, H, E), q_weight=(width,), k_weight=(width,))
        arguments = dict(grid=(2, 3, 5), text_len=3, across=across)
        yield Case("qk_norm_rope", shapes, qknorm_rope.qk_norm_rope, arguments, 66 * H)
        yield Case("qk_norm_stats", dict(q=(2, 33, H, E), k=(2, 33, H, E)), qknorm_rope.qk_norm_stats, {}, H * E)
    for C, D, patch in ((3, 72, (1, 2, 2)), (16, 1536, (1, 2, 2))):
        grid, features = (3, 4, 5), C * math.prod(patch)
        video, tokens = (2, C, *(n * p for n, p in zip(grid, patch, strict=True))), (2, 60, features)
        shapes = dict(video=video, weight=(D, C, *patch), bias=(D,), pos=(60, D))
        yield Case("patch_embed3d", shapes, patchify.patch_embed3d, {}, D)
        arguments = dict(grid=grid, patch=patch)
        yield Case("unpatchify3d", dict(tokens=tokens), patchify.unpatchify3d, arguments | dict(channels=C))
        shapes = dict(x=(2, 60, D), shift=(2, 3, D), scale=(2, 3, D), weight=(features, D), bias=(features,))
        yield Case("final_layer", shapes, patchify.final_layer, arguments, D)
    yield Case("video_to_uint8", dict(video=(2, 3, 3, 10, 14)), patchify.video_to_uint8)
    frames = torch.arange(2 * 3 * 21 * 37 * 3).remainder(251).view(2, 3, 21, 37, 3).to(torch.uint8)
    yield Case("embed_watermark", dict(tile=(9, 14)), watermark.embed_watermark, dict(frames=frames))
    rules = (
        {}, dict(window=(3, 3, 5)), dict(window=(2, 2, 3), stride=(2, 2, 3), text_len=7),
        dict(causal="frame", window=(2, 6, 7), sink=1), dict(window=(3, 2, 3), dilation=(1, 2, 2), causal=(0, 1, 0)),
    )  # fmt: skip
    for E, rule in ((64, rules[0]), *((128, rule) for rule in rules)):
        S = 210 + rule.get("text_len", 0)
        rule = dict(grid=(5, 6, 7), **rule)
        shape = (1, S, 2, E)
        yield Case("spacetime_attention", dict(q=shape, k=shape, v=shape), _attend, rule, S)
    for H, E in ((3, 40), (12, 128)):
        yield Case("gate_heads", dict(x=(2, 33, H, E), gate=(2, 33, H)), attention.gate_heads, {}, E)
    for C, N in ((5, 7), (96, 96)):
        x, terms = (1, C, 4, 6, 10), 27 * max(C, 96)
        yield Case("norm_silu", dict(x=x, weight=(C,)), causal_conv.norm_silu, {}, 240)
        y = (1, N, 4, 6, 10)
        shapes = dict(x=x, weight=(N, C, 3, 3, 3), bias=(N,), residual=y, norm_weight=(N,))
        yield Case("causal_conv3d", shapes, causal_conv.causal_conv3d, {}, terms)
        shapes = dict(x=x, weight=(N, C, 1, 3, 3), bias=(N,))
        yield Case("upsample_conv3d", shapes, causal_conv.upsample_conv3d, {}, terms)
        yield Case("downsample_conv3d", shapes, causal_conv.downsample_conv3d, {}, terms)


class _Plain(TorchFunctionMode):
    """The formula without any upcast: what plain PyTorch would compute in the dtype of its inputs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        widens = function is Tensor.float or (function is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()))
        if widens and args[0].dtype in (torch.bfloat16, torch.float16):
            return args[0]
        return function(*args, **kwargs)


def check(case: Case, impl: str, dtype: torch.dtype, device: torch.device) -> float:
    """The largest share of its bound that an output or gradient of this call reaches; infinite where it is wrong.

    Raises `Unavailable` where `impl` does not take the call, and what the kernel raises.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: (torch.randn(shape, generator=generator) * _spread(name, shape)).to(dtype).to(device)
        for name, shape in case.shapes.items()
    }
    arguments = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in case.arguments.items()}
    function = functools.partial(getattr(importlib.import_module(__package__), case.op), **arguments)
    if case.op in ("video_to_uint8", "embed_watermark"):
        return 0.0 if torch.equal(function(**inputs, impl=impl), function(**inputs, impl="reference")) else math.inf
    double = {name: t.double() for name, t in inputs.items()}
    outputs = function(**double, impl="reference")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn(o.shape, generator=generator).to(dtype).to(device) for o in outputs]

    def formula(**tensors):
        with _Plain():
            return case.formula(**tensors, **arguments)

    oracle = outputs_and_grads(functools.partial(function, impl="reference"), double, [g.double() for g in grads])
    baseline = outputs_and_grads(formula, inputs, grads)
    run = functools.partial(function, impl=impl)
    with poison_empty():
        if impl in _library.impls(f"{case.op}_bwd"):
            actual, again = (outputs_and_grads(run, inputs, grads) for _ in range(2))
        else:
            actual, again = ({"output0": run(**inputs)} for _ in range(2))
    if not all(torch.equal(again[name], actual[name]) for name in actual):
        return math.inf
    return max(max_error(actual[n], oracle[n]) / error_bound(oracle[n], baseline[n], case.terms) for n in actual)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """A weight's deviation is such that its products stay near 1."""
    return math.prod(shape[1:]) ** -0.5 if name == "weight" and len(shape) > 1 else 1.0


@dataclass
class Row:
    """What one implementation of one operation reached, dtype -> share of the bound, and its errors."""

    op: str
    impl: str
    shares: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # message -> the first dtype that met it

    @property
    def faults(self) -> list[str]:
        return [f"{self.op} {self.impl} {name}" for name, share in self.shares.items() if not share <= 1]

    def __str__(self) -> str:
        cells = []
        for name in DTYPES:
            share = self.shares.get(name)
            cells.append("–" if share is None else f"{share:.2f}" if share <= 1 else f"FAULT {share:.3g}")
        text = "".join(f"{cell:>12}" for cell in cells)
        direction = "" if self.impl in _library.impls(f"{self.op}_bwd") else "  forward only"
        errors = "".join(f"\n    {name}: {message}" for message, name in self.errors.items())
        return f"{self.op:<28}{self.impl:<10}{text}{direction}{errors}"


def verify(device: str | torch.device, ops: Collection[str] = (), progress: bool = False) -> list[Row]:
    """A row for each implementation that runs on the device of each operation (of `ops`, where given).

    `progress` prints the rows as they come, and after them why other implementations do not run there.
    """
    device, rows, cases, missing = torch.device(device), [], list(_cases()), {}
    for op in dict.fromkeys(case.op for case in cases):
        for impl in _library.impls(f"{op}_fwd") if not ops or op in ops else ():
            row = Row(op, impl)
            for name, dtype in DTYPES.items():
                if reason := _why_not(op, impl, device.type, dtype):
                    missing.setdefault(reason, []).append(op)
                    continue
                for case in (case for case in cases if case.op == op):
                    _add(row, name, case, impl, dtype, device)
            if row.shares:
                rows.append(row)
                if progress:
                    print(row, flush=True)
    if progress and missing:
        print("\nNot run here:")
        for reason, operations in missing.items():
            print(f"  {reason} ({', '.join(dict.fromkeys(operations))})")
    return rows


def _why_not(op: str, impl: str, device: str, dtype: torch.dtype) -> str | None:
    if device == "cpu" and impl in _dispatch.WITH_TRITON:
        return f"{impl} needs a CUDA device: Triton's interpreter says nothing of one"
    return _dispatch.why_not(op, impl, device, dtype)


def _add(row: Row, name: str, case: Case, impl: str, dtype: torch.dtype, device: torch.device) -> None:
    try:
        share = check(case, impl, dtype, device)
    except _dispatch.Unavailable:
        return  # these arguments are none of its own
    except Exception as error:
        share, said = math.inf, str(error).strip().partition("\n")[0]
        row.errors.setdefault(f"{type(error).__name__}: {said}", name)
    row.shares[name] = max(share, row.shares.get(name, 0.0))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sora_kernels.verify", description=__doc__.split("  python")[0])
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default the GPU, where there is one")
    parser.add_argument("--op", action="append", metavar="NAME", help="repeatable; by default every operation")
    arguments = parser.parse_args(argv)
    known = sorted({case.op for case in _cases()})
    if unknown := [op for op in arguments.op or () if op not in known]:
        parser.error(f"--op must be one of {', '.join(known)}; got {unknown[0]!r}")
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device!r} cannot be used: {str(error).strip().splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N; got {arguments.device!r}")
    start = time.monotonic()
    print(f"{info.device_name(device)}: the share of its error bound that each reaches, outputs and gradients\n")
    print(f"{'':<38}" + "".join(f"{name:>12}" for name in DTYPES))
    rows = verify(device, arguments.op or (), progress=True)
    faults = [fault for row in rows for fault in row.faults]
    checked = sum(len(row.shares) for row in rows)
    print(f"\n{checked - len(faults)} of {checked} right, in {time.monotonic() - start:.0f} s.")
    if not arguments.op:
        print(info.record_verification(device, checked, faults))
    if faults:
        print("Beyond the bound, failed or not deterministic:", *faults, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    info.end_with_the_reader()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is written until the end: Ctrl-C needs no page of lines
    sys.exit(main())
