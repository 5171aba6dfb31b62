"""Whole decodes of the VAE, latents to frames: ours as a stream beside diffusers' AutoencoderKLWan, same weights.

    python -m benchmarks.run --op vae_decode [--shape ID ...]

Correctness first: a short clip in fp64 is the oracle, and what errs more than plain PyTorch may (see
`sora_kernels.testing.error_bound`) gets no figure. Then both decode the same latents in turns. Weights are random. The
FLOPs are those of the convolutions by their definition, bytes the latents, the weights and the frames once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from unittest import mock

import torch
from torch import Tensor

from sora_kernels import testing
from sora_model.stream import Pass
from sora_model.vae import CausalVAE, VAEConfig, own_name

from . import peers, suite, timing

CHECKED = (3, 4, 6)  # the latents on which correctness is judged


@dataclass(frozen=True)
class Case:
    """A VAE and a clip; `grid` is (T, H, W) of its latents."""

    grid: tuple[int, int, int]
    config: VAEConfig = field(default_factory=VAEConfig)

    @property
    def frames(self) -> int:
        return 1 + self.config.temporal_factor * (self.grid[0] - 1)

    def describe(self) -> dict[str, object]:
        _, height, width = (n * self.config.spatial_factor for n in self.grid)
        return asdict(self.config) | {"grid": self.grid, "frames": self.frames, "height": height, "width": width}


CASES = {
    "wan-480p": Case((21, 60, 104)),
    "wan-720p": Case((21, 90, 160)),
    "wan-96": Case((2, 8, 8)),
    "wan-32": Case((5, 8, 8), VAEConfig(base_dim=32)),
    "toy": Case((5, 8, 8), VAEConfig(base_dim=12, z_dim=8, num_res_blocks=1)),  # the shipped checkpoint's sizes
}
DEFAULT = {"cuda": ("wan-480p", "wan-720p"), "cpu": ("toy", "wan-32", "wan-96")}


def ours(vae: CausalVAE, chunk: int) -> Callable[[Tensor], Tensor]:
    def decode(latents: Tensor) -> Tensor:
        return torch.cat(list(vae.decode_stream(latents, chunk=chunk)), 2)

    return decode


def theirs(vae: CausalVAE) -> Callable[[Tensor], Tensor]:
    """diffusers' decoder with our weights."""
    module = peers._import("diffusers", "diffusers")
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(vae.config).items() if v is not None}
    for name, own in (("temperal_downsample", "temporal_downsample"), ("is_residual", "residual")):
        config[name] = config.pop(own)
    patch = config.pop("patch")
    config["patch_size"] = None if patch == 1 else patch
    with torch.device("meta"):
        model = module.AutoencoderKLWan(**config)
    state = dict(vae.state_dict())
    for name, parameter in model.state_dict().items():
        state[name] = state.pop(own_name(name)).reshape(parameter.shape).contiguous()  # as it lays them out
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)
    return lambda latents: model.decode(latents).sample


def measure(case: Case, dtype: torch.dtype, device: torch.device, chunk: int, budget_s: float) -> list[suite.Result]:
    """Ours, named after the implementation of its convolutions, and diffusers."""
    torch.manual_seed(0)
    vae = CausalVAE(case.config).to(device, dtype).requires_grad_(False).eval()
    with torch.no_grad():
        z = torch.randn(1, case.config.z_dim, *CHECKED, device=device, dtype=dtype)
        exact, plain = copy.deepcopy(vae).double(), copy.deepcopy(vae)
        exact.impl = plain.impl = "reference"
        oracle = exact.decode(z.double())
        terms = 27 * max(conv.in_channels for conv in vae.modules() if isinstance(conv, torch.nn.Conv3d))
        bound = testing.error_bound(oracle, plain.decode(z), terms)
        del exact, plain
        latents = torch.randn(1, case.config.z_dim, *case.grid, device=device, dtype=dtype)
        name = suite.our_impls("causal_conv3d", device)[0]
        makers = {name: lambda: ours(vae, chunk), "diffusers": lambda: theirs(vae)}
        results, calls = {}, {}
        for candidate, make in makers.items():
            try:
                decode = make()
                error = testing.max_error(decode(z), oracle)
                verdict = dict(max_error=error, error_bound=bound, error_in="output 0")
                if not error <= bound * (1 if candidate == name else suite.PEER_SLACK):
                    reason = f"wrong: error {error:.3g} exceeds its bound {bound:.3g}"
                    results[candidate] = suite.Result(candidate, "fwd", "failed", reason, **verdict)
                    continue
                calls[candidate] = lambda decode=decode: decode(latents)
                peak = timing.peak_memory(calls[candidate], device)
                results[candidate] = suite.Result(candidate, "fwd", "ok", peak_memory=peak, **verdict)
            except peers.Missing as missing:
                results[candidate] = suite.Result(candidate, "fwd", "unavailable", str(missing))
        times = timing.interleaved(calls, budget_s, device=device, warmup=1)
    video = case.frames * case.config.out_channels * latents[0, 0, 0].numel() * case.config.spatial_factor**2
    weights = [p.numel() for part in (vae.post_quant_conv, vae.decoder) for p in part.parameters()]
    moved = (latents.numel() + sum(weights) + video) * latents.element_size()
    work = dict(bytes=moved, flops=flops(case))
    return [suite.Result(**(vars(r) | dict(stats=times.get(n)) | work)) for n, r in results.items()]


def flops(case: Case) -> int:
    """Of the convolutions of one decode, counted on a pass without values."""
    counted, conv = 0, Pass.conv

    def count(self, x, layer, *args, **kwargs):
        nonlocal counted
        y = conv(self, x, layer, *args, **kwargs)
        counted += 2 * y.numel() * layer.weight[0].numel()
        return y

    with torch.device("meta"), torch.no_grad(), mock.patch.object(Pass, "conv", count):
        CausalVAE(case.config, impl="reference").decode(torch.empty(1, case.config.z_dim, *case.grid))
    return counted
