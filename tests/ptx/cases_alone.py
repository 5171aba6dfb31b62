"""Which gradients are wanted changes no bit of any of them, as compiled code too; run by tests/test_ptx.py.

Where a kernel is compiled without a store, the compiler may lay out its tiles, and add, in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

import sora_kernels as sk
from sora_kernels.testing import poison_empty

Case = tuple[Callable, dict[str, torch.Tensor]]


def rotary(heads: tuple[int, int], E: int, weights: int, **options) -> Case:
    grid = (1, 3, 3)
    inputs = {name: torch.randn(2, 9, n, E) for name, n in zip("qk", heads, strict=True)}
    inputs |= {f"{name}_weight": torch.rand(weights) + 0.5 for name in "qk" if weights}
    if options.get("norm") == "layer":
        inputs |= {f"{name}_bias": torch.randn(weights) for name in "qk"}
    return partial(sk.qk_norm_rope, grid=grid, **options), inputs


def on_ranks(function: Callable, *names: str, **options) -> Case:
    """One rank's heads, and sums of squares of all of them."""
    inputs = dict(q=torch.randn(2, 9, 3, 24), k=torch.randn(2, 9, 1, 24), stats=torch.rand(2, 18) + 50)
    inputs |= dict(q_weight=torch.rand(72) + 0.5, k_weight=torch.rand(24) + 0.5)
    return partial(function, **options), {name: inputs[name] for name in names}


def norm_silu(C: int, size: tuple, order: torch.memory_format, bias: bool = True, **options) -> Case:
    inputs = dict(x=torch.randn(2, C, *size).contiguous(memory_format=order), weight=torch.rand(C) + 0.5)
    return partial(sk.norm_silu, **options), inputs | (dict(bias=torch.randn(C)) if bias else {})


def modulate(names: str, D: int, rows: tuple, **options) -> Case:
    """Of tokens x, y [2, 12, D]; rows of gate, shift and scale; the rest [D]."""
    shapes = dict.fromkeys("xy", (2, 12, D)) | dict.fromkeys(("gate", "shift", "scale"), (*rows, D))
    function = sk.norm_modulate if "y" not in names.split() else sk.gate_residual_norm_modulate
    if "shift" not in names.split():
        function = sk.gate_residual
    return partial(function, **options), {name: torch.randn(shapes.get(name, (D,))) for name in names.split()}


def embed(patch: tuple, D: int, pos: int | None) -> Case:
    grid = (2, 4, 5)
    inputs = dict(video=torch.randn(2, 3, *(n * p for n, p in zip(grid, patch, strict=True))))
    inputs |= dict(weight=torch.randn(D, 3, *patch), bias=torch.randn(D))
    return sk.patch_embed3d, inputs | ({} if pos is None else dict(pos=torch.randn(*(2, 40, D)[-pos:])))


def final(D: int, N: int, rows: tuple, norm: str) -> Case:
    inputs = dict(x=torch.randn(2, 12, D), shift=torch.randn(*rows, D), scale=torch.randn(*rows, D))
    options = dict(grid=(3, 2, 2), patch=(1, 1, 1), norm=norm)
    return partial(sk.final_layer, **options), inputs | dict(weight=torch.randn(N, D), bias=torch.randn(N))


def conv(function: Callable, names: str, **options) -> Case:
    shapes = dict(x=(2, 6, 2, 4, 6), weight=(20, 6, 3, 3, 3), bias=(20,), norm_weight=(20,))
    shapes |= dict(cache=(2, 6, 1 if function is sk.downsample_conv3d else 2, 4, 6), residual=(2, 20, 2, 4, 6))
    return partial(function, **options), {name: torch.randn(shapes[name]) for name in names.split()}


def attend(E: int, **rule) -> Case:
    return partial(sk.spacetime_attention, **rule), {name: torch.randn(1, 40, 2, E) for name in "qkv"}


