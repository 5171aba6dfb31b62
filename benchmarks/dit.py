"""A transformer block and whole transformers, forward and a training step: ours beside diffusers', same weights.

`eager` and `compile` are diffusers' WanTransformer3DModel or its block, as they are and through `torch.compile` of each
block. A step is a forward, the mean of squares as its loss, and the backward to every weight and to the input; the
optimizer, which all share, is left out. Weights are random. Correctness first: outputs and the input's gradient on a
small clip against fp64, as for operations. FLOPs are those of the matrix products; bytes the weights once, in a step
thrice.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sora_kernels import _dispatch, testing
from sora_model.context import Context
from sora_model.dit import DiTConfig, SoraDiT, own_name
from sora_model.presets import DIT, Grid

from . import peers, suite, timing

MODES = ("fwd", "fwd+bwd")
CHECKED = (2, 3, 4)  # the tokens on which correctness is judged
OPS = ("dit_block", "dit")


@dataclass(frozen=True)
class Case:
    """A preset with so many layers (0: all of its own), at a grid of tokens."""

    model: str
    grid: Grid
    layers: int = 0
    text: int = 512

    def config(self, op: str) -> DiTConfig:
        layers = 1 if op == "dit_block" else self.layers or DIT[self.model].layers
        return dataclasses.replace(DIT[self.model], layers=layers)

    def dims(self, op: str) -> dict[str, object]:
        return asdict(self.config(op)) | {"grid": self.grid, "tokens": math.prod(self.grid), "text": self.text}


CASES = {
    "dit-toy": Case("toy", (5, 8, 8), text=16),
    "dit-wan1.3b-small": Case("wan2.1-1.3b", (5, 8, 13), layers=2),
    "dit-wan1.3b-480p": Case("wan2.1-1.3b", (21, 30, 52)),
    "dit-wan1.3b-step": Case("wan2.1-1.3b", (5, 30, 52)),  # a clip whose activations an eager step can hold
    "dit-wan14b-480p": Case("wan2.1-14b", (21, 30, 52), layers=2),
    "dit-wan2.2-5b": Case("wan2.2-5b", (31, 22, 40), layers=4),
}
DEFAULT = {
    "cuda": {"dit_block": ("dit-wan1.3b-480p", "dit-wan14b-480p"), "dit": ("dit-toy", "dit-wan1.3b-step")},
    "cpu": {"dit_block": ("dit-toy", "dit-wan1.3b-small"), "dit": ("dit-toy",)},
}


Module = tuple[Callable[..., Tensor], list[Tensor]]
"""The call, and the weights that a step differentiates by."""


def ours(model: SoraDiT, op: str, grid: Grid, impl: str) -> Module:
    if op == "dit_block":
        block, mode, context = model.blocks[0], model.config.attention, Context()

        def of_block(x: Tensor, text: Tensor, rows: Tensor) -> Tensor:
            return block(x, rows[:, None], text, None, None, grid, mode, impl, context)

        return of_block, list(block.parameters())
    return lambda x, text, times: model(x, times, text, impl=impl), list(model.parameters())


def theirs(model: SoraDiT, op: str, grid: Grid, compiled: bool) -> Module:
    """diffusers' module with our weights."""
    diffusers = peers._import("diffusers", "diffusers")
    config = model.config
    names = ("patch", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim", "cross_attn_norm", "eps")
    sizes = {"patch_size" if name == "patch" else name: getattr(config, name) for name in names}
    with torch.device("meta"):
        host = diffusers.WanTransformer3DModel(
            num_layers=config.layers, num_attention_heads=config.heads,
            attention_head_dim=config.dim // config.heads, **sizes,
        )  # fmt: skip
    host.rope = type(host.rope)(config.dim // config.heads, config.patch, 1024)  # its tables are no weights
    state = model.state_dict()
    own = {name: state[own_name(name)].reshape(p.shape) for name, p in host.state_dict().items()}
    host.load_state_dict(own, assign=True)
    host.rope.to(next(model.parameters()).device)
    if compiled:
        torch._dynamo.reset()
        for block in host.blocks:
            block.compile()
    if op == "dit":
        return lambda x, text, times: host(x, times, text, return_dict=False)[0], list(host.parameters())
    place = next(model.parameters())
    angles = host.rope(place.new_empty(1, 1, *(n * p for n, p in zip(grid, config.patch, strict=True))))
    block = host.blocks[0]
    return lambda x, text, rows: block(x, text, rows, angles), list(block.parameters())


def inputs(op: str, case: Case, grid: Grid, model: SoraDiT, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(x, text, rows) of a block or (latents, text, times) of a model; the first one's gradient is taken."""
    config, device = model.config, model.head_table.device

    def draw(*size: int) -> Tensor:
        return torch.randn(1, *size, device=device, dtype=dtype)

    if op == "dit_block":
        return draw(math.prod(grid), config.dim), draw(case.text, config.dim), draw(6, config.dim)
    size = (n * p for n, p in zip(grid, config.patch, strict=True))
    times = torch.tensor([500.0], device=device)
    return draw(config.in_channels, *size), draw(case.text, config.text_dim), times


def measure(
    op: str, case: Case, *, modes: tuple[str, ...] = MODES, dtype: torch.dtype, device: torch.device, budget_s: float,
    compiled: bool = False, seed: int = 0,
) -> Iterator[suite.Result]:  # fmt: skip
    """Ours, named after its implementation, diffusers' and, if asked for, diffusers' compiled; in turns."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = SoraDiT(case.config(op))
    nn.init.normal_(model.head.weight, std=0.02)
    model.to_dtype(dtype)
    impl = suite.our_impls("spacetime_attention", device)[0]
    makers = {impl: lambda grid: ours(model, op, grid, impl), "eager": lambda grid: theirs(model, op, grid, False)}
    if compiled:
        makers["compile"] = lambda grid: theirs(model, op, grid, True)
    small = inputs(op, case, CHECKED, model, dtype)
    exact = copy.deepcopy(model).double()
    oracle = _taken(ours(exact, op, CHECKED, "reference"), tuple(x.double() for x in small))
    del exact
    plain = _taken(ours(model, op, CHECKED, "reference"), small)
    bound = {n: testing.error_bound(oracle[n], plain[n], terms=model.config.ffn_dim) for n in oracle}
    given = inputs(op, case, case.grid, model, dtype)
    for mode in (mode for mode in MODES if mode in modes):
        results, calls = {}, {}
        for name, make in makers.items():
            try:
                worst, allowed, where = _worst(_taken(make(CHECKED), small), oracle, bound)
                verdict = dict(max_error=worst, error_bound=allowed, error_in=where)
                if not worst <= allowed * (1 if name == impl else suite.PEER_SLACK):
                    raise suite.Wrong(worst, allowed, where)
                calls[name] = _call(*make(case.grid), given, mode)
                peak = timing.peak_memory(calls[name], device)
                results[name] = suite.Result(name, mode, "ok", peak_memory=peak, **verdict)
            except suite.Wrong as error:
                results[name] = suite.Result(name, mode, "failed", str(error), **error.verdict)
            except (peers.Missing, _dispatch.Unavailable) as error:
                results[name] = suite.Result(name, mode, "unavailable", str(error).splitlines()[0])
            except Exception as error:  # one candidate's crash must not take the others' figures
                calls.pop(name, None)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                results[name] = suite.Result(name, mode, "failed", reason)
        times = timing.interleaved(calls, budget_s, device=device, warmup=1)
        times_over = 3 if mode == "fwd+bwd" else 1
        weights = suite.nbytes(*ours(model, op, case.grid, impl)[1])
        work = dict(bytes=times_over * weights, flops=times_over * flops(op, case))
        for name, result in results.items():
            yield suite.Result(**(vars(result) | dict(stats=times.get(name)) | (work if name in times else {})))


def _call(
    module: Callable[..., Tensor], weights: list[Tensor], given: tuple[Tensor, ...], mode: str
) -> Callable[[], object]:
    x, *rest = given
    if mode == "fwd":
        return torch.no_grad()(lambda: module(x, *rest))
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(module(leaf, *rest).square().mean(), [leaf, *weights], allow_unused=True)


def _taken(module: Module, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    x, *rest = given
    x = x.detach().requires_grad_()
    out = module[0](x, *rest)
    (grad,) = torch.autograd.grad(out.square().mean(), x)
    return {"output 0": out.detach(), "grad of input": grad}


def _worst(actual: dict[str, Tensor], oracle: dict[str, Tensor], bound: dict[str, float]) -> tuple[float, float, str]:
    judged = [(testing.max_error(actual[n], oracle[n]), bound[n], n) for n in oracle]
    return max(judged, key=lambda j: j[0] / max(j[1], 1e-300))


def flops(op: str, case: Case) -> int:
    """Of the matrix products of a forward, attention's included."""
    config, S, L = case.config(op), math.prod(case.grid), case.text
    D, cells = config.dim, math.prod(config.patch)
    block = 2 * S * D * (4 * D + 2 * D + 2 * config.ffn_dim) + 2 * L * 2 * D * D + 4 * S * (S + L) * D
    if op == "dit_block":
        return block
    ends = 2 * S * D * cells * (config.in_channels + config.out_channels)
    text = 2 * L * D * (config.text_dim + D)
    time = 2 * D * (config.freq_dim + D + 6 * D)
    return config.layers * block + ends + text + time


def memory(op: str, case: Case) -> int:
    """Bytes of the weights in fp64 and in fp32 with gradients, and of what a step of eager keeps of every token."""
    config = case.config(op)
    return 20 * config.parameters + 4 * config.layers * math.prod(case.grid) * (30 * config.dim + 4 * config.ffn_dim)
