"""Models that no process holds whole: of each weight, drawn alone, a process keeps its part.

    model, draws = build(lambda: SoraDiT(config))    # weights have shapes, and no memory
    sharded.shard(model, ...)                        # FSDP2 says which part of each is whose
    fill(model, draws, device)                       # to the bit the values that the constructor gives

A constructor draws its weights one after the other from one generator. So each is drawn twice: first to move that
generator on, its state before being kept, and again when the part of this process is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

Draw = Callable[[], Tensor]

_aten = torch.ops.aten
_FILLS = _aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar  # whatever was before


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Draw]]:
    """`make()`, what it makes by `torch.empty` being on the meta device, and how each parameter comes by its values."""
    with _Recorded() as recorded:
        module = make()
    return module, {name: recorded.draw(name, value.detach()) for name, value in module.named_parameters()}


@torch.no_grad()
def fill(module: nn.Module, draws: Mapping[str, Draw], device: torch.device) -> None:
    """Gives the parameters their values on a device: of sharded ones the part that is this process', of others all.

    No more than one of them is whole at a time. The generator is left as it is.
    """
    state, now = {}, torch.get_rng_state()
    for name, parameter in module.named_parameters():
        value = draws[name]().to(device)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            part = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local().clone()
            state[name] = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
        else:
            state[name] = value.clone()  # it may be another model's
    torch.set_rng_state(now)
    module.load_state_dict(state, assign=True)


class _Recorded(TorchDispatchMode):
    """Makes empty tensors without memory, and keeps by their storage how each is filled and changed."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, Draw] = {}

    def draw(self, name: str, value: Tensor) -> Draw:
        if not value.is_meta:
            return lambda: value
        if (last := self._last.get(value.untyped_storage()._cdata)) is None:
            raise NotImplementedError(f"{name} is not made by torch.empty and then filled: it cannot be drawn later")
        return lambda: last().view(value.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format:
            empty = func(*args, **kwargs | {"device": torch.device("meta")})
            self._last.pop(empty.untyped_storage()._cdata, None)  # of one that is gone
            return empty
        if func._schema.is_mutable and args[0].is_meta:
            key, target, how = args[0].untyped_storage()._cdata, args[0], args[1:]
            whole = target.is_contiguous() and target.nbytes == target.untyped_storage().nbytes()
            if not whole or any(isinstance(value, Tensor) and value.is_meta for value in how):
                raise NotImplementedError(f"{func} changes a weight that has no memory yet in part, or by another one")
            empty = partial(torch.empty, target.shape, dtype=target.dtype)
            before = empty if func in _FILLS else self._last.get(key, empty)
            state = torch.get_rng_state() if torch.Tag.nondeterministic_seeded in func.tags else None
            if state is not None:
                func(empty(), *how, **kwargs)
            self._last[key] = partial(_changed, func, before, target.shape, state, how, kwargs)
            return target
        return func(*args, **kwargs)


def _changed(
    func: Any, before: Draw, shape: torch.Size, state: Tensor | None, how: tuple, kwargs: Mapping[str, Any]
) -> Tensor:
    value = before().view(shape)
    if state is not None:
        torch.set_rng_state(state)
    return func(value, *how, **kwargs)
