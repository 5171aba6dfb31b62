"""Sums of a hundred thousand values in the C++ kernels: as near to fp64 as PyTorch's, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sora_kernels import final_layer, gate_residual_norm_modulate, norm_modulate, norm_silu, patch_embed3d, qk_norm_rope
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

N = 100_003


def normed(x, weight, norm):
    plain = F.rms_norm if norm == "rms" else lambda *args: F.layer_norm(*args[:3], None, args[3])
    return plain(x, x.shape[-1:], weight, 1e-6)


def turned(x, cos, sin):
    """The first channels of each head, in interleaved pairs."""
    a, b = x[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (t[None, :, None].to(x.dtype) for t in (cos, sin))
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([rotated, x[..., rotated.shape[-1] :]], -1)


def modulation(norm):
    def plain(x, shift, scale):
        return normed(x, None, norm) * (1 + scale) + shift

    def ours(x, shift, scale):
        return norm_modulate(x, shift, scale, norm=norm, impl="cpu")

    return ours, plain, dict(x=torch.randn(1, 3, N), shift=torch.randn(1, 1, N), scale=torch.randn(1, 1, N))


def gated(norm):
    def plain(x, y, gate, scale):
        x = x + gate * y
        return x, normed(x, None, norm) * (1 + scale)

    def ours(x, y, gate, scale):
        return gate_residual_norm_modulate(x, y, gate, None, scale, norm=norm, impl="cpu")

    return ours, plain, {name: torch.randn(1, 3, N) for name in ("x", "y", "gate", "scale")}


def heads(norm, across, H, E, rotate):
    angles = torch.randn(2, 4)
    freqs = (angles.cos(), angles.sin()) if rotate else None

    def plain(q, weight):
        x = normed(q if across == "head" else q.flatten(2), weight, norm).view(q.shape)
        return turned(x, *freqs) if freqs else x

    def ours(q, weight):
        settings = dict(norm=norm, across=across, freqs=freqs, impl="cpu")
        return qk_norm_rope(q, q.detach(), q_weight=weight, k_weight=weight.detach(), **settings)[0]

    return ours, plain, dict(q=torch.randn(1, 2, H, E), weight=torch.randn(E if across == "head" else H * E))


def channels(memory_format):
    def plain(x, weight):
        return F.silu(normed(x.movedim(1, -1), weight, "rms").movedim(-1, 1))

    def ours(x, weight):
        return norm_silu(x, weight, impl="cpu")

    x = torch.randn(1, N, 1, 1, 3).contiguous(memory_format=memory_format)
    return ours, plain, dict(x=x, weight=torch.randn(N))


def final():
    def plain(x, scale, weight):
        return F.linear(normed(x, None, "layer") * (1 + scale), weight).mT.reshape(1, 4, 3, 1, 1)

    def ours(x, scale, weight):
        return final_layer(x, None, scale, weight, grid=(3, 1, 1), patch=(1, 1, 1), impl="cpu")

    weight = torch.randn(4, N) / N**0.5
    return ours, plain, dict(x=torch.randn(1, 3, N), scale=torch.randn(1, 1, N), weight=weight)


def clips():
    def plain(video, weight, pos):
        return F.conv3d(video, weight).flatten(2).mT + pos

    def ours(video, weight, pos):
        return patch_embed3d(video, weight, pos=pos, impl="cpu")

    return ours, plain, dict(video=torch.randn(N, 2, 1, 1, 1), weight=torch.randn(4, 2, 1, 1, 1), pos=torch.randn(1, 4))


CASES = {
    "norm_modulate layer": partial(modulation, "layer"),
    "norm_modulate rms": partial(modulation, "rms"),
    "gate_residual_norm_modulate layer": partial(gated, "layer"),
    "gate_residual_norm_modulate rms": partial(gated, "rms"),
    **{
        f"qk_norm_rope {norm}, {across} of {H} x {E}{', turned' * turn}": partial(heads, norm, across, H, E, turn)
        for norm in ("rms", "layer")
        for across, H, E, turn in (
            ("head", 1, N, False), ("head", 1, N, True), ("width", 3, N // 3, False), ("width", N // 8, 8, True),
        )
    },
    "norm_silu, channels first": partial(channels, torch.contiguous_format),
    "norm_silu, channels last": partial(channels, torch.channels_last_3d),
    "final_layer": final,
    "patch_embed3d, clips": clips,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_long_sums_are_as_near_to_fp64_as_pytorchs(case, require):
    require("norm_modulate", "cpu", grad=True)
    check(case)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_long_sums_on_each_instruction_set(isa, require):
    require("norm_modulate", "cpu", grad=True)
    script = "import test_long_sums as t\nfor case in t.CASES: t.check(case)"
    environment = os.environ | {"SORA_KERNELS_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "this CPU supports no more than" in run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stderr


def check(case: str) -> None:
    torch.manual_seed(0)
    ours, plain, inputs = CASES[case]()
    outputs = plain(**inputs)
    grads = [torch.randn_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    actual, baseline = (outputs_and_grads(f, inputs, grads) for f in (ours, plain))
    oracle = outputs_and_grads(plain, {n: t.double() for n, t in inputs.items()}, [g.double() for g in grads])
    for name in oracle:
        terms = N if name == "grad weight" and case.startswith("patch_embed3d") else 1
        assert_matches_oracle(actual[name], oracle[name], baseline[name], f"{case}: {name}", terms)
