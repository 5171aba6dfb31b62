"""What `patch_model` would do for a diffusers pipeline in a local folder, and which traffic that would save.

The models are built from their configs, without memory and without reading weights, under `FakeTensorMode`; their
traffic is that of every operator which PyTorch runs for one call: the bytes of the tensors it reads and writes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .patch import Report, class_of, host_of, known, patch_model, patched, unpatch_model
from .verify import Verification, verify_patch

_PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution", "linear")  # of aten
_TOUCH_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
_PRODUCT_OPS = ("attention", "conv3d", "final_layer", "patch_embed3d")  # parts of names, aten's attention included


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read and written by one call: by products (of matrices, convolutions, attention), and by all else."""

    products: int
    passes: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One model of a pipeline: what would be replaced, its traffic without and with that (None where the forward asks
    for numbers that no tensor without memory has), and how it was verified."""

    name: str
    report: Report
    before: Traffic | None
    after: Traffic | None
    verification: Verification | None

    def __str__(self) -> str:
        lines = [f"{self.name or 'the model'}: {self.report}"]
        if self.before is None:
            lines.append("  bytes of one call: not counted, its forward depends on numbers in its inputs")
        else:
            fewer = self.before.passes / max(self.after.passes, 1)
            lines.append(
                f"  bytes of one call, outside products and attention: {self.before.passes / 1e6:,.1f} MB, patched "
                f"{self.after.passes / 1e6:,.1f} MB ({fewer:.1f} times fewer); of products and attention "
                f"{self.before.products / 1e6:,.1f} MB, patched {self.after.products / 1e6:,.1f} MB"
            )
        verified = "not verified" if self.verification is None else str(self.verification).replace("\n", "\n  ")
        return "\n".join([*lines, f"  {verified}"])


def inspect(folder: str | Path, grid: tuple[int, int, int] = (21, 30, 52), *, verify: bool = False) -> Iterator[Part]:
    """Each model of a diffusers folder that `patch_model` knows; the folder itself may be that of one model.

    grid    tokens of a transformer's input: frames, rows, columns of patches. 21x30x52 is 81 frames of 832x480 for Wan
    verify  load the weights too and run `verify_patch` on small inputs

    Raises ValueError where the folder holds no config, or no model of a known class.
    """
    folder = Path(folder)
    configs = _configs(folder)
    classes = {name: str(_read(path).get("_class_name")) for name, path in configs.items()}
    found = {name: cls for name in configs if (cls := class_of("diffusers", classes[name])) is not None}
    if not found:
        held = ", ".join(f"{name or folder}: {cls}" for name, cls in classes.items())
        raise ValueError(f"inspect: {folder} must hold one of the {known()}; got {held or 'no models'}")
    for name, cls in found.items():
        yield _part(name, cls, configs[name].parent, grid, verify)


def traffic(model: nn.Module, *inputs: Any, **kwargs: Any) -> Traffic:
    """Of one call without gradients, as PyTorch runs it operator by operator."""
    with torch.no_grad(), _Count() as count:
        model(*inputs, **kwargs)
    return Traffic(count.products, count.passes)


def _part(name: str, cls: type[nn.Module], folder: Path, grid: tuple[int, int, int], verify: bool) -> Part:
    with FakeTensorMode():
        model = _cast(cls.from_config(cls.load_config(folder)), _dtype(folder))
        inputs = host_of(model).example(model, grid)
        try:
            before = traffic(model, *inputs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            before = None
        except RuntimeError as error:
            size = "x".join(map(str, grid))
            raise ValueError(f"inspect: a {cls.__name__} of this config does not take {size} tokens; {error}") from None
        with patched(model) as report:
            after = None if before is None else traffic(model, *inputs)
    verification = None
    if verify:
        real = cls.from_pretrained(folder, torch_dtype=_dtype(folder), local_files_only=True)
        patch_model(real)
        verification = verify_patch(real)
        if verification.ok:
            unpatch_model(real)
    return Part(name, report, before, after, verification)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in `dtype`, what its host keeps in fp32 aside. `model.to` cannot swap fake parameters."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in model.named_modules():
        for key, p in list(module.named_parameters(recurse=False)):
            if not any(word in f"{name}.{key}" for word in kept):
                setattr(module, key, nn.Parameter(p.to(dtype)))
    return model.eval()


def _configs(folder: Path) -> dict[str, Path]:
    index, own = folder / "model_index.json", folder / "config.json"
    if index.is_file():
        return {name: path for name in _read(index) if (path := folder / name / "config.json").is_file()}
    if not own.is_file():
        raise ValueError(f"inspect: {folder} must hold a model_index.json or config.json of diffusers; it has neither")
    return {"": own}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"inspect: {path} must be JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"inspect: {path} must be an object of JSON; got {type(content).__name__}")
    return content


def _dtype(folder: Path) -> torch.dtype:
    """What most weights are stored in, by the header of the first file of safetensors; without one, bfloat16."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        return {"F32": torch.float32, "F16": torch.float16}.get(max(kinds, key=kinds.count), torch.bfloat16)
    return torch.bfloat16


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = self.passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        touches_nothing = func.is_view or func.namespace == "prim" or name in _TOUCH_NOTHING
        if not touches_nothing:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            size = sum(map(_size, tensors.values()))
            if name in _PRODUCTS or any(word in name for word in _PRODUCT_OPS):
                self.products += size
            else:
                self.passes += size
        return result


def _size(t: Tensor) -> int:
    """Bytes of the memory behind it: an expanded axis is read once."""
    size = t.element_size()
    for n, stride in zip(t.shape, t.stride(), strict=True):
        size *= n if stride else 1
    return size
