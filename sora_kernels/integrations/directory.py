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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .patch import class_of, host_of, known, patch_model, patched, unpatch_model
from .report import Report
from .verify import Verification, verify_patch

CONFIG = "config.json"
LAYERS = 1000  # or blocks; with more of a kind no model is made
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

    Raises ValueError where the folder holds no config, no model of a known class, one that its class does not make of
    its config, or broken weights; OSError where `verify` finds no weights in safetensors, the only ones that are read.
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
    dtype = _dtype(folder)
    with FakeTensorMode():
        model = _cast(_made(cls, folder), dtype)
        try:
            inputs = host_of(model).example(model, grid)
            before = traffic(model, *inputs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            before = None
        except Exception as error:  # of the host's, whatever it is that its code trips over
            size = "x".join(map(str, grid))
            raise ValueError(
                f"inspect: a {cls.__name__} of {folder / CONFIG} does not take {size} tokens; {_said(error)}"
            ) from None
        with patched(model) as report:
            after = None if before is None else traffic(model, *inputs)
    verification = None
    if verify:
        real = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
        patch_model(real)
        verification = verify_patch(real)
        if verification.ok:
            unpatch_model(real)
    return Part(name, report, before, after, verification)


def _made(cls: type[nn.Module], folder: Path) -> nn.Module:
    """The model of a config. Its class may stumble over values in any way."""
    config = _read(folder / CONFIG)
    counts = {key: value for key, value in config.items() if "layers" in key or "blocks" in key}
    if many := {key: n for key, value in counts.items() for n in tree_leaves(value) if _above(n)}:
        raise ValueError(f"inspect: {folder / CONFIG} must have at most {LAYERS} layers; got {many}")
    try:
        return cls.from_config(cls.load_config(folder))
    except Exception as error:
        raise ValueError(f"inspect: no {cls.__name__} can be made of {folder / CONFIG}; {_said(error)}") from None


def _above(n: Any) -> bool:
    return isinstance(n, int | float) and n > LAYERS


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in `dtype`, what its host keeps in fp32 aside. `model.to` cannot swap fake parameters."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in model.named_modules():
        for key, p in list(module.named_parameters(recurse=False)):
            if not any(word in f"{name}.{key}" for word in kept):
                setattr(module, key, nn.Parameter(p.to(dtype)))
    return model.eval()


def _configs(folder: Path) -> dict[str, Path]:
    index, own = folder / "model_index.json", folder / CONFIG
    if index.is_file():
        names = filter(str.isidentifier, _read(index))  # nothing outside of the folder
        return {name: path for name in names if (path := folder / name / CONFIG).is_file()}
    if not own.is_file():
        raise ValueError(f"inspect: {folder} must hold a model_index.json or config.json of diffusers; it has neither")
    return {"": own}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"inspect: {path} must be JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"inspect: {path} must be an object of JSON; got {type(content).__name__}")
    return content


def _dtype(folder: Path) -> torch.dtype:
    """What most weights are stored in, by the header of the first file of safetensors; without one, bfloat16."""
    for path in filter(Path.is_file, sorted(folder.glob("[!.]*.safetensors"))):
        kinds = _kinds(path)
        return {"F32": torch.float32, "F16": torch.float16}.get(max(kinds, key=kinds.count), torch.bfloat16)
    return torch.bfloat16


def _kinds(path: Path) -> list[str]:
    """The dtype of each tensor in a file of safetensors."""
    try:
        with safe_open(path, "pt") as file:
            kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"inspect: {path} must be a file of safetensors; {error}") from None
    if not kinds:
        raise ValueError(f"inspect: {path} must hold tensors; it has none")
    return kinds


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
