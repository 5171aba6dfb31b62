"""Write this package as a kernel repository of the Hugging Face Hub:  python -m sora_kernels.export_hub DIR

    DIR/build/<variant>/     the package itself, metadata.json with the digest of its files, and a folder sora_kernels/
                             for releases of `kernels` that look in there
    DIR/torch-ext/, build.toml, README.md      the source as kernel-builder takes it, and the card

Variants: torch-cpu and torch-cuda hold Python, Triton and the reference; where the C++ library is built, as
`python -m sora_kernels.info` says, torch-stable-abi211-cpu-<machine>-linux holds that as well. Each has operators in a
namespace of its own, so that any of them can be loaded beside an installed package. `kernels.get_local_kernel(DIR)`
loads one; to publish, upload DIR as a repository of type kernel. Left out: `integrations`, which import other packages.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import pathlib
import platform
import re
import shutil
import sys

from . import _library

NAME = "sora-kernels"
MODULE = NAME.replace("-", "_")
LICENSE = "Apache-2.0"
OLDEST = "0.17.0"  # release of `kernels`
ABI = "211"  # torch 2.11, the oldest that the compiled libraries serve
GLIBC = (2, 28)  # of manylinux_2_28, which the Hub asks compiled variants for
PACKAGE = pathlib.Path(__file__).resolve().parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "integrations", pathlib.Path(__file__).name)

COMPATIBILITY = '''\
"""For releases of `kernels` that look for the package in here: what is in the folder above, loaded once."""

import importlib.util
import json
import pathlib
import sys

_folder = pathlib.Path(__file__).resolve().parent.parent
_name = json.loads((_folder / "metadata.json").read_text())["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({key: value for key, value in vars(sys.modules[_name]).items() if not key.startswith("__")})
'''
BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = ["cpu", "cuda"]

{hub}[torch-noarch]
"""
CARD = """\
---
license: apache-2.0
library_name: kernels
tags: [kernels]
---
# {name}

{summary}

    kernel = kernels.get_local_kernel(pathlib.Path("here"))    # kernels >= {oldest}
    out = kernel.norm_modulate(x, shift, scale)                # and {functions}

`kernel.layers` has RMSNorm, LayerNorm, NormSiLU and PatchEmbed3d for `kernels.kernelize`.
"""


def export(directory: pathlib.Path, *, version: int = 0, repo_id: str | None = None) -> dict[str, str]:
    """Write the repository to `directory`, which must be empty or not exist. Returns variant -> its id."""
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"export_hub: repo_id must be OWNER/NAME of letters, digits, . _ and -; got {repo_id!r}")
    if version < 0:
        raise ValueError(f"export_hub: version must be 0 or more; got {version}")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"export_hub: DIR must be empty or not exist; {directory} has files: choose another")
    backends = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
    if _library.load_error("cpu") is None:
        backends[f"torch-stable-abi{ABI}-cpu-{platform.machine()}-linux"] = "cpu"
    ids = {name: _variant(directory / "build" / name, backend, version) for name, backend in backends.items()}
    shutil.copytree(PACKAGE, directory / "torch-ext" / MODULE, ignore=LEFT_OUT)
    hub = f'[general.hub]\nrepo-id = "{repo_id}"\n\n' if repo_id else ""
    (directory / "build.toml").write_text(BUILD.format(name=NAME, version=version, license=LICENSE, hub=hub))
    package = sys.modules[__package__]
    functions = ", ".join(name for name in package.__all__ if name.islower() and name != "norm_modulate")
    card = CARD.format(name=NAME, summary=package.__doc__.strip(), oldest=OLDEST, functions=functions)
    (directory / "README.md").write_text(card)
    return ids


def _variant(folder: pathlib.Path, backend: str, version: int) -> str:
    shutil.copytree(PACKAGE, folder, ignore=LEFT_OUT)
    if "stable-abi" in folder.name:
        shutil.copy(PACKAGE / "_cpu.so", folder)
    (folder / MODULE).mkdir()
    (folder / MODULE / "__init__.py").write_text(COMPATIBILITY)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    whole = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items()))
    metadata = {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{whole.hexdigest()[:10]}",  # a Python module, and the namespace of its operators
        "version": version,
        "kernels-minver": OLDEST,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return metadata["id"]


def newest_glibc(library: pathlib.Path) -> tuple[int, ...]:
    """The newest version of glibc that a library asks for."""
    found = re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())
    return max((tuple(map(int, pair)) for pair in found), default=(0, 0))


def main(argv: list[str] | None = None) -> None:
    summary, _, layout = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m sora_kernels.export_hub", description=summary.split(":  ")[0], epilog=layout,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", metavar="DIR", type=pathlib.Path, help="where to; empty, or not there yet")
    parser.add_argument("--version", type=int, default=0, help="the kernel's version on the Hub (0: not yet stable)")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="where build.toml says that it is published")
    arguments = parser.parse_args(argv)
    try:
        ids = export(arguments.directory, version=arguments.version, repo_id=arguments.repo_id)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    for variant, identity in ids.items():
        print(f"{arguments.directory / 'build' / variant}  id {identity}")
    if error := _library.load_error("cpu"):
        print(f"without the C++ library: {error}")
    elif (needs := newest_glibc(PACKAGE / "_cpu.so")) > GLIBC:
        asked, limit = (".".join(map(str, version)) for version in (needs, GLIBC))
        print(f"_cpu.so asks for glibc {asked}, the Hub for at most {limit}: to publish it, build on manylinux_2_28")


if __name__ == "__main__":
    main()
