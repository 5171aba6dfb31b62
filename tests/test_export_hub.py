"""The package as a kernel repository: compliant, and loaded beside the installed one without a clash of operators."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import sora_kernels
from sora_kernels import _library, export_hub

COMPILED = _library.load_error("cpu") is None
VARIANTS = ["torch-cpu", "torch-cuda"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("hub") / "sora"
    export_hub.main([str(directory), "--version", "3", "--repo-id", "somebody/sora-kernels"])
    return directory


def variants(repository) -> list[pathlib.Path]:
    return sorted((repository / "build").iterdir())


def test_the_variants_and_the_source(repository):
    names = [path.name for path in variants(repository)]
    assert names[:2] == VARIANTS
    assert len(names) == 2 + COMPILED and all(name.startswith("torch-stable-abi211-cpu-") for name in names[2:])
    for folder in [*variants(repository), repository / "torch-ext" / "sora_kernels"]:
        exported = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {"__init__.py", "layers.py", "modulation/op.py", "modulation/kernels.py"} <= exported
        assert [name for name in exported if name.endswith(".so")] == ["_cpu.so"] * ("abi" in folder.name)
        assert not [name for name in exported if "integrations" in name or "pycache" in name or "export" in name]


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports when it runs."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        names |= imported(node)
    return names


def test_only_the_standard_library_torch_and_triton_are_imported(repository):
    for path in (repository / "torch-ext").rglob("*.py"):
        foreign = imported(ast.parse(path.read_text())) - sys.stdlib_module_names - {"torch", "triton"}
        assert not foreign, f"{path}: {foreign}"


def test_the_metadata_are_what_kernels_reads(repository):
    rust = pytest.importorskip("kernels._rust")
    ids = set()
    for folder in variants(repository):
        metadata = rust.Metadata.read_from_file(folder / "metadata.json")
        assert (str(metadata.name), metadata.version, metadata.license) == ("sora-kernels", 3, "Apache-2.0")
        assert str(metadata.backend.backend_type).lower() == ("cuda" if folder.name == "torch-cuda" else "cpu")
        assert metadata.id.isidentifier() and str(metadata.kernels_minver) in "0.17.0"
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder))
        ids.add(metadata.id)
    assert len(ids) == len(variants(repository))
    general = rust.Build.open(repository).general
    assert sorted(map(str, general.backends)) == ["cpu", "cuda"]
    build = (repository / "build.toml").read_text()
    assert "edition = 5" in build and 'repo-id = "somebody/sora-kernels"' in build


def test_a_directory_with_files_is_left_alone(repository, capsys):
    with pytest.raises(SystemExit):
        export_hub.main([str(repository)])
    assert "must be empty or not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--repo-id", 'me/"kernel"'], "repo_id must be OWNER/NAME .*; got 'me/\"kernel\"'"),
     (["--repo-id", "kernel"], "repo_id must be OWNER/NAME .*; got 'kernel'"),
     (["--version", "-1"], "version must be 0 or more; got -1")],
)  # fmt: skip
def test_what_its_files_could_not_hold_is_refused(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        export_hub.main([str(tmp_path / "new"), *arguments])
    assert end.value.code == 1 and re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_the_glibc_that_a_library_asks_for(tmp_path):
    library = tmp_path / "_cpu.so"
    library.write_bytes(b"\0GLIBC_2.4\0GLIBC_2.34\0GLIBC_2.5\0GLIBCXX_3.4.29\0")
    assert export_hub.newest_glibc(library) == (2, 34)


def step(package):
    torch.manual_seed(0)
    x, y, gate, scale = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(16), torch.randn(2, 1, 16)
    leaves = [t.requires_grad_() for t in (x, y, gate, scale)]
    x_new, out = package.gate_residual_norm_modulate(*leaves[:3], None, scale)
    q = out.view(2, 6, 2, 8)
    attended = package.spacetime_attention(q, q, q, grid=(1, 2, 3), window=(1, 1, 3))
    return [attended, *torch.autograd.grad(attended.square().sum() + x_new.sum(), leaves)]


def test_a_kernel_computes_beside_the_installed_package(repository):
    """`get_local_kernel` of the whole, which takes the compiled variant where there is one, and of each variant."""
    kernels = pytest.importorskip("kernels")
    best = kernels.get_local_kernel(repository)
    assert ("abi" in best.__file__) == COMPILED
    installed = step(sora_kernels)
    others = [load(folder) for folder in variants(repository)]
    for kernel, folder in zip(others, variants(repository), strict=True):
        again = kernels.get_local_kernel(folder)  # however it is found, its operators are defined once
        assert again.__name__ == kernel.__name__ and again.norm_modulate is kernel.norm_modulate
    for kernel in [best, *others]:
        namespace = sys.modules[f"{kernel.__name__}._library"].NAMESPACE
        assert namespace == kernel.__name__ != "sora_kernels" and kernel is not sora_kernels
        assert hasattr(torch.ops, namespace)
        for ours, expected in zip(step(kernel), installed, strict=True):  # of one algorithm in Python, or in C++
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(step(sora_kernels)[0], installed[0])


def load(folder):
    """As releases of `kernels` did that look into the folder of the module's name."""
    name = f"{folder.name.replace('-', '_')}_compatible"
    spec = importlib.util.spec_from_file_location(name, folder / "sora_kernels" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.norm_modulate and module.layers
    return sys.modules[json.loads((folder / "metadata.json").read_text())["id"]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernelize_in_every_mode(repository, training, compiled):
    kernels = pytest.importorskip("kernels")

    class RMSNorm(nn.RMSNorm):
        pass

    class LayerNorm(nn.LayerNorm):
        pass

    for cls in (RMSNorm, LayerNorm):
        kernels.replace_kernel_forward_from_hub(cls, cls.__name__)
    torch.manual_seed(0)
    model = nn.Sequential(LayerNorm(16), nn.Linear(16, 16), RMSNorm(16))
    x = torch.randn(3, 16)
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    plain = model(x)
    names = ("RMSNorm", "LayerNorm")
    mapping = {name: {"cpu": kernels.LocalLayerRepository(repository, layer_name=name)} for name in names}
    mode = kernels.Mode.TRAINING if training else kernels.Mode.INFERENCE
    mode = mode | kernels.Mode.TORCH_COMPILE if compiled else mode
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    kernel = kernels.get_local_kernel(repository)
    assert model[0].forward.__func__ is kernel.layers.LayerNorm.forward
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.testing.assert_close(run(x), plain)
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), model.parameters()), expected)


def test_both_copies_compute_in_a_process_in_either_order(repository):
    script = """
import importlib.util, json, pathlib, sys, torch

def load(folder):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

copies = [load(pathlib.Path(folder)) for folder in sys.argv[1:]]
import sora_kernels
copies.append(sora_kernels)
x, row = torch.randn(2, 6, 16, requires_grad=True), torch.randn(16, requires_grad=True)
results = []
for copy in copies:
    for impl in ("reference", "cpu"):
        try:
            out = copy.norm_modulate(x, row, row, impl=impl)
        except copy.Unavailable as error:
            assert "_cpu.so is not built" in str(error), error
            continue
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, row))))
for result in results[1:]:
    torch.testing.assert_close(result, results[0])
print(len(results), *sorted({copy._library.NAMESPACE for copy in copies}))
"""
    folders = [str(path) for path in variants(repository)]
    command = [sys.executable, "-c", script, *folders]
    result = subprocess.run(command, cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    count, *namespaces = result.stdout.split()
    assert int(count) == len(folders) + 1 + 2 * COMPILED and len(namespaces) == len(folders) + 1
