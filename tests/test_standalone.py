"""A family's folder and the files that begin with an underscore, copied elsewhere, are a package of their own."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "sora_kernels"
CALLS = {  # family -> results and the leaves they are differentiated by
    "attention": """
q, k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(3))
result = family.spacetime_attention(q, k, v, grid=(3, 2, 2), causal="frame", impl=impl), (q, k, v)
""",
    "causal_conv": """
x, w = torch.randn(1, 4, 3, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3, 3, requires_grad=True)
gamma = torch.randn(4, requires_grad=True)
result = family.causal_conv3d(family.norm_silu(x, gamma, impl=impl), w, impl=impl), (x, w, gamma)
""",
    "modulation": """
x, y, row = (torch.randn(*s, requires_grad=True) for s in ((2, 6, 8), (2, 6, 8), (2, 1, 8)))
result = sum(family.gate_residual_norm_modulate(x, y, row, row, row, impl=impl)), (x, y, row)
""",
    "patchify": """
video, w = torch.randn(1, 3, 2, 4, 4, requires_grad=True), torch.randn(8, 3, 1, 2, 2, requires_grad=True)
head, row = torch.randn(12, 8, requires_grad=True), torch.randn(8, requires_grad=True)
tokens = family.patch_embed3d(video, w, impl=impl)
result = family.final_layer(tokens, row, row, head, grid=(2, 2, 2), patch=(1, 2, 2), impl=impl), (video, w, head, row)
""",
    "qknorm_rope": """
q, k = (torch.randn(1, 6, 2, 16, requires_grad=True) for _ in range(2))
weight = torch.randn(16, requires_grad=True)
result = sum(family.qk_norm_rope(q, k, q_weight=weight, grid=(1, 2, 3), impl=impl)), (q, k, weight)
""",
    "watermark": """
tile = torch.randn(5, 6, requires_grad=True)
frames = family.embed_watermark(torch.full((1, 2, 9, 10, 3), 99, dtype=torch.uint8), tile, impl=impl)
result = frames + 0 * tile.sum(), (tile,)  # integers have no gradient
""",
}
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib, torch
family = importlib.import_module("borrowed.kernels." + sys.argv[2])
first = None
for impl in sys.argv[3].split():
    torch.manual_seed(0)
    {call}
    out, leaves = result
    found = out, *torch.autograd.grad(out.square().sum(), leaves)
    first = first or found
    torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-4)
ours = [name for name in sys.modules if name.split(".")[0] in ("sora_kernels", "sora_model")]
assert not ours, ours
assert hasattr(torch.ops, "borrowed_kernels") and family.__file__.startswith(sys.argv[1])
"""


def test_every_family_is_called():
    assert sorted(CALLS) == sorted(path.parent.name for path in PACKAGE.glob("*/reference.py"))


@pytest.fixture
def place(tmp_path) -> pathlib.Path:
    """The folder of another package, with the shared files in it."""
    place = tmp_path / "borrowed" / "kernels"
    place.mkdir(parents=True)
    (place / "__init__.py").touch()
    for shared in PACKAGE.glob("_[a-z]*"):
        shutil.copy(shared, place)
    return place


def run(script, tmp_path, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script, str(tmp_path), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("family", CALLS)
def test_a_family_copied_elsewhere_runs_forward_and_backward(family, place, tmp_path):
    shutil.copytree(PACKAGE / family, place / family, ignore=shutil.ignore_patterns("__pycache__"))
    impls = ["reference", *(["cpu"] if (place / "_cpu.so").exists() else []), "triton"]
    script = SCRIPT.format(call=CALLS[family].strip().replace("\n", "\n    "))
    run(script, tmp_path, family, " ".join(impls))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build a library that registers nothing")
def test_a_compiled_library_older_than_the_code_is_named(place, tmp_path):
    (tmp_path / "nothing.cpp").touch()
    command = ["g++", "-shared", "-fPIC", "-o", str(place / "_cpu.so"), str(tmp_path / "nothing.cpp")]
    subprocess.run(command, check=True)
    script = "import sys; sys.path.insert(0, sys.argv[1]); from borrowed.kernels import _library as library; "
    output = run(f"{script}print(library.load_error('cpu'))", tmp_path)
    assert output == "_cpu.so is older than this code: build it again\n"
