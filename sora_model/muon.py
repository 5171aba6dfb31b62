"""Muon: momentum made orthogonal, for the matrices in the middle of a transformer; AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = 3.4445, -4.7750, 2.0315  # of Jordan 2024: singular values of 0 to 1 come near 1 in five steps


class Muon(torch.optim.AdamW):
    """AdamW with the same learning rate for `parameters`, and for `matrices`

        m ← momentum·m + (1 − momentum)·g
        U = orthogonal((1 − momentum)·g + momentum·m)          by Newton-Schulz: its singular values near 1
        p ← p − lr·(weight_decay·p + 0.2·√max(rows, columns)·U)

    so that the mean square of an update is that of AdamW (Jordan et al. 2024; scaled as in arXiv:2502.16982).
    PyTorch's own multiplies in bfloat16, thirty times as slow as fp32 on a CPU without products of it; here `dtype`
    says in what, and matrices of one shape are multiplied together. Of a sharded one every rank does the whole and
    keeps its part. Deterministic.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        matrices: Iterable[nn.Parameter],
        *,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        **adamw: Any,
    ) -> None:
        super().__init__(parameters, **adamw)
        self.momentum, self.dtype, self.shapes = momentum, dtype, {}
        for matrix in matrices:
            rows, columns = matrix.shape
            self.shapes.setdefault((min(rows, columns), max(rows, columns)), []).append(matrix)
            self.state[matrix] = {"momentum": torch.zeros_like(matrix)}

    def kept(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The names of what is kept of a parameter, in the optimiser's state after a step."""
        return ("momentum",) if "momentum" in self.state.get(parameter, ()) else ("step", "exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        group = self.param_groups[0]
        for (_, longer), matrices in self.shapes.items():
            updates = []
            for matrix in matrices:
                moment = self.state[matrix]["momentum"].lerp_(matrix.grad, 1 - self.momentum)
                update = matrix.grad.lerp(moment, self.momentum)
                update = update.full_tensor() if hasattr(update, "full_tensor") else update
                updates.append(update.T if _tall(matrix) else update)
            for matrix, update in zip(matrices, orthogonal(torch.stack(updates).to(self.dtype)), strict=True):
                update = update.T if _tall(matrix) else update
                if hasattr(matrix, "full_tensor"):
                    from torch.distributed.tensor import distribute_tensor  # seconds, for who needs none of it

                    update = distribute_tensor(update, matrix.device_mesh, matrix.placements, src_data_rank=None)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * 0.2 * longer**0.5)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices `[n, rows, columns]`, rows <= columns, with their singular values brought near 1 (0.7 to 1.2)."""
    a, b, c = _QUINTIC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]
