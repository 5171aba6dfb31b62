"""The wheel, the build's errors, and imports where triton, the compiled libraries or a GPU are missing."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

import sora_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sora_kernels", "sora_model")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    ours = ("PYTHONPATH", "TRITON_INTERPRET", "SORA_KERNELS_IMPL", "SORA_KERNELS_BUILD")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The default wheel, built offline from a clean copy of the sources, where `import torch` is an error."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    no_torch = tmp_path_factory.mktemp("no_torch")
    (no_torch / "torch.py").write_text("raise ImportError('a pure wheel must build without torch')")
    command = ["-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(target), "."]
    result = python(*command, cwd=source, PYTHONPATH=str(no_torch), SORA_KERNELS_BUILD="")
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The unpacked wheel: a directory to put on sys.path, without compiled libraries."""
    directory = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def test_the_default_wheel_is_pure_and_complete(wheel, installed):
    assert wheel.name.endswith("-py3-none-any.whl")
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    sources = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    weights = {str(p.relative_to(ROOT)) for p in (ROOT / "sora_model").rglob("*.safetensors")}
    assert sources | weights <= files
    assert not [name for name in files if name.endswith((".so", ".cpp", ".cu", ".pyc"))]
    (metadata,) = installed.glob("*.dist-info")
    assert "Root-Is-Purelib: true" in (metadata / "WHEEL").read_text()
    assert (metadata / "licenses" / "LICENSE").exists()
    assert f"\nVersion: {sora_kernels.__version__}\n" in (metadata / "METADATA").read_text()
    assert {"sora_kernels/py.typed", "sora_model/py.typed"} <= files
    required = [
        line for line in (metadata / "METADATA").read_text().splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]  # fmt: skip
    assert required == ["Requires-Dist: torch>=2.11"]
    entry_points = (metadata / "entry_points.txt").read_text()
    assert "sora = sora_model.__main__:main" in entry_points
    assert "[sglang.multimodal_gen.plugins]\nsora = sora_kernels.integrations.sglang:register" in entry_points


