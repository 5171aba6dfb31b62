"""What every door into another library has in common."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from sora_kernels import integrations

FOLDER = pathlib.Path(integrations.__file__).parent
DOORS = {  # file -> the packages that it opens
    "comfy_kitchen": ("comfy_kitchen",),
    "comfyui": ("comfy",),
    "diffusers_attention": ("diffusers",),
    "lightx2v": ("lightx2v",),
    "ltx_core": ("ltx_core",),
    "sglang": ("sglang",),
    "yunchang": ("yunchang",),
}


def test_every_door_is_named_where_they_are_looked_for():
    assert ", ".join(DOORS) in integrations.__doc__.replace("\n", " ")


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_short_and_begins_with_its_use(door):
    lines = (FOLDER / f"{door}.py").read_text().splitlines()
    assert len(lines) < 150
    example = [line for line in lines[1:8] if line.startswith("    ")]
    assert len(example) == 3 and any(f"integrations import {door}" in line or door in line for line in example)


def test_importing_the_doors_imports_none_of_the_libraries():
    script = f"""
import importlib, sys
for door in {list(DOORS)}:
    importlib.import_module("sora_kernels.integrations." + door)
hosts = {sorted({host for hosts in DOORS.values() for host in hosts})}
loaded = [host for host in hosts if host in sys.modules]
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
