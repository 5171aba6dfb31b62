"""Reading and writing checkpoints: safetensors for tensors, JSON for settings, and nothing that can run code.

Every file is written as `files.write_atomically` does: a crash leaves the old file or none. Every read is
checked: the header, the exact set of keys, each shape, and that all values are finite. A wrong file raises
`CheckpointError`, which says where, what was expected, what was found and what to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import files
from .alike import octets

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES, FP8 = tuple(_DTYPES.values()), tuple(_FP8.values())
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_CONFIG_BYTES = 4 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class Header(NamedTuple):
    """What a file says of a tensor before its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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


def check_dtypes(dtypes: Mapping[str, Any], where: str, *, also: Sequence[torch.dtype] = ()) -> None:
    """Raises `CheckpointError` that names the first tensor of a dtype that no model here is kept in."""
    for name, dtype in dtypes.items():
        if dtype not in (*DTYPES, *also) and not name.endswith(".comfy_quant"):  # a note in bytes
            raise CheckpointError(
                f"{where}: tensor {name!r} is {dtype}; weights must be of {', '.join(map(str, DTYPES))}: convert them"
            )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises FloatingPointError that names the first tensor with a NaN or an infinity, if there is one."""
    for name, value in tensors.items():
        wide = value.float() if value.dtype in FP8 else value  # of which PyTorch computes nothing in fp8
        if value.is_floating_point() and not torch.isfinite(wide).all():
            raise FloatingPointError(f"{where}: tensor {name!r} holds NaN or infinite values")


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's weights: of their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(octets(value).cpu().numpy())
    return found.hexdigest()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object; anything else raises `CheckpointError`."""
    file = _existing(path)
    if file.stat().st_size > _CONFIG_BYTES:
        raise CheckpointError(f"{file} is {file.stat().st_size} bytes; a config file has at most {_CONFIG_BYTES}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        told = _recognised(file) or f"is not valid JSON ({error}); copy the checkpoint again"
        raise CheckpointError(f"{file} {told}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def read_tensors(path: str | os.PathLike[str], *, also: Sequence[torch.dtype] = ()) -> dict[str, Tensor]:
    """Reads every tensor of a safetensors file onto the CPU; they must be of `DTYPES` or `also`, and finite."""
    with _opened(path) as source:
        state = {name: source.get_tensor(name) for name in source.keys()}
    check_dtypes({name: value.dtype for name, value in state.items()}, os.fspath(path), also=also)
    try:
        check_finite(state, os.fspath(path))
    except FloatingPointError as error:
        raise CheckpointError(f"{error}; the checkpoint is damaged") from None
    return state


def read_header(path: str | os.PathLike[str], *, also: Sequence[torch.dtype] = ()) -> dict[str, Header]:
    """Shape and dtype of every tensor of a safetensors file, from its header; they must be of `DTYPES` or `also`."""
    known = _DTYPES | _FP8
    with _opened(path) as source:
        header = {name: source.get_slice(name) for name in source.keys()}
        dtypes = {name: known.get(part.get_dtype(), part.get_dtype()) for name, part in header.items()}
        shapes = {name: tuple(part.get_shape()) for name, part in header.items()}
    check_dtypes(dtypes, os.fspath(path), also=also)
    return {name: Header(shape, dtypes[name]) for name, shape in shapes.items()}


def read_headers(files: Iterable[Path], *, also: Sequence[torch.dtype] = ()) -> dict[str, Header]:
    """`read_header` of the files that hold one model."""
    return {name: held for file in files for name, held in read_header(file, also=also).items()}


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors of a safetensors file, of any dtype."""
    with _opened(path) as source:
        return list(source.keys())


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What was written as `metadata` of a safetensors file."""
    with _opened(path) as source:
        return source.metadata() or {}


def read_wan_directory(
    path: str | os.PathLike[str], *, also: Sequence[torch.dtype] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads one model's folder in the diffusers layout.

    The folder holds `config.json` and its weights, as one `*.safetensors` file or as shards with an index. Of several
    variants (`*.fp16.safetensors`, ...) the one without a name is read, or the only one. Returns the config and the
    tensors by name. Raises `CheckpointError` if a part is missing or damaged, or if the weights are a pickle, which
    could run code when loaded and is never opened.
    """
    folder = Path(path)
    if folder.suffix.lower() in PICKLES:
        raise CheckpointError(_pickle_reason(folder))
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with config.json and *.safetensors")
    config = read_json(folder / "config.json")
    state: dict[str, Tensor] = {}
    for file in wan_weights(folder):
        part = read_tensors(file, also=also)
        twice = sorted(state.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{file} holds {twice[0]!r} again, which an earlier shard holds already")
        state.update(part)
    return config, state


# NAME[.VARIANT][-00001-of-00002].safetensors, and of such shards NAME[.VARIANT].safetensors.index[.VARIANT].json;
# nothing that begins with a dot, as what macOS puts beside every file does
_WEIGHTS = re.compile(r"[^.].*?(?:\.(?P<variant>[^.]+?))?(?P<shard>-\d+-of-\d+)?\.safetensors")
_INDEX = re.compile(r"[^.].*?(?:\.(?P<variant>[^.]+))?\.safetensors\.index(?:\.(?P<late>[^.]+))?\.json")


def wan_weights(folder: Path) -> list[Path]:
    """The safetensors files to read of a model's folder in the diffusers layout."""
    names, found = sorted(file.name for file in folder.iterdir()), {}
    for pattern in (_INDEX, _WEIGHTS):
        indexed = set(found)
        for match in filter(None, map(pattern.fullmatch, names)):
            groups = match.groupdict()
            variant = groups["variant"] or groups.get("late")
            if not groups.get("shard") and variant not in indexed:
                found.setdefault(variant, []).append(folder / match[0])
    if not found:
        if pickles := [name for name in names if Path(name).suffix.lower() in PICKLES]:
            raise CheckpointError(_pickle_reason(folder / pickles[0]))
        if quantised := [name for name in names if name.lower().endswith(".gguf")]:
            raise CheckpointError(f"{folder / quantised[0]} {_SIGNS[b'GGUF']}")
        raise CheckpointError(
            f"{folder} holds no *.safetensors file, or shards without their index, only {_names(folder)}; "
            "copy the weights there"
        )
    chosen = found.get(None) or sum(found.values(), [])
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder} holds {len(chosen)} safetensors files or indexes, {chosen[0].name} and {chosen[1].name} "
            "among them: keep the one to load"
        )
    if chosen[0].suffix == ".safetensors":
        return chosen
    named = read_json(chosen[0]).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(value, str) for value in named.values()):
        raise CheckpointError(f"{chosen[0]} has no 'weight_map' from tensor names to file names")
    shards = sorted(set(named.values()))
    if any(Path(shard).name != shard or "\0" in shard for shard in shards):
        raise CheckpointError(f"{chosen[0]} names files outside its own folder; it is not to be trusted")
    return [folder / shard for shard in shards]


