"""Modulation rows as a transformer has them: three of the six rows of one time embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sora_kernels.modulation import reference

from . import peers
from .shapes import Shape
from .suite import Benchmark, Inputs


def _inputs(shape: Shape, dtype: torch.dtype, draw, *, norm: bool, gate: bool) -> Inputs:
    """x (and y) in `dtype`; rows in fp32, as Wan and LTX hold them: views into `[B, rows, 6, D]`."""
    B, rows, D = shape.modulation
    six = draw(B, rows, 6, D, dtype=torch.float32)
    names = (("gate",) if gate else ()) + (("shift", "scale") if norm else ())
    tensors = {"x": draw(B, shape.tokens, D)} | ({"y": draw(B, shape.tokens, D)} if gate else {})
    tensors |= {name: six[:, :, i] for i, name in enumerate(names)}
    if shape.model.table:
        tensors |= {f"{name}_table": draw(D, dtype=torch.float32) for name in names}
    return tensors | ({"norm": shape.model.norm} if norm else {})


def _indexed(shape: Shape, dtype: torch.dtype, draw, **parts: bool) -> Inputs:
    """Two rows a clip: of its first frame, which is given, and of all others."""
    inputs = _inputs(dataclasses.replace(shape, rows="clip"), dtype, draw, **parts)
    x = inputs["x"]
    inputs |= {name: draw(len(x), 2, x.shape[-1], dtype=torch.float32) for name in _MODULATIONS if name in inputs}
    later = torch.arange(shape.tokens, device=x.device) >= shape.tokens // shape.grid[0]
    return inputs | {"index": later.int().expand(len(x), -1)}


def _written_out(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The rows of all tokens, as models select them."""

    def call(*, index, **inputs):
        at = torch.arange(len(index), device=index.device)[:, None], index
        return eager(**{name: t[at] if name in _MODULATIONS else t for name, t in inputs.items()})

    return call


def _normed(shape: Shape, dtype: torch.dtype, draw, **parts: bool) -> Inputs:
    """A norm before the gate too, as Mochi has it."""
    return _inputs(shape, dtype, draw, **parts) | {"y_norm": shape.model.norm}


def _norm_first(x, y, gate, shift, scale, *, y_norm, **inputs):
    return peers.gate_residual_norm_modulate(x, peers.normalised(y, y_norm), gate, shift, scale, **inputs)


def _flops(forward: int, backward: int, shape: Shape, mode: str) -> int:
    """Per element: a norm 6 forward (mean, square, scale) and 9 backward, a modulation or gate 2 and 4."""
    return shape.elements * {"fwd": forward, "bwd": backward}[mode]


_MODULATIONS = ("gate", "shift", "scale")
_ROWS = ("shift", "scale", "shift_table", "scale_table")
_GATE = ("gate", "gate_table")

BENCHMARKS = [
    Benchmark(
        "norm_modulate",
        inputs=partial(_inputs, norm=True, gate=False),
        reference=reference.norm_modulate,
        eager=peers.norm_modulate,
        peers=peers.NORM_MODULATE,
        differentiable=("x", *_ROWS),
        backward_reads=("x", "scale", "scale_table"),
        backward_writes=("x", *_ROWS),
        flops=partial(_flops, 8, 13),
        outputs=1,
    ),
    Benchmark(
        "gate_residual",
        inputs=partial(_inputs, norm=False, gate=True),
        reference=reference.gate_residual,
        eager=peers.gate_residual,
        peers=peers.GATE_RESIDUAL,
        differentiable=("x", "y", *_GATE),
        backward_reads=("y", *_GATE),
        backward_writes=("y", *_GATE),  # x's gradient is the incoming one, as it is
        flops=partial(_flops, 2, 4),
        outputs=1,
    ),
    Benchmark(
        "gate_residual_norm_modulate",
        inputs=partial(_inputs, norm=True, gate=True),
        reference=reference.gate_residual_norm_modulate,
        eager=peers.gate_residual_norm_modulate,
        peers=peers.GATE_RESIDUAL_NORM_MODULATE,
        differentiable=("x", "y", *_GATE, *_ROWS),
        backward_reads=("x", "y", *_GATE, "scale", "scale_table"),
        backward_writes=("x", "y", *_GATE, *_ROWS),
        flops=partial(_flops, 10, 17),
        outputs=2,
    ),
]
BENCHMARKS += [
    dataclasses.replace(
        benchmark, variant="index", inputs=partial(_indexed, **benchmark.inputs.keywords),
        eager=_written_out(benchmark.eager), peers={},
        backward_reads=(*benchmark.backward_reads, "index"),
    )
    for benchmark in BENCHMARKS
] + [
    dataclasses.replace(
        BENCHMARKS[-1], variant="y_norm", inputs=partial(_normed, norm=True, gate=True), eager=_norm_first, peers={},
        flops=partial(_flops, 16, 26),
    )
]  # fmt: skip
