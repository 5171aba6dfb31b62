"""What runs here, and why the rest does not:  python -m sora_kernels.info [--json].

Prints versions, devices, CPU features, the compiled libraries and, for every op and implementation, `usable` or the
exact reason. Needs torch only, and works without triton, without compiled libraries and without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import signal
from pathlib import Path

import torch

from . import _dispatch, _library

LIBRARIES = ("cpu", "cuda")


def collect() -> dict[str, object]:
    """Everything the command prints, as plain data."""
    importlib.import_module(__package__)  # registers the ops
    devices = _devices()
    return {
        "versions": _versions(),
        "settings": _settings(),
        "devices": devices,
        "verified": {device["name"]: last_verification(device["name"]) for device in devices},
        "cpu": _cpu(),
        "libraries": {f"_{name}.so": _library_state(name) for name in LIBRARIES} | {"_C": _module_state()},
        "ops": {device["type"]: _ops(device["type"]) for device in devices},
    }


def _versions() -> dict[str, str | None]:
    def version(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "sora-kernels": importlib.import_module(__package__).__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
    }


def _settings() -> list[str]:
    """The variables that choose what runs, where they are set, and why one cannot be followed."""
    impl, isa = _dispatch.FORCED, os.environ.get("SORA_KERNELS_CPU_ISA")
    known = "" if impl in _dispatch.IMPLS else f": expected {', '.join(_dispatch.IMPLS)}"
    lines = [f"SORA_KERNELS_IMPL={impl}{known}"] if impl != "auto" else []
    return [*lines, _library.setting_error() or f"SORA_KERNELS_CPU_ISA={isa}"] if isa else lines


def _devices() -> list[dict[str, object]]:
    devices: list[dict[str, object]] = [{"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "type": "cuda",
                    "name": device.name,
                    "architecture": f"sm_{device.major}{device.minor}",
                    "memory_gib": round(device.total_memory / 2**30, 1),
                }
            )
    return devices


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _verified_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sora_kernels" / "verified.json"


def last_verification(name: str) -> dict[str, object] | None:
    """What `python -m sora_kernels.verify` last found on the device of this name; None: never, or nothing legible."""
    try:
        return json.loads(_verified_file().read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record_verification(device: torch.device, checked: int, faults: list[str]) -> str:
    """Keep what was found, and say where; where nothing can be kept, say why."""
    path, name = _verified_file(), device_name(device)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        records = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError):
        records = {}
    entry = {"date": now, "checked": checked, "faults": faults, "versions": _versions()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps((records if isinstance(records, dict) else {}) | {name: entry}, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        return f"Not kept for `python -m sora_kernels.info`: {error}"
    return f"Kept in {path} for `python -m sora_kernels.info`."


def _verification_text(entry: dict | None, versions: dict) -> str:
    if entry is None:
        return "never: run python -m sora_kernels.verify"
    right, then = entry["checked"] - len(entry["faults"]), entry["versions"]
    changed = [f"{name} {then.get(name)}" for name, version in versions.items() if then.get(name) != version]
    text = f"{entry['date'][:10]}: {right} of {entry['checked']} right"
    text += f"; FAULTS: {', '.join(entry['faults'])}" if entry["faults"] else ""
    return text + (f"; with {', '.join(changed)} then: run python -m sora_kernels.verify again" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _module():
    try:
        return importlib.import_module("._C", __package__)
    except ImportError:
        return None


def _cpu() -> dict[str, object]:
    module = _module()
    features = sorted(name for name, present in module.cpu_features().items() if present) if module else None
    state: dict[str, object] = {"features": features}
    if error := _library.setting_error():
        state["kernels_use"] = f"nothing: {error}"
    elif _library.load_error("cpu") is None:
        state["kernels_use"] = _call(_path("cpu"), "sora_kernels_cpu_isa")
    return state


def _path(name: str) -> Path:
    return Path(__file__).with_name(f"_{name}.so")


def _call(path: Path, function: str) -> str:
    entry = getattr(ctypes.CDLL(str(path)), function)
    entry.restype = ctypes.c_char_p
    return entry().decode()


def _library_state(name: str) -> dict[str, object]:
    if error := _library.load_error(name):
        return {"loaded": False, "reason": error}
    return {"loaded": True, "build": json.loads(_call(_path(name), "sora_kernels_build_info"))}


def _module_state() -> dict[str, object]:
    try:
        module = importlib.import_module("._C", __package__)
    except ImportError as error:
        return {"loaded": False, "reason": str(error)}
    return {"loaded": True, "build": module.build_info()}


def _ops(device: str) -> dict[str, dict[str, dict[str, str]]]:
    """op -> implementation -> {"forward": "usable" or the reason, "backward": ...}."""
    table: dict[str, dict[str, dict[str, str]]] = {}
    for forward, implementations in _library.ops().items():
        op = forward.removesuffix("_fwd")
        if op == forward:
            continue
        table[op] = {
            implementation: {
                "forward": _dispatch.why_not(op, implementation, device) or "usable",
                "backward": _dispatch.why_not(op, implementation, device, grad=True) or "usable",
            }
            for implementation in implementations
        }
    return table


def _print_text(state: dict) -> None:
    print("versions   ", "  ".join(f"{name} {value or 'not installed'}" for name, value in state["versions"].items()))
    for line in state["settings"]:
        print("settings   ", line)
    for device in state["devices"]:
        print("device     ", "  ".join(str(value) for value in device.values()))
    for name, entry in state["verified"].items():
        print("verified   ", f"{_verification_text(entry, state['versions'])}  ({name})")
    features = state["cpu"]["features"]
    print("cpu        ", " ".join(features) if features is not None else "features unknown: _C is not built")
    if "kernels_use" in state["cpu"]:
        print("            the C++ kernels run on", state["cpu"]["kernels_use"])
    for name, library in state["libraries"].items():
        detail = library.get("reason") or ", ".join(f"{k} {v}" for k, v in library["build"].items() if k != "library")
        print(f"{name:<12}", "loaded:" if library["loaded"] else "not loaded:", detail)
    for device, ops in state["ops"].items():
        print(f"\non {device}")
        for op, implementations in ops.items():
            print(f"  {op}")
            for implementation, modes in implementations.items():
                line = modes["forward"]
                if modes["backward"] != line:
                    line += f"; backward: {modes['backward'].removesuffix(', and gradients were asked for')}"
                print(f"    {implementation:<10} {line}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sora_kernels.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    arguments = parser.parse_args(argv)
    state = collect()
    if arguments.json:
        print(json.dumps(state, indent=2))
    else:
        _print_text(state)


def end_with_the_reader() -> None:
    """For programs: end without a word, as others do, when what reads the output (head, a pager) has ended."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    end_with_the_reader()
    main()
