"""What a module runs in place of its forward, in a form that copies, pickles and the compiler understand."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class Bound:
    """What a module runs in place of its forward: `run(module, *arguments, ...)`.

    `bound.forward`, a method of this object, is put into the module: it is copied and pickled with the module that it
    belongs to, and the compiler, which compares the code of a method, compiles the blocks of a model once. Any other
    callable it would tell from the next block's.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module, *arguments: Any) -> None:
        self.run, self.module, self.arguments = run, module, arguments

    @property
    def forward(self) -> types.MethodType:
        def forward(self: Bound, *args: Any, **kwargs: Any) -> Any:
            return self.run(self.module, *self.arguments, *args, **kwargs)

        forward.__signature__ = inspect.signature(type(self.module).forward)  # pipelines look at the host's
        return types.MethodType(forward, self)


def bound_of(module: nn.Module) -> Bound | None:
    """What `module` runs in place of its forward, where that is ours."""
    bound = getattr(vars(module).get("forward"), "__self__", None)
    return bound if isinstance(bound, Bound) else None


def replicate(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them, whose `forward` runs on the replica's own parameters."""
    replica = type(module)._replicate_for_data_parallel(module)
    if bound := bound_of(replica):
        replica.forward = Bound(bound.run, replica, *bound.arguments).forward
    return replica