def test_info_without_compiled_libraries_gives_the_reasons(installed, tmp_path):
    result = python("-m", "sora_kernels.info", "--json", cwd=tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    state = json.loads(result.stdout)
    assert set(state) == {"versions", "settings", "devices", "verified", "cpu", "libraries", "ops"}
    for name in ("_cpu.so", "_cuda.so"):
        assert state["libraries"][name]["loaded"] is False
        assert "is not built" in state["libraries"][name]["reason"]
    norm_modulate = state["ops"]["cpu"]["norm_modulate"]
    assert norm_modulate["reference"] == {"forward": "usable", "backward": "usable"}
    assert "_cpu.so is not built" in norm_modulate["cpu"]["forward"]
    for implementations in state["ops"]["cpu"].values():
        assert implementations["reference"]["forward"] == "usable"


def test_import_and_use_without_triton_and_compiled_libraries(installed, tmp_path):
    script = """
import sys
sys.modules["triton"] = None  # importing it now fails as if it were not installed
import torch, sora_kernels
from sora_kernels._dispatch import Unavailable
assert sora_kernels.__file__.startswith(sys.argv[1]), sora_kernels.__file__
x, scale = torch.randn(1, 4, 8, requires_grad=True), torch.randn(8)
out = sora_kernels.norm_modulate(x, None, scale)
torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (8,), eps=1e-6) * (1 + scale))
out.sum().backward()
for impl in ("cpu", "triton"):
    try:
        sora_kernels.norm_modulate(x, None, scale, impl=impl)
    except Unavailable as error:
        print(impl, error)
from sora_kernels import _library
print(_library.triton_error())
"""
    result = python("-c", script, str(installed), cwd=tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    assert "_cpu.so is not built" in result.stdout
    assert "triton is not installed" in result.stdout


def test_import_loads_neither_triton_nor_compiled_libraries(tmp_path):
    script = """
import sys, torch
before = set(sys.modules)
import sora_kernels
new = set(sys.modules) - before
assert "triton" not in new, "triton was imported"
assert "torch._dynamo" not in new, "torch._dynamo was imported: it costs seconds, and imports triton"
assert "sora_kernels._C" not in new, "sora_kernels._C was imported"
assert "sora_kernels/_cpu.so" not in open("/proc/self/maps").read()
"""
    result = python("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_info_describes_this_machine():
    result = python("-m", "sora_kernels.info", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for expected in ("versions", "torch 2.", "norm_modulate", "reference", "usable"):
        assert expected in result.stdout
    state = json.loads(python("-m", "sora_kernels.info", "--json", cwd=ROOT).stdout)
    for library in state["libraries"].values():
        assert library["build"] if library["loaded"] else library["reason"]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_themselves_relatively_and_never_upwards(package):
    forbidden = {package, "benchmarks", "tests"} | ({"sora_model"} if package == "sora_kernels" else set())
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"


def test_an_unknown_build_target_is_named():
    result = python("setup.py", "--version", cwd=ROOT, SORA_KERNELS_BUILD="cpu,nonsense")
    assert result.returncode == 1
    assert "SORA_KERNELS_BUILD='cpu,nonsense' asks for 'nonsense'; expected 'cpu', 'cuda'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def setup_functions(monkeypatch) -> dict:
    """The functions of setup.py, without running the set-up."""
    monkeypatch.delenv("SORA_KERNELS_BUILD", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_a_missing_compiler_is_named(setup_functions, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++ -m64")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler: /nonexistent/g\+\+ -m64 not found.\n.*name it in CXX"):
        setup_functions["find_cxx"]()


def test_a_missing_nvcc_is_named(setup_functions, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(SystemExit, match=rf"nvcc is not in {tmp_path}.\n.*set CUDA_HOME, or build"):
        setup_functions["find_nvcc"]()


def test_an_old_nvcc_is_refused(setup_functions, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="is release 12.4; expected 12.8 or newer"):
        setup_functions["find_nvcc"]()


def test_a_missing_or_old_torch_is_named(setup_functions, monkeypatch, tmp_path):
    namespace = setup_functions["find_torch"].__globals__
    monkeypatch.setattr(namespace["importlib"].util, "find_spec", lambda name: None)
    monkeypatch.setattr(namespace["sysconfig"], "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"torch is not installed .*\n.*--no-build-isolation"):
        setup_functions["find_torch"]()
    version = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    version.parent.mkdir(parents=True)
    version.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    (tmp_path / "__init__.py").touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(namespace["importlib"].util, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match=r"is 2\.10; the compiled libraries need 2\.11 or newer"):
        setup_functions["find_torch"]()


def test_an_isolated_build_finds_the_torch_beside_it(setup_functions, monkeypatch):
    installed = setup_functions["find_torch"]()
    # pip's isolated build has paths of its own and the interpreter of the environment it installs into
    monkeypatch.setattr(setup_functions["find_torch"].__globals__["importlib"].util, "find_spec", lambda name: None)
    assert setup_functions["find_torch"]() == installed


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing}))  # importing one fails as if it were not installed
sys.argv = ["sora", *{arguments}]
"""


@pytest.mark.parametrize(
    "missing, arguments",
    [(["typer"], ["--help"]), (["rich"], ["info"]), (["av"], ["generate", "a red ball"]), (["safetensors"], ["eval"])],
    ids=str,
)
def test_a_command_that_lacks_an_extra_names_it_in_one_line(installed, tmp_path, missing, arguments):
    script = WITHOUT.format(missing=missing, arguments=arguments) + "from sora_model.__main__ import main; main()"
    result = python("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 1
    assert result.stderr == (
        f"error: the sora command needs {missing[0]}, which is not installed; it comes with the extra [model]: "
        "pip install '.[model]' in a copy of the project\n"
    )


def test_a_command_for_diffusers_names_its_extra(installed, tmp_path):
    for module in ("__main__", "cli"):
        script = WITHOUT.format(missing=["diffusers"], arguments=["patch", "."])
        script += f"from sora_model.{module} import main; main()"
        result = python("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
        assert result.returncode == 1 and "extra [diffusers]" in result.stderr and "Traceback" not in result.stderr


def test_python_names_the_extra_that_a_class_needs(installed, tmp_path):
    script = WITHOUT.format(missing=["numpy", "av"], arguments=[]) + "from sora_model import Sora"
    result = python("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 1
    assert (
        "MissingExtra: sora_model.Sora needs numpy, which is not installed; it comes with the extra [model]: "
        in (result.stderr.splitlines()[-1])
    )


def test_extras_are_those_of_the_project():
    from sora_model.extras import EXTRAS

    distributions = {"PIL": "pillow", "yaml": "pyyaml", "c2pa": "c2pa-python", "inspect_ai": "inspect-ai"}
    text = (ROOT / "pyproject.toml").read_text()
    for module, extra in EXTRAS.items():
        (line,) = re.findall(rf"^{extra} = \[(.*)\]$", text, re.MULTILINE)
        assert f'"{distributions.get(module, module)}>=' in line, module
