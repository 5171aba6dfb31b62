"""What only the compiled libraries can get wrong: threads, instruction sets, conversions, symbols, machine code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import sora_kernels  # noqa: F401  (registers the ops)
from sora_kernels import (
    _library,
    causal_conv3d,
    final_layer,
    norm_silu,
    patch_embed3d,
    qk_norm_rope,
    spacetime_attention,
    upsample_conv3d,
)
from sora_kernels.modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from sora_kernels.testing import assert_matches_oracle

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
LOW_PRECISION = (torch.bfloat16, torch.float16)
LAST = torch.channels_last_3d

cpu_library = pytest.mark.skipif(_library.load_error("cpu") is not None, reason=str(_library.load_error("cpu")))


def inputs(B: int, S: int, D: int, F: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = lambda *shape, dtype=dtype: torch.randn(*shape).to(dtype)  # noqa: E731
    tables = {name: draw(D, dtype=torch.float32) for name in ("gate_table", "shift_table", "scale_table")}
    rows = {name: draw(B, F, D) for name in ("gate", "shift", "scale")}
    return {"x": draw(B, S, D), "y": draw(B, S, D), "weight": draw(D), "bias": draw(D), **rows, **tables}


def run(tensors: dict[str, torch.Tensor], grads: list[torch.Tensor], impl: str) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = gate_residual_norm_modulate(**leaves, impl=impl)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {"x_new": outputs[0].detach(), "out": outputs[1].detach()} | dict(zip(leaves, gradients, strict=True))


@cpu_library
@pytest.mark.parametrize(
    "B, S, D, F",
    [(1, 1100, 40, 1), (2, 96, 33, 12), (1, 37, 130, 37)],
    ids=["row-split-over-chunks", "rows-share-a-chunk", "row-per-token"],
)
def test_results_do_not_depend_on_the_number_of_threads(B, S, D, F, for_any_threads):
    tensors, grads = inputs(B, S, D, F), [torch.randn(B, S, D), torch.randn(B, S, D)]
    for name, result in for_any_threads(lambda: run(tensors, grads, "cpu")).items():
        assert result.isfinite().all(), name


@cpu_library
def test_sums_over_many_tokens_keep_their_precision():
    B, S, D = 1, 30000, 5
    tensors = inputs(B, S, D, 1)
    grads = [torch.randn(B, S, D), torch.randn(B, S, D) + 1]
    actual, plain = run(tensors, grads, "cpu"), run(tensors, grads, "reference")
    double = lambda t: t.double()  # noqa: E731
    oracle = run({name: double(t) for name, t in tensors.items()}, list(map(double, grads)), "reference")
    for name in oracle:
        assert_matches_oracle(actual[name], oracle[name], plain[name], name, terms=1 if name in "xy" else S)


@cpu_library
def test_gradients_of_16_bit_rows_are_stored_wherever_they_and_the_scratch_memory_lie():
    """A row is stored unless it was computed in its place, which an address alone does not say: 16-bit rows of 16
    columns, counted as if they were fp32, met every cache line of the heap behind them."""
    dout, kept = torch.randn(1, 2000, 16).half(), []
    x, scale = torch.randn(2, 1, 2000, 16).half()
    for S in torch.randint(200, 2000, (100,)).tolist():
        dscale = torch.full((1, S, 16), float("nan"), dtype=torch.float16)
        kept.append(torch.empty(S))  # so that the heap grows, and scratch memory lies elsewhere
        dx, backward = torch.empty(1, S, 16).half(), _library.call("norm_modulate_bwd", "cpu")
        backward(dout[:, :S], x[:, :S], scale[:, :S], *[None] * 4, False, 1e-6, dx, None, dscale, *[None] * 4)
        assert dscale.isfinite().all(), S
        if S % 2:
            kept.append(dscale)


@cpu_library
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_every_16_bit_value_survives_widening_and_rounding(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 256, 256)
    out = gate_residual(x, torch.zeros_like(x), torch.zeros(256), impl="cpu")
    assert torch.equal(out.isnan(), x.isnan())
    finite = ~x.isnan()
    assert torch.equal((out + 0.0)[finite], (x + 0.0)[finite])


@cpu_library
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_rounding_is_to_nearest_even_with_subnormals_and_overflow(dtype):
    bits = torch.randint(-(2**15), 2**15, (2, 1, 512, 257), dtype=torch.int16)
    x, y = bits.view(dtype).nan_to_num(0.0)
    # gate 1 makes x + gate * y one fp32 addition, fused or not: the only rounding left to compare is the last
    out = gate_residual(x, y, torch.ones(257), impl="cpu")
    expected = (x.float() + y.float()).to(dtype)
    assert expected.isinf().any() and (expected[expected != 0].abs() < torch.finfo(dtype).tiny).any()
    assert torch.equal(out, expected)


@cpu_library
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("D", [7, 40, 131, 1536])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_fused_function_has_the_bits_of_the_two_one_after_the_other(D, dtype, norm):
    x, y = torch.randn(2, 2, 12, D).to(dtype)
    gate, shift, scale = torch.randn(3, 2, 3, D)
    x_new, out = gate_residual_norm_modulate(x, y, gate, shift, scale, norm=norm, impl="cpu")
    assert torch.equal(x_new, gate_residual(x, y, gate, impl="cpu"))
    assert torch.equal(out, norm_modulate(x_new, shift, scale, norm=norm, impl="cpu"))


@cpu_library
def test_strided_and_expanded_tensors_give_the_same_bits_as_contiguous_ones():
    B, S, D = 2, 12, 40
    wide = torch.randn(B, S + 3, 2 * D)
    x = wide[:, 2 : S + 2, D // 2 : D // 2 + D]
    y = torch.randn(1, 1, D).expand(B, S, D)
    shift, scale, gate = torch.randn(B, 3 * D).chunk(3, dim=-1)
    grads = [torch.ones(()).expand(B, S, D), torch.randn(S, B, D).transpose(0, 1)]
    tensors = {"x": x, "y": y, "gate": gate, "shift": shift[:, None], "scale": scale[:, None]}
    strided = run(tensors, grads, "cpu")
    contiguous = run({k: t.contiguous() for k, t in tensors.items()}, [g.contiguous() for g in grads], "cpu")
    for name in contiguous:
        assert torch.equal(strided[name], contiguous[name]), name


@cpu_library
def test_private_ops_refuse_what_they_cannot_read():
    forward = _library.call("norm_modulate_fwd", "cpu")
    x, scale = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    nothing = [None] * 5
    with pytest.raises(RuntimeError, match=r"scale: expected a number of rows .* divides S = 6, got Float \(2, 4, 8\)"):
        forward(x, None, scale, *nothing, False, 1e-6, 0, torch.empty_like(x))
    with pytest.raises(RuntimeError, match=r"out: expected the shape of x, got Float \(2, 5, 8\)"):
        forward(x, None, None, *nothing, False, 1e-6, 0, torch.empty(2, 5, 8))
    with pytest.raises(RuntimeError, match=r"x: expected float32, bfloat16 or float16, got Double"):
        forward(x.double(), None, None, *nothing, False, 1e-6, 0, torch.empty_like(x))
    with pytest.raises(RuntimeError, match=r"x: expected a last stride of 1"):
        forward(x.mT, None, None, *nothing, False, 1e-6, 0, torch.empty(2, 8, 6))
    with pytest.raises(RuntimeError, match=r"shift: expected \(D,\), \(B, D\) or \(B, F, D\) with B = 2 and D = 8"):
        forward(x, torch.randn(3, 8), None, *nothing, False, 1e-6, 0, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="host: expected 0, for one rounding, got 3"):
        forward(x, None, None, *nothing, False, 1e-6, 3, torch.empty_like(x))
    backward, row = _library.call("norm_modulate_bwd", "cpu"), torch.empty(2, 1, 8)
    with pytest.raises(RuntimeError, match=r"dscale: expected \(B, F, D\) = \(2, 3, 8\), got Float \(2, 1, 8\)"):
        backward(x, x, torch.randn(2, 3, 8), *[None] * 4, False, 1e-6, None, None, row, *[None] * 4)
    index, rest = torch.zeros(2, 6), (False, 1e-6, 0, torch.empty_like(x))
    with pytest.raises(RuntimeError, match=r"index: expected int32 or int64, got Float \(2, 6\)"):
        forward(x, None, scale, *[None] * 4, index, *rest)
    with pytest.raises(RuntimeError, match=r"index: expected \(B, S\) = \(2, 6\) .* got Long \(2, 5\)"):
        forward(x, None, scale, *[None] * 4, index[:, :5].long(), *rest)
    with pytest.raises(RuntimeError, match=r"index: expected rows of 0 to 3, got 4 at \(0, 0\)"):
        forward(x, None, scale, *[None] * 4, index.long() + 4, *rest)


ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.test_csrc import inputs, run
torch.manual_seed(1)
results = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tensors = inputs(2, 9, 131, 3, dtype)
    grads = [torch.randn(2, 9, 131).to(dtype) for _ in range(2)]
    double = run({k: t.double() for k, t in tensors.items()}, [g.double() for g in grads], "reference")
    results[dtype] = (run(tensors, grads, "cpu"), double, run(tensors, grads, "reference"))
torch.save(results, sys.argv[2])
"""


