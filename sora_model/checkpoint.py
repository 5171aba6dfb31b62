"""Reading and writing checkpoints: safetensors for tensors, JSON for settings, and nothing that can run code.

Every file is written as `files.write_atomically` does: a crash leaves the old file or none. Every read is
checked: the header, the exact set of keys, each shape, and that all values are finite. A wrong file raises
`CheckpointError`, which says where, what was expected, what was found and what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import files

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_CONFIG_BYTES = 4 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically, in a folder that is made where it is missing."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    _make_folder(path)
    files.write_bytes(path, text.encode())


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically, in a folder that is made where it is missing.

    Tensors are made contiguous and moved to the CPU. Values that are not finite, which `read_tensors` would refuse,
    raise FloatingPointError, and nothing is written.
    """
    check_finite(tensors, f"cannot write {os.fspath(path)!r}")
    _make_folder(path)
    with files.write_atomically(path) as part, files.naming(path):
        try:
            whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(whole, part, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise files.WriteError(f"cannot write {os.fspath(path)!r}: {error}") from error


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises FloatingPointError that names the first tensor with a NaN or an infinity, if there is one."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FloatingPointError(f"{where}: tensor {name!r} holds NaN or infinite values")


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's weights: of their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object; anything else raises `CheckpointError`."""
    file = _existing(path)
    if file.stat().st_size > _CONFIG_BYTES:
        raise CheckpointError(f"{file} is {file.stat().st_size} bytes; a config file has at most {_CONFIG_BYTES}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads every tensor of a safetensors file onto the CPU and checks that its values are finite."""
    with _opened(path) as source:
        state = {name: source.get_tensor(name) for name in source.keys()}
    try:
        check_finite(state, os.fspath(path))
    except FloatingPointError as error:
        raise CheckpointError(f"{error}; the checkpoint is damaged") from None
    return state


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What was written as `metadata` of a safetensors file."""
    with _opened(path) as source:
        return source.metadata() or {}


def read_wan_directory(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads one model's folder in the diffusers layout.

    The folder holds `config.json` and its weights, as one `*.safetensors` file or as shards with a
    `*.safetensors.index.json`. Returns the config and the tensors by name. Raises `CheckpointError` if a part is
    missing or damaged, or if the weights are a pickle, which could run code when loaded and is never opened.
    """
    folder = Path(path)
    if folder.suffix.lower() in PICKLES:
        raise CheckpointError(_pickle_reason(folder))
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with config.json and *.safetensors")
    config = read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        named = read_json(indexes[0]).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
            raise CheckpointError(f"{indexes[0]} has no 'weight_map' from tensor names to file names")
        shards = sorted(set(named.values()))
        if any(Path(shard).name != shard for shard in shards):
            raise CheckpointError(f"{indexes[0]} names files outside its own folder; it is not to be trusted")
        weights = [folder / shard for shard in shards]
    if not weights:
        pickles = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLES)
        if pickles:
            raise CheckpointError(_pickle_reason(pickles[0]))
        raise CheckpointError(f"{folder} holds no *.safetensors file, only {_names(folder)}; copy the weights there")
    if len(weights) > 1 and not indexes:
        raise CheckpointError(f"{folder} holds {len(weights)} safetensors files and no index: keep the one to load")
    state: dict[str, Tensor] = {}
    for file in weights:
        part = read_tensors(file)
        twice = sorted(state.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{file} holds {twice[0]!r} again, which an earlier shard holds already")
        state.update(part)
    return config, state


def check_shapes(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises `CheckpointError` that names the first missing, unknown or misshapen tensor, unless all agree."""
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{where} is a checkpoint of another model: it lacks {len(missing)} of the {len(wanted)} expected tensors"
            f"{_first(missing)} and has {len(unknown)} unknown ones{_first(unknown)}"
        )
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{where}: tensor {name!r} should have the shape {tuple(shape)} that the config asks for, "
                f"but has {tuple(found[name])}; config and weights are of different models"
            )


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies `state` into `module` (casting to its dtypes) when names and shapes agree exactly.

    Raises `CheckpointError` as `check_shapes`, before anything is changed.
    """
    wanted, found = ({name: value.shape for name, value in d.items()} for d in (module.state_dict(), state))
    check_shapes(wanted, found, where)
    module.load_state_dict(dict(state), strict=True)


def build(kind: type, config: Mapping[str, Any], where: str) -> Any:
    """`kind(**config)` for a dataclass of settings; unknown, missing or unfit fields raise `CheckpointError`.

    Keys that begin with an underscore (`_class_name`, ...) are notes and are skipped; lists become tuples.
    """
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if not name.startswith("_")
    }
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} does not describe a {kind.__name__}: {error}") from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A safetensors file, open; what is wrong with it arrives as `CheckpointError`."""
    file = _existing(path)
    try:
        with safe_open(file, framework="pt") as source:
            yield source
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}; "
            "it is truncated or of another format, so copy or convert it again"
        ) from error


def _make_folder(path: str | os.PathLike[str]) -> None:
    with files.naming(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix.lower() in PICKLES:
        raise CheckpointError(_pickle_reason(file))
    if not file.is_file():
        beside = _names(file.parent) if file.parent.is_dir() else "no such folder"
        raise CheckpointError(f"{file} is missing (found there: {beside}); copy the checkpoint again")
    return file


def _pickle_reason(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is loaded, and is refused; "
        "convert it to safetensors on a machine that you can spare"
    )


def _names(folder: Path, most: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "nothing"


def _first(names: list[str]) -> str:
    return f" (first: {names[0]!r})" if names else ""
