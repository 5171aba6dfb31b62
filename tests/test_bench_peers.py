"""Other libraries in the same run: what they are asked, why they are absent, and how they reach an offline machine."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import bench_attention, machine, peers, shapes, suite


def test_sliding_tiles_are_handed_over_tile_by_tile_and_come_back_in_order(monkeypatch):
    """Against a stand-in whose windows are single tiles: each sees itself and the text, which sees everything."""
    grid, tile, text = (12, 8, 16), (6, 8, 8), 5
    asked = []

    def sliding_tile_attention(q, k, v, windows, text_length, has_text, shape):
        asked.append((windows, text_length, has_text, shape))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        at = torch.arange(q.shape[2]) // 384
        seen = (at[:, None] == at[None]) | (at[:, None] == at[-1]) | (at[None] == at[-1])
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    stand_in = types.SimpleNamespace(sliding_tile_attention=sliding_tile_attention)
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", stand_in)
    monkeypatch.setattr(bench_attention, "STA_GRIDS", (grid,))
    mode = dict(grid=grid, window=tile, stride=tile, text_len=text)
    tensors = {name: torch.randn(1, 1536 + text, 2, 8) for name in "qkv"}
    call = bench_attention._fastvideo(tensors | mode, "fwd")
    torch.testing.assert_close(call(**tensors, **mode), bench_attention._reference(**tensors, **mode))
    assert asked == [([[1, 1, 1]] * 2, text, True, "12x8x16")]


@pytest.mark.parametrize(
    ("shape", "peer", "mode", "said"),
    [
        ("hunyuan-720p", "fastvideo", "fwd", "tiles are of 6x8x8 tokens, in clips of 30x48x80, 36x48x48, 18x48x80"),
        ("hunyuan-sta", "fastvideo", "bwd", "have no backward"),
        ("wan1.3b-480p", "flashinfer", "bwd", "has no backward"),
        ("wan1.3b-480p", "flashinfer", "fwd", "on a CUDA device only"),
        ("wan1.3b-480p", "efficient", "fwd", "chosen by name on a CUDA device only"),
    ],
)
def test_a_peer_that_cannot_take_part_says_why(monkeypatch, shape, peer, mode, said):
    for module in ("fastvideo_kernel", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    benchmark = suite.discover()["spacetime_attention:tiles" if peer == "fastvideo" else "spacetime_attention"]
    model = shapes.SHAPES[shape].model
    inputs = {"q": torch.empty(1, 1, model.heads, model.head_width, device="meta")}
    variant = "tiles" if peer == "fastvideo" else ""
    with pytest.raises(peers.Missing, match=said):
        benchmark.peers[peer](inputs | bench_attention._settings(variant, shapes.SHAPES[shape]), mode)


def test_every_peer_that_is_a_library_has_a_version():
    for name in ("liger", "quack", "comfy", "natten", "flashinfer", "fastvideo", "flash-attn-4", "diffusers"):
        assert any(name in benchmark.peers for benchmark in suite.discover().values()), name
        version = peers.version(name)
        assert version is None or version[0].isdigit()


PIP = """#!{python}
import pathlib, sys, zipfile
name, folder = sys.argv[-1], pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
assert "--no-deps" in sys.argv and "--only-binary=:all:" in sys.argv and "3.12" in sys.argv
if name == "natten":
    sys.exit("ERROR: No matching distribution found for natten")
module = name.replace("-", "_")
with zipfile.ZipFile(folder / f"{{module}}-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{{module}}/__init__.py", f"value = {{name!r}}")
    info = f"{{module}}-1.0.dist-info"
    wheel.writestr(f"{{info}}/METADATA", f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: 1.0\\n")
    kind = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    wheel.writestr(f"{{info}}/WHEEL", kind)
    wheel.writestr(f"{{info}}/RECORD", "")
"""


def script(name, *arguments, **environment):
    command = ["bash", str(machine.ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def fetched(tmp_path):
    python, folder = tmp_path / "python", tmp_path / "peers"
    python.write_text(PIP.format(python=sys.executable))
    python.chmod(0o755)
    chosen = {"PEERS": "liger-kernel natten quack", "PART_BYTES": "400", "PYTHON": str(python)}
    done = script("fetch_peers.sh", folder, **chosen)
    assert done.returncode == 0, done.stderr
    return folder


def test_wheels_are_cut_into_parts_and_what_is_absent_is_named(fetched):
    assert (fetched / "absent.txt").read_text() == "natten: ERROR: No matching distribution found for natten\n"
    parts = sorted(path.name for path in fetched.glob("*.part-*"))
    assert "liger_kernel-1.0-py3-none-any.whl.part-ab" in parts and not list(fetched.glob("*.whl"))
    assert all(path.stat().st_size <= 400 for path in fetched.glob("*.part-*"))


def test_parts_are_joined_checked_and_installed_without_a_network(fetched, tmp_path):
    done = script("use_peers.sh", fetched, tmp_path / "site", PYTHON=sys.executable, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "liger_kernel: usable" in done.stdout and "quack: usable" in done.stdout
    assert "absent: natten: ERROR: No matching distribution" in done.stdout and "diffusers" not in done.stdout
    assert (tmp_path / "site" / "liger_kernel" / "__init__.py").read_text() == "value = 'liger-kernel'"


@pytest.mark.parametrize("fault", ["damaged", "missing", "empty"])
def test_a_folder_that_is_not_whole_is_refused(fetched, tmp_path, fault):
    part = next(fetched.glob("quack*.part-aa"))
    if fault == "damaged":
        part.write_bytes(bytes(400))
    elif fault == "missing":
        for each in fetched.glob("quack*"):
            each.unlink()
    else:
        (fetched / "SHA256SUMS").unlink()
    said = {"damaged": "copy", "missing": "quack-1.0-py3-none-any.whl is missing", "empty": "fetch_peers.sh makes it"}
    done = script("use_peers.sh", fetched, tmp_path / "site", PYTHON=sys.executable)
    assert done.returncode == 1 and said[fault] in done.stderr and not (tmp_path / "site").exists()