def cpu_flags() -> set[str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return set(re.findall(r"^flags\s*:(.*)$", text, re.M)[0].split()) if "flags" in text else set()


@cpu_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_meets_the_error_rule(isa, tmp_path):
    avx2, avx512 = {"avx2", "fma", "bmi2", "f16c"}, {"avx512f", "avx512bw", "avx512vl"}
    needed = {"baseline": set(), "avx2": avx2, "avx512": avx512}[isa]
    if missing := needed - cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    environment = os.environ | {"SORA_KERNELS_CPU_ISA": isa}
    command = [sys.executable, "-c", ISA_SCRIPT, str(ROOT), str(tmp_path / "results.pt")]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    for dtype, (actual, oracle, plain) in torch.load(tmp_path / "results.pt").items():
        for name in oracle:
            assert_matches_oracle(actual[name], oracle[name], plain[name], f"{dtype} {name}", terms=18)


@cpu_library
def test_an_unknown_instruction_set_is_named(tmp_path):
    script = (
        "import torch; from sora_kernels.modulation import norm_modulate; "
        "norm_modulate(torch.ones(1, 2, 8), None, None, impl='cpu')"
    )
    environment = os.environ | {"SORA_KERNELS_CPU_ISA": "mmx", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "SORA_KERNELS_CPU_ISA=mmx: expected baseline, avx2 or avx512" in result.stderr


def tool(name: str) -> str:
    """A CUDA tool: from PATH, the toolkit, or the copy in triton's wheel; skips with what was looked for."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    triton = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin"
    for candidate in (shutil.which(name), home / "bin" / name, triton / name):
        if candidate and Path(candidate).exists():
            return str(candidate)
    pytest.skip(f"{name} is not in PATH, {home / 'bin'} or triton's wheel")


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory) -> Path:
    """_cuda.so, built from these sources: the one in place where it is newer than they are, else a fresh one."""
    tool("nvcc")
    built = ROOT / "sora_kernels" / "_cuda.so"
    sources = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "common").iterdir()]
    if built.exists() and built.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return built
    target = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    environment = os.environ | {"SORA_KERNELS_BUILD": "cuda"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return target / "sora_kernels" / "_cuda.so"


def torch_cpp_symbols(library: Path) -> list[str]:
    table = subprocess.run(["nm", "-D", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    return [line for line in table.splitlines() if re.search(r"\b(at|c10|torch)::", line)]


def test_cuda_library_keeps_to_the_stable_abi(cuda_library):
    assert torch_cpp_symbols(cuda_library) == []


@cpu_library
def test_cpu_library_keeps_to_the_stable_abi():
    library = ROOT / "sora_kernels" / "_cpu.so"
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    assert torch_cpp_symbols(library) == []


def test_cuda_library_loads_without_a_gpu(cuda_library):
    """Under a CPU-only torch too: torch's CUDA half is looked up when a kernel is launched."""
    script = (
        f"import ctypes, torch; library = ctypes.CDLL({str(cuda_library)!r}); "
        "library.sora_kernels_build_info.restype = ctypes.c_char_p; "
        "print(library.sora_kernels_build_info().decode())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["library"] == "_cuda"


@pytest.fixture(scope="session")
def machine_code(cuda_library) -> dict[str, dict[str, str]]:
    """architecture -> function -> SASS"""
    dump = subprocess.run([tool("cuobjdump"), "-sass", str(cuda_library)], capture_output=True, text=True, check=True)
    code: dict[str, dict[str, str]] = {}
    for section in re.split(r"^arch = ", dump.stdout, flags=re.M)[1:]:
        architecture, _, body = section.partition("\n")
        functions = re.split(r"^\s*Function : ", body, flags=re.M)[1:]
        code.setdefault(architecture.strip(), {}).update(
            {name.strip(): text for name, _, text in (f.partition("\n") for f in functions)}
        )
    return code


def test_machine_code_for_every_architecture(machine_code):
    assert set(ARCHITECTURES) <= {name for name, functions in machine_code.items() if functions}
    kernels = [set(machine_code[architecture]) for architecture in ARCHITECTURES]
    assert kernels[0] and kernels[0] == kernels[1] == kernels[2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_uses_local_memory(machine_code, architecture):
    spilling = [name for name, sass in machine_code[architecture].items() if re.search(r"\b(STL|LDL)\b", sass)]
    assert spilling == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modulation_reads_and_writes_16_bytes_at_a_time(machine_code, architecture):
    kernels = {n: s for n, s in machine_code[architecture].items() if "norm_modulate_kernel" in n}
    assert len(kernels) == 18  # three dtypes, six traits
    for name, sass in kernels.items():
        assert re.search(r"\bLDG\.E\S*\.128", sass), f"{name}: no 128-bit load"
        assert re.search(r"\bSTG\.E\S*\.128", sass), f"{name}: no 128-bit store"
        assert not re.search(r"\bSTG\.E(\.U16|\.64)? ", sass), f"{name}: a narrow store"


def test_attention_multiplies_in_groups_and_loads_boxes(machine_code):
    """A group of products each for the first scores, the next scores, their values and the last values; where ptxas
    serialises, each product is one. Registers go from the warp group that loads to those that multiply."""
    kernels = {n: s for n, s in machine_code["sm_90a"].items() if re.search("attention_(plan_)?fwd_kernel", n)}
    assert len(kernels) == 12  # dense and planned, two dtypes, three widths
    for name, sass in kernels.items():
        E, planned = int(re.search(r"Li(\d+)E", name)[1]), "plan" in name
        products = re.findall(r"\bHGMMA\b.*?;", sass)
        assert len(products) == 2 * (E // 16 + (128 if planned else 176) // 16), name
        assert sum("gsb0" in product for product in products) == 4, f"{name}: serialised"
        assert sum("UTMALDG" in line for line in sass.splitlines()) >= 4, name
        assert re.search(r"\bSTG\.E\S*\.128", sass) if planned else "UTMASTG" in sass, name
        taken, left = ("0xe8", "0x28") if planned else ("0xf0", "0x18")
        assert re.search(rf"USETMAXREG\S* \S+ {taken}\b", sass), name
        assert re.search(rf"USETMAXREG.DEALLOC\S* {left}\b", sass), name


def test_gradients_of_attention_multiply_in_groups_and_load_boxes(machine_code):
    """A group each for the scores, their slopes, dq or dk, and dv; all but the last of them are in flight at a wait."""
    kernels = {n: s for n, s in machine_code["sm_90a"].items() if re.search("attention_(plan_)?bwd_kernel", n)}
    assert len(kernels) == 24  # dense and planned, two dtypes, three widths, of queries and of keys
    for name, sass in kernels.items():
        E, of_keys, planned = map(int, re.search(r"Li(\d+)ELb([01])ELb([01])E", name).groups())
        visited = 64 if planned or of_keys and E > 64 else 96
        products = re.findall(r"\bHGMMA\b.*?;", sass)
        assert len(products) == 2 * (E // 16) + (1 + of_keys) * visited // 16, name
        assert sum("gsb0" in product for product in products) == 3 + of_keys, f"{name}: serialised"
        assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", sass)) == 1 + 2 * of_keys, name
        assert "UTMALDG" in sass and ("UBLKCP" in sass) == (of_keys and not planned), name
        assert re.search(r"\bSTG\.E\S*\.128", sass) if planned else "UTMASTG" in sass, name
        taken, left = ("0xe8", "0x28") if planned and not of_keys else ("0xf0", "0x18")
        assert re.search(rf"USETMAXREG\S* \S+ {taken}\b", sass), name
        assert re.search(rf"USETMAXREG.DEALLOC\S* {left}\b", sass), name


def test_groups_take_no_more_registers_than_others_give(machine_code):
    """A block of three warp groups begins with 168 registers a thread; a group that waits for more waits for ever."""
    found = {}
    for name, sass in machine_code["sm_90a"].items():
        given, taken = (re.findall(rf"USETMAXREG\.{how}.*?(0x\w+) ;", sass) for how in ("DEALLOC", "TRY_ALLOC"))
        if given or taken:
            found[name] = int(given[0], 16) + 2 * int(taken[0], 16)
    assert found and all(registers <= 3 * 168 for registers in found.values()), found


def test_convolutions_multiply_in_groups_and_load_boxes(machine_code):
    """A group of products for 64 channels of a tap, one for the last 32 or fewer; where ptxas serialises, each product
    is one."""
    kernels = {n: s for n, s in machine_code["sm_90a"].items() if "causal_conv3d_fwd_kernel" in n}
    assert len(kernels) == 10  # two dtypes, five numbers of output channels
    for name, sass in kernels.items():
        products = re.findall(r"\bHGMMA\b.*?;", sass)
        assert len(products) == 2 * (4 + 2), name
        assert sum("gsb0" in product for product in products) == 2, f"{name}: serialised"
        N = int(re.search(r"Li(\d+)E", name)[1])
        residual = 0 if N > 128 else 2 * N // (32 if N % 64 else 64)
        assert sass.count("UTMALDG.5D") == 2 + residual and "UTMASTG.5D" in sass, name
        assert re.search(r"USETMAXREG\S* \S+ 0xf0\b", sass) and re.search(r"USETMAXREG.DEALLOC\S* 0x18\b", sass), name


def test_patch_embeddings_multiply_in_groups_and_store_boxes(machine_code):
    """A group of products for 64 features, one for the last 32 or fewer; results of a warp leave 16 rows at a time."""
    kernels = {n: s for n, s in machine_code["sm_90a"].items() if "patch_embed3d_fwd_kernel" in n}
    assert len(kernels) == 4  # two dtypes, one or two products side by side
    for name, sass in kernels.items():
        parts, products = int(re.search(r"Li(\d)E", name)[1]), re.findall(r"\bHGMMA\b.*?;", sass)
        assert len(products) == parts * (4 + 2), name
        assert sum("gsb0" in product for product in products) == 2, f"{name}: serialised"
        assert sass.count("UTMASTG.2D") == 2 * parts and sass.count("STSM") == 8 * parts, name
        assert re.search(r"USETMAXREG\S* \S+ 0xd0\b", sass) and re.search(r"USETMAXREG.DEALLOC\S* 0x58\b", sass), name


def test_last_layers_multiply_in_groups_and_load_boxes(machine_code):
    """A group of products for 64 columns of x; where ptxas serialises, each product is one."""
    kernels = {n: s for n, s in machine_code["sm_90a"].items() if "final_layer_fwd_kernel" in n}
    assert len(kernels) == 8  # two dtypes, three numbers of features, of 64 one or two products below each other
    for name, sass in kernels.items():
        products = re.findall(r"\bHGMMA\b.*?;", sass)
        assert len(products) == 4 * int(re.search(r"Li\d+ELi(\d)E", name)[1]), name
        assert sum("gsb0" in product for product in products) == 1, f"{name}: serialised"
        assert "UTMALDG.4D" in sass and "UTMALDG.2D" in sass and "LDSM" in sass, name
        assert re.search(r"USETMAXREG\S* \S+ 0xd0\b", sass) and re.search(r"USETMAXREG.DEALLOC\S* 0x58\b", sass), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "C, D, F, grid", [(16, 1536, 1, (5, 30, 52)), (16, 5120, 3, (3, 7, 13)), (48, 3072, 1, (2, 9, 9))], ids=str
)
def test_cuda_last_layer_meets_the_error_rule_and_gives_the_same_bits_again(C, D, F, grid, norm, dtype, require):
    require("final_layer", "cuda", "cuda", dtype)
    S, N, how = grid[0] * grid[1] * grid[2], 4 * C, dict(grid=grid, patch=(1, 2, 2), norm=norm)
    x, shift, scale = (torch.randn(2, rows, D, device="cuda").to(dtype) for rows in (S, F, F))
    weight, bias = (torch.randn(N, D, device="cuda") / D**0.5).to(dtype), torch.randn(N, device="cuda")
    tensors = 3 * x + 1, shift, scale, weight, bias
    actual, plain, again = (final_layer(*tensors, **how, impl=impl) for impl in ("cuda", "reference", "cuda"))
    oracle = final_layer(*(t.double() for t in tensors), **how, impl="reference")
    assert_matches_oracle(actual, oracle, plain, "out", D)
    assert torch.equal(actual, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "C, D, grid", [(16, 1536, (5, 30, 52)), (36, 5120, (3, 7, 13)), (48, 3072, (2, 22, 40))], ids=str
)
def test_cuda_patch_embedding_meets_the_error_rule_and_gives_the_same_bits_again(C, D, grid, dtype, require):
    require("patch_embed3d", "cuda", "cuda", dtype)
    T, H, W = grid
    video, bias = torch.randn(2, C, T, 2 * H, 2 * W, device="cuda").to(dtype), torch.randn(D, device="cuda")
    weight = (torch.randn(D, C, 1, 2, 2, device="cuda") / (4 * C) ** 0.5).to(dtype)
    actual, plain, again = (patch_embed3d(video, weight, bias, impl=impl) for impl in ("cuda", "reference", "cuda"))
    oracle = patch_embed3d(video.double(), weight.double(), bias.double(), impl="reference")
    assert_matches_oracle(actual, oracle, plain, "out", 4 * C)
    assert torch.equal(actual, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "C, N, taps, size",
    [(96, 96, (3, 3, 3), (2, 5, 60, 104)), (16, 384, (3, 3, 3), (1, 3, 30, 52)), (384, 192, (1, 3, 3), (1, 2, 33, 35)),
     (192, 384, (3, 1, 1), (1, 4, 17, 9)), (1024, 512, (1, 1, 1), (1, 1, 31, 40)), (24, 200, (3, 3, 3), (1, 2, 3, 5))],
    ids=str,
)  # fmt: skip
def test_cuda_convolution_meets_the_error_rule_and_gives_the_same_bits_again(C, N, taps, size, dtype, require):
    require("causal_conv3d", "cuda", "cuda", dtype)
    (B, T, H, W), n = size, C * taps[0] * taps[1] * taps[2]
    x = torch.randn(B, C, T, H, W, device="cuda").to(dtype).contiguous(memory_format=LAST)
    weight, bias = (torch.randn(N, C, *taps, device="cuda") / n**0.5).to(dtype), torch.randn(N, device="cuda")
    past = torch.randn(B, C, taps[0] - 1, H, W, device="cuda").to(dtype).contiguous(memory_format=LAST)
    for cache in (None, past):
        wide = None if cache is None else cache.double()
        results = [causal_conv3d(x, weight, bias, cache=cache, impl=impl) for impl in ("cuda", "reference", "cuda")]
        results.append(causal_conv3d(x.double(), weight.double(), bias.double(), cache=wide, impl="reference"))
        actual, plain, again, oracle = (y if cache is None else y[0] for y in results)
        assert_matches_oracle(actual, oracle, plain, "out", n)
        assert torch.equal(actual, again)
    residual = torch.randn_like(actual)
    options = dict(residual=residual) | (dict(norm_weight=torch.rand_like(bias), return_raw=True) if N <= 128 else {})
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    results = [causal_conv3d(x, weight, bias, **options, impl=impl) for impl in ("cuda", "reference", "cuda")]
    results.insert(1, causal_conv3d(x.double(), weight.double(), bias.double(), **wide, impl="reference"))
    for name, *found in zip(("out", "raw"), *(r if isinstance(r, tuple) else (r,) for r in results), strict=False):
        assert_matches_oracle(*found[:3], name, n)
        assert torch.equal(found[0], found[3]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "C, N, taps, factor, size",
    [(384, 192, (1, 3, 3), (1, 2, 2), (2, 3, 30, 52)), (96, 200, (3, 3, 3), (2, 2, 2), (1, 3, 17, 9)),
     (24, 40, (3, 1, 1), (2, 1, 1), (1, 4, 5, 33))],
    ids=str,
)  # fmt: skip
def test_cuda_upsampling_meets_the_error_rule_and_gives_the_same_bits_again(C, N, taps, factor, size, dtype, require):
    require("upsample_conv3d", "cuda", "cuda", dtype)
    n = C * taps[0] * taps[1] * taps[2]
    x = torch.randn(size[0], C, *size[1:], device="cuda").to(dtype).contiguous(memory_format=LAST)
    weight, bias = (torch.randn(N, C, *taps, device="cuda") / n**0.5).to(dtype), torch.randn(N, device="cuda")
    actual, plain, again = (
        upsample_conv3d(x, weight, bias, factor=factor, impl=impl) for impl in ("cuda", "reference", "cuda")
    )
    oracle = upsample_conv3d(x.double(), weight.double(), bias.double(), factor=factor, impl="reference")
    assert_matches_oracle(actual, oracle, plain, "out", n)
    assert torch.equal(actual, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("C", [8, 96, 200, 384, 1024])
def test_cuda_norm_silu_meets_the_error_rule_and_gives_the_same_bits_again(C, layout, dtype, require):
    require("norm_silu", "cuda", "cuda", dtype)
    x = torch.randn(2, C, 5, 31, 24, device="cuda").to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.rand(2, C, device="cuda") + 0.5
    actual, plain, again = (norm_silu(x, weight, bias, impl=impl) for impl in ("cuda", "reference", "cuda"))
    oracle = norm_silu(x.double(), weight.double(), bias.double(), impl="reference")
    assert_matches_oracle(actual, oracle, plain, "out", C)
    assert torch.equal(actual, again) and actual.stride() == x.stride()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_modulation_are_read_and_written_16_bytes_at_a_time(machine_code, architecture):
    kernels = {n: s for n, s in machine_code[architecture].items() if "modulation_bwd_kernel" in n}
    assert len(kernels) == 18  # three dtypes, rows of one, four and twelve warps, with y and without
    for name, sass in kernels.items():
        dtype, branch = re.search(r"TraitsI(\w+?)Li\d+ELb(.)E", name).groups()
        vectors = (3 if dtype == "f" else 2) * (2 if branch == "0" else 4)  # of x and dout, dx_new and y: of a thread
        assert len(re.findall(r"\bLDG\.E\.NA\.128", sass)) >= vectors, name
        assert len(re.findall(r"\bSTG\.E\S*\.128", sass)) >= vectors // 2, name
    kernels = {n: s for n, s in machine_code[architecture].items() if "gate_residual_bwd_kernel" in n}
    assert len(kernels) == 3
    for name, sass in kernels.items():  # four rows at a time, then one by one
        assert len(re.findall(r"\bLDG\.E\.NA\.128", sass)) >= 2 * (4 + 1), name
        assert len(re.findall(r"\bSTG\.E\S*\.128", sass)) >= 2 * (4 + 1), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gate_residual_reads_and_writes_16_bytes_at_a_time(machine_code, architecture):
    kernels = {n: s for n, s in machine_code[architecture].items() if "gate_residual_kernel" in n}
    assert len(kernels) == 36  # three dtypes, six traits, alone and with a norm
    for name, sass in kernels.items():
        rows = int(re.search(r"ELi(\d+)EEEL", name)[1]) // (4 if "TraitsIf" in name else 8)  # vectors of a thread
        assert len(re.findall(r"\bLDG\.E\S*\.128", sass)) >= 2 * rows, f"{name}: x and y"
        assert len(re.findall(r"\bSTG\.E\S*\.128", sass)) == (2 if "ELb1E" in name else 1) * rows, name
        assert not re.search(r"\bSTG\.E(\.U16|\.64)? ", sass), f"{name}: a narrow store"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norm_silu_reads_and_writes_16_bytes_at_a_time(machine_code, architecture):
    kernels = {n: s for n, s in machine_code[architecture].items() if "norm_silu_" in n}
    assert len(kernels) == 21  # three dtypes; channels last four numbers of elements and a rest, channels first two
    for name, sass in kernels.items():
        assert re.search(r"\bLDG\.E\S*\.128", sass), f"{name}: no 128-bit load"
        assert re.search(r"\bSTG\.E\S*\.128", sass), f"{name}: no 128-bit store"
        assert not re.search(r"\bSTG\.E(\.U16|\.64)? ", sass), f"{name}: a narrow store"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_qk_norm_rope_reads_and_writes_16_bytes_at_a_time(machine_code, architecture):
    kernels = {n: s for n, s in machine_code[architecture].items() if "qk_norm_rope_fwd_kernel" in n}
    assert len(kernels) == 12  # three dtypes, one to eight warps
    for name, sass in kernels.items():
        assert re.search(r"\bLDG\.E\S*\.128", sass), f"{name}: no 128-bit load"
        assert re.search(r"\bSTG\.E\S*\.128", sass), f"{name}: no 128-bit store"
        assert not re.search(r"\bSTG\.E(\.U16|\.64)? ", sass), f"{name}: a narrow store"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_qk_norm_rope_are_read_and_written_16_bytes_at_a_time(machine_code, architecture):
    kernels = {n: s for n, s in machine_code[architecture].items() if "qk_norm_rope_bwd_kernel" in n}
    assert len(kernels) == 9  # three dtypes; heads, widths of up to four and of up to sixteen warps
    for name, sass in kernels.items():
        assert len(re.findall(r"\bLDG\.E\.NA\.128", sass)) >= 4, f"{name}: x and dout"
        assert re.search(r"\bSTG\.E\S*\.128", sass), f"{name}: no 128-bit store"
        assert not re.search(r"\bSTG\.E(\.U16|\.64)? ", sass), f"{name}: a narrow store"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize(
    "Sq, Sk, H, Hk", [(1, 1, 1, 1), (129, 177, 4, 2), (1000, 512, 24, 24), (4096, 4095, 6, 6)], ids=str
)
def test_cuda_attention_meets_the_error_rule_and_gives_the_same_bits_again(Sq, Sk, H, Hk, E, dtype, require):
    require("spacetime_attention", "cuda", "cuda", dtype)
    q, k, v = (torch.randn(2, S, heads, E, device="cuda").to(dtype) for S, heads in ((Sq, H), (Sk, Hk), (Sk, Hk)))
    attend = lambda *args, impl: spacetime_attention(*args, return_lse=True, impl=impl)  # noqa: E731
    actual, again = attend(q, k, v, impl="cuda"), attend(q, k, v, impl="cuda")
    oracle = attend(q.double(), k.double(), v.double(), impl="reference")
    plain = attend(q, k, v, impl="reference")
    for name, *found in zip(("out", "lse"), actual, oracle, plain, again, strict=True):
        assert_matches_oracle(*found[:3], name, max(Sk, E))
        assert torch.equal(found[0], found[3]), name


PLANNED = (
    dict(), dict(causal="frame"), dict(window=(5, 9, 11)), dict(window=(4, 8, 8), stride=(2, 4, 8), text_len=40),
    dict(window=(3, 6, 20), sink=1), dict(window=[(9, 15, 20), (1, 8, 8)] * 2),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize("mode", PLANNED, ids=str)
def test_cuda_attention_over_plans_and_kv_lens_meets_the_error_rule(mode, E, dtype, require):
    require("spacetime_attention", "cuda", "cuda", dtype)
    S = 9 * 15 * 20 + mode.get("text_len", 0)
    q, k, v = (torch.randn(2, S, heads, E, device="cuda").to(dtype) for heads in (4, 2, 2))
    for lengths in (None, torch.tensor([S - 3, 1500], device="cuda")):
        how = mode | dict(grid=(9, 15, 20), kv_lens=lengths, return_lse=True)
        actual, again = (spacetime_attention(q, k, v, **how, impl="cuda") for _ in range(2))
        oracle = spacetime_attention(q.double(), k.double(), v.double(), **how, impl="reference")
        plain = spacetime_attention(q, k, v, **how, impl="reference")
        for name, *found in zip(("out", "lse"), actual, oracle, plain, again, strict=True):
            assert torch.equal(found[0], found[3]), name
            seen = ~found[1].isneginf()
            assert_matches_oracle(*(t[seen] for t in found[:3]), name, S)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize(
    "Sq, Sk, H, Hk", [(1, 1, 1, 1), (129, 177, 4, 2), (1000, 512, 24, 24), (2048, 2047, 6, 6)], ids=str
)
def test_cuda_gradients_of_attention_meet_the_error_rule_and_give_the_same_bits_again(Sq, Sk, H, Hk, E, dtype, require):
    require("spacetime_attention", "cuda", "cuda", dtype, grad=True)
    inputs = [torch.randn(2, S, heads, E, device="cuda").to(dtype) for S, heads in ((Sq, H), (Sk, Hk), (Sk, Hk))]
    dout, dlse = torch.randn_like(inputs[0]), torch.randn(2, H, Sq, device="cuda")

    def gradients(to, impl):
        leaves = [t.detach().to(to).requires_grad_() for t in inputs]
        results = spacetime_attention(*leaves, return_lse=True, impl=impl)
        return torch.autograd.grad(results, leaves, [dout.to(to), dlse.to(results[1].dtype)])

    actual, again = gradients(dtype, "cuda"), gradients(dtype, "cuda")
    oracle, plain = gradients(torch.float64, "reference"), gradients(dtype, "reference")
    for name, *found in zip(("dq", "dk", "dv"), actual, oracle, plain, again, strict=True):
        assert_matches_oracle(*found[:3], name, Sk if name == "dq" else Sq * H // Hk)
        assert torch.equal(found[0], found[3]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize("mode", PLANNED, ids=str)
def test_cuda_gradients_of_attention_over_plans_and_kv_lens_meet_the_error_rule(mode, E, dtype, require):
    require("spacetime_attention", "cuda", "cuda", dtype, grad=True)
    S = 9 * 15 * 20 + mode.get("text_len", 0)
    inputs = [torch.randn(2, S, heads, E, device="cuda").to(dtype) for heads in (4, 2, 2)]
    dout, dlse = torch.randn_like(inputs[0]), torch.randn(2, 4, S, device="cuda")
    for lengths in (None, torch.tensor([S - 3, 1500], device="cuda")):

        def gradients(to, impl):
            leaves = [t.detach().to(to).requires_grad_() for t in inputs]
            how = mode | dict(grid=(9, 15, 20), kv_lens=lengths, return_lse=True, impl=impl)  # noqa: B023
            results = spacetime_attention(*leaves, **how)
            return torch.autograd.grad(results, leaves, [dout.to(to), dlse.to(results[1].dtype)])

        actual, again = gradients(dtype, "cuda"), gradients(dtype, "cuda")
        oracle, plain = gradients(torch.float64, "reference"), gradients(dtype, "reference")
        for name, *found in zip(("dq", "dk", "dv"), actual, oracle, plain, again, strict=True):
            assert_matches_oracle(*found[:3], name, S if name == "dq" else 2 * S)
            assert torch.equal(found[0], found[3]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("D", [8, 512, 1536, 1537, 3072, 5120, 5376, 16384, 20000])
def test_cuda_forward_meets_the_error_rule(D, dtype, require):
    require("norm_modulate", "cuda", "cuda", dtype)
    tensors = {k: v for k, v in inputs(2, 6, D, 3, dtype).items() if k not in ("y", "gate", "gate_table")}
    for norm in ("layer", "rms"):
        oracle = norm_modulate(**{k: v.double() for k, v in tensors.items()}, norm=norm, impl="reference")
        plain = norm_modulate(**tensors, norm=norm, impl="reference")
        actual = norm_modulate(**{k: v.cuda() for k, v in tensors.items()}, norm=norm, impl="cuda")
        assert_matches_oracle(actual.cpu(), oracle, plain, f"norm_modulate {norm}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("D, F", [(264, 1), (1536, 3), (3072, 600), (4608, 2)])
@pytest.mark.parametrize(
    "function, without, how",
    [(norm_modulate, ("y", "gate", "gate_table"), {}), (gate_residual_norm_modulate, (), dict(y_norm="rms")),
     (gate_residual, ("shift", "scale", "shift_table", "scale_table", "weight", "bias"), {})],
    ids=["norm_modulate", "gate_residual_norm_modulate", "gate_residual"],
)  # fmt: skip
def test_cuda_gradients_meet_the_error_rule_and_give_the_same_bits_again(function, without, how, D, F, dtype, require):
    require(function.__name__, "cuda", "cuda", dtype, grad=True)
    tensors = {k: v for k, v in inputs(2, 600, D, F, dtype).items() if k not in without}
    grads = [torch.randn(2, 600, D).to(dtype) for _ in range(2 if function is gate_residual_norm_modulate else 1)]

    def gradients(tensors, grads, impl):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        found = torch.autograd.grad(function(**leaves, **how, impl=impl), list(leaves.values()), grads)
        return dict(zip(leaves, found, strict=True))

    on_gpu = {name: t.cuda() for name, t in tensors.items()}, [g.cuda() for g in grads]
    actual, again = gradients(*on_gpu, "cuda"), gradients(*on_gpu, "cuda")
    oracle = gradients({name: t.double() for name, t in tensors.items()}, [g.double() for g in grads], "reference")
    plain = gradients(tensors, grads, "reference")
    for name in oracle:
        assert_matches_oracle(actual[name].cpu(), oracle[name], plain[name], name, terms=1 if name in "xy" else 1200)
        assert torch.equal(actual[name], again[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("D", [8, 512, 1536, 3072, 5120, 16384])
def test_cuda_gate_residual_meets_the_error_rule(D, dtype, require):
    require("gate_residual_norm_modulate", "cuda", "cuda", dtype)
    tensors = inputs(2, 6, D, 3, dtype)
    for norms in (dict(norm="layer"), dict(norm="rms", y_norm="layer")):
        oracle = gate_residual_norm_modulate(**{k: v.double() for k, v in tensors.items()}, **norms, impl="reference")
        plain = gate_residual_norm_modulate(**tensors, **norms, impl="reference")
        actual = gate_residual_norm_modulate(**{k: v.cuda() for k, v in tensors.items()}, **norms, impl="cuda")
        for name, *found in zip(("x_new", "out"), actual, oracle, plain, strict=True):
            assert_matches_oracle(found[0].cpu(), *found[1:], f"{name} {norms}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("across", ["head", "width"])
@pytest.mark.parametrize("Hq, Hk, E", [(1, 1, 64), (12, 12, 128), (24, 8, 128), (40, 40, 128), (24, 24, 96)], ids=str)
def test_cuda_qk_norm_rope_meets_the_error_rule_and_gives_the_same_bits_again(Hq, Hk, E, across, dtype, require):
    require("qk_norm_rope", "cuda", "cuda", dtype)
    q, k = (torch.randn(2, 300, H, E, device="cuda").to(dtype) for H in (Hq, Hk))
    weights = [torch.randn(H * E if across == "width" else E, device="cuda").to(dtype) for H in (Hq, Hk)]
    how = dict(across=across, grid=(3, 10, 10), origin=(1 << 20, 0, 0), split=(E // 2 - 16, 8, 8))

    def turn(q, k, weights, impl):
        return qk_norm_rope(q, k, q_weight=weights[0], k_weight=weights[1], **how, impl=impl)

    actual, again = (turn(q, k, weights, "cuda") for _ in range(2))
    oracle = turn(q.double(), k.double(), [w.double() for w in weights], "reference")
    for name, *found in zip("qk", actual, oracle, turn(q, k, weights, "reference"), again, strict=True):
        assert_matches_oracle(*found[:3], name, Hq * E)
        assert torch.equal(found[0], found[3]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("across", ["head", "width"])
@pytest.mark.parametrize("Hq, Hk, E", [(1, 1, 64), (12, 12, 128), (24, 8, 128), (40, 40, 128), (24, 24, 96)], ids=str)
def test_cuda_gradients_of_qk_norm_rope_meet_the_error_rule_and_give_the_same_bits_again(
    Hq, Hk, E, across, dtype, require
):
    require("qk_norm_rope", "cuda", "cuda", dtype, grad=True)
    tensors = [torch.randn(2, 300, H, E, device="cuda").to(dtype) for H in (Hq, Hk)]
    tensors += [torch.randn(H * E if across == "width" else E, device="cuda").to(dtype) for H in (Hq, Hk)]
    how = dict(across=across, grid=(3, 10, 10), split=(E // 2 - 16, 8, 8))
    douts = [torch.randn_like(t) for t in tensors[:2]]

    def gradients(to, impl):
        q, k, q_weight, k_weight = leaves = [t.to(to).requires_grad_() for t in tensors]
        results = qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, **how, impl=impl)
        return torch.autograd.grad(results, leaves, [d.to(to) for d in douts])

    actual, again = gradients(dtype, "cuda"), gradients(dtype, "cuda")
    oracle, plain = gradients(torch.float64, "reference"), gradients(dtype, "reference")
    for name, *found in zip(("q", "k", "q_weight", "k_weight"), actual, oracle, plain, again, strict=True):
        assert_matches_oracle(*found[:3], name, Hq * E if len(name) == 1 else 600 * Hq)
        assert torch.equal(found[0], found[3]), name


@pytest.mark.gpu
def test_cuda_forward_runs_on_the_current_stream_and_in_a_graph(require):
    require("norm_modulate", "cuda", "cuda")
    x = torch.randn(1, 64, 1536, device="cuda")
    out = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm_modulate(x, None, None, impl="cuda", out=out)
    x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    graph.replay()
    expected = norm_modulate(x.double(), None, None, impl="reference")
    assert_matches_oracle(out, expected, norm_modulate(x, None, None, impl="reference"))