def read_part(folder: Path, kind: type, config_kind: type) -> Any:
    """`kind(config)` in fp32, of the config.json and the model.safetensors in a folder."""
    config = build(config_kind, read_json(folder / "config.json"), str(folder / "config.json"))
    file = folder / "model.safetensors"
    shapes = {name: held.shape for name, held in read_header(file).items()}
    check_shapes(planned_shapes(kind, config, shapes.values(), str(file)), shapes, str(file))
    module = kind(config).to(torch.float32)
    load_into(module, read_tensors(file), str(file))
    return module.eval()


def planned_shapes(
    kind: type, config: Any, held: Iterable[Sequence[int]], where: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of `kind(config)`; no memory is taken for them.

    Nor is time: a config of more than twice the weights that are `held` raises `CheckpointError` at once.
    """
    numbers = sum(map(math.prod, held))
    if (asked := getattr(config, "parameters", 0)) > 2 * numbers:
        raise CheckpointError(
            f"{where}: the config asks for at least {asked:,} parameters, and the weights are {numbers:,}; "
            "config and weights are of different models"
        )
    with unfilled():
        return {name: tuple(value.shape) for name, value in kind(config).state_dict().items()}


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "div_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """Models that are made inside take no memory: on the meta device, and nothing is drawn for them, for which PyTorch
    imports its compiler there (150 MiB, and as long as torch itself)."""
    with torch.device("meta"), _Undrawn():
        yield


def check_shapes(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises `CheckpointError` that lists missing and unknown tensors or names one misshapen, unless all agree."""
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{where} is a checkpoint of another model: it lacks {len(missing)} of the {len(wanted)} expected tensors"
            f"{listed(missing)} and has {len(unknown)} unknown ones{listed(unknown)}"
        )
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{where}: tensor {name!r} should have the shape {tuple(shape)} that the config asks for, "
                f"but has {tuple(found[name])}; config and weights are of different models"
            )


def check_fits(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """`check_shapes` of a module and what it is to hold."""
    wanted, found = ({name: value.shape for name, value in d.items()} for d in (module.state_dict(), state))
    check_shapes(wanted, found, where)


def check_known(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> list[str]:
    """`check_shapes` for a reader that leaves what it does not know: that is no error, and is returned."""
    check_shapes(wanted, {name: shape for name, shape in found.items() if name in wanted}, where)
    return sorted(found.keys() - wanted.keys())


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copies `state` into `module` (casting to its dtypes) when names and shapes agree exactly.

    Raises `CheckpointError` as `check_shapes`, before anything is changed.
    """
    check_fits(module, state, where)
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
        told = _recognised(file) or (
            f"is not a whole safetensors file: {error}; it is truncated or of another format, so copy or convert it "
            "again"
        )
        raise CheckpointError(f"{file} ({file.stat().st_size} bytes) {told}") from error


_SIGNS = {  # how files begin that are often found in the place of others
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder",
    b"GGUF": "is a GGUF file, whose quantised weights are not read here: take the model's safetensors",
    b"PK\x03\x04": "is a zip archive, as PyTorch's pickles are, which are refused: take the model's safetensors",
    b"<": "is a web page, as a download that failed leaves it: download the file again",
}


def _recognised(file: Path) -> str | None:
    try:
        with file.open("rb") as source:
            start = source.read(64).lstrip()
    except OSError:
        return None
    return next((told for sign, told in _SIGNS.items() if start.startswith(sign)), None)


def _make_folder(path: str | os.PathLike[str]) -> None:
    files.make_folder(Path(path).parent)


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix.lower() in PICKLES:
        raise CheckpointError(_pickle_reason(file))
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder; expected a file")
    if not file.parent.is_dir():
        raise CheckpointError(f"{file} is missing: there is no folder {file.parent}; correct the path")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing (found there: {_names(file.parent)}); copy the checkpoint again")
    return file


def _pickle_reason(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is loaded, and is refused; "
        "convert it to safetensors on a machine that you can spare"
    )


def _names(folder: Path, most: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "nothing"


def listed(names: Sequence[str], most: int = 10) -> str:
    """" ('a', 'b', ...)", or nothing of none."""
    return f" ({', '.join(map(repr, names[:most]))}{', ...' if len(names) > most else ''})" if names else ""
