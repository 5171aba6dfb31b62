"""Modulation rows as a transformer has them: three of the six rows of one time embedding."""

from __future__ import annotations

from functools import partial

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


def _flops(forward: int, backward: int, shape: Shape, mode: str) -> int:
    """Per element: a norm 6 forward (mean, square, scale) and 9 backward, a modulation or gate 2 and 4."""
    return shape.elements * {"fwd": forward, "bwd": backward}[mode]


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