LAST, FIRST = torch.channels_last_3d, torch.contiguous_format
NORM, BRANCH = "x shift scale weight bias shift_table scale_table", "x y gate shift scale gate_table"
SHIFT = "x shift weight bias shift_table"
INDEX = torch.tensor([[0, 2, 1] * 4, [1, 1, 2] * 4])
CASES = {
    "qk_norm_rope rms split halves": partial(rotary, (3, 1), 128, 128, interleaved=False),
    "qk_norm_rope rms": partial(rotary, (5, 5), 20, 20),
    "qk_norm_rope layer": partial(rotary, (3, 2), 24, 24, norm="layer"),
    "qk_norm_rope across the width": partial(rotary, (2, 2), 40, 80, across="width"),
    "qk_norm_rope no norm": partial(rotary, (2, 3), 16, 0, norm=None),
    "qk_norm_rope on ranks": partial(
        on_ranks, sk.qk_norm_rope, "q", "k", "stats", "q_weight", "k_weight", across="width", width=216, grid=(2, 3, 3),
        tokens=(5, 14),
    ),
    "qk_norm_stats": partial(on_ranks, sk.qk_norm_stats, "q", "k"),
    "norm_silu rms first": partial(norm_silu, 6, (3, 4, 5), FIRST),
    "norm_silu rms without bias": partial(norm_silu, 6, (3, 4, 5), FIRST, bias=False),
    "norm_silu rms last": partial(norm_silu, 6, (3, 4, 5), LAST),
    "norm_silu rms 96": partial(norm_silu, 96, (1, 4, 5), LAST),
    "norm_silu group first": partial(norm_silu, 6, (3, 4, 5), FIRST, norm="group", groups=3),
    "norm_silu group last": partial(norm_silu, 96, (1, 4, 5), LAST, norm="group", groups=8),
    "norm_modulate layer": partial(modulate, NORM, 130, (2, 1)),
    "norm_modulate rms by token": partial(modulate, NORM, 33, (2, 12), norm="rms"),
    "norm_modulate by frame": partial(modulate, NORM, 320, (2, 3)),
    "norm_modulate by index": partial(modulate, NORM, 48, (2, 3), index=INDEX),
    "norm_modulate shift alone by frame": partial(modulate, SHIFT, 48, (2, 3), scale=None),
    "norm_modulate shift alone by index": partial(modulate, SHIFT, 48, (2, 3), scale=None, index=INDEX),
    "gate_residual": partial(modulate, "x y gate gate_table", 130, (2, 1)),
    "gate_residual normed branch": partial(modulate, "x y gate gate_table", 48, (2, 3), y_norm="rms"),
    "gate_residual_norm_modulate by clip": partial(modulate, BRANCH, 130, (2, 1)),
    "gate_residual_norm_modulate normed branch": partial(modulate, BRANCH, 33, (2, 12), norm="rms", y_norm="layer"),
    "gate_residual_norm_modulate by index": partial(modulate, BRANCH, 48, (2, 3), index=INDEX),
    "patch_embed3d": partial(embed, (1, 2, 2), 24, None),
    "patch_embed3d shared pos": partial(embed, (2, 2, 2), 130, 2),
    "patch_embed3d pos by clip": partial(embed, (1, 1, 1), 40, 3),
    "final_layer": partial(final, 130, 12, (2, 1), "layer"),
    "final_layer by frame": partial(final, 48, 24, (2, 3), "rms"),
    "final_layer by token": partial(final, 64, 12, (2, 12), "layer"),
    "gate_heads": lambda: (sk.gate_heads, dict(x=torch.randn(2, 5, 3, 8), gate=torch.randn(2, 5, 3))),
    "causal_conv3d": partial(conv, sk.causal_conv3d, "x weight bias cache residual"),
    "causal_conv3d with a norm": partial(conv, sk.causal_conv3d, "x weight bias residual norm_weight", return_raw=True),
    "causal_conv3d by strides": partial(conv, sk.causal_conv3d, "x weight bias cache", stride=(2, 2, 1)),
    "upsample_conv3d": partial(conv, sk.upsample_conv3d, "x weight bias cache", factor=(1, 2, 2)),
    "downsample_conv3d": partial(conv, sk.downsample_conv3d, "x weight bias cache", factor=(2, 2, 2)),
    "attention": partial(attend, 64),
    "attention in a window": partial(attend, 32, grid=(2, 4, 5), window=(2, 3, 3)),
}  # fmt: skip


def some(names: list[str]) -> Iterator[list[str]]:
    """Each alone, and all but each."""
    yield from ([name] for name in names)
    if len(names) > 2:
        yield from ([name for name in names if name != left] for left in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_has_the_same_bits_whichever_others_are_wanted(case, dtype):
    function, inputs = CASES[case]()
    inputs = {name: t if name == "stats" else t.to(dtype) for name, t in inputs.items()}

    def grads(wanted: list[str]) -> dict[str, torch.Tensor]:
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        outputs = function(**leaves, impl="triton")
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
        seeds = [torch.linspace(-2, 3, out.numel()).sin().view(out.shape).to(dtype) for out in outputs]
        with poison_empty():
            found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], seeds, allow_unused=True)
        return dict(zip(wanted, found, strict=True))

    together = grads(list(inputs))
    for wanted in some(list(inputs)):
        for name, grad in grads(wanted).items():
            assert torch.equal(grad, together[name]), f"{name}, of {', '.join(wanted)}"
