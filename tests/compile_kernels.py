"""Compile the Triton kernels of every family for GPUs that need not be present, and print what came out as JSON lines.

The launchers are called with tensors on the meta device; in place of each kernel stands a recorder that keeps the
launch, so what is compiled is exactly what would be launched: tile sizes, warps and specialisation included.
Run in a process of its own, without TRITON_INTERPRET: python tests/compile_kernels.py sm_80,sm_90 [family ...]
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


def specialise(kernel: triton.JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The source and options that the JIT would compile for this launch of pointers aligned to 16 bytes."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "num_ctas", "maxnreg") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or isinstance(value, bool):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


class Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(call: Callable[[], None], *modules) -> list:
    """The kernel launches that `call` makes from these modules."""
    launches: list = []
    patched = [(m, n, k) for m in modules for n, k in vars(m).items() if isinstance(k, triton.JITFunction)]
    patched = [(m, n, k) for m, n, k in patched if n.endswith("_kernel")]
    for module, name, kernel in patched:
        setattr(module, name, Recorder(kernel, launches))
    try:
        call()
    finally:
        for module, name, kernel in patched:
            setattr(module, name, kernel)
    return launches


def measure(kernel, args, kwargs, capability: int) -> dict:
    source, options = specialise(kernel, args, dict(kwargs))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return dict(
        kernel=kernel.__name__, registers=found["REG"], stack=found["STACK"], local=found["LOCAL"],
        shared=compiled.metadata.shared, num_warps=compiled.metadata.num_warps,
        loads=ptx.count("ld.global"), vector_loads=len(re.findall(r"ld\.global\S*\.(?:v4\.[bu]32|v2\.b64)", ptx)),
        wgmma=ptx.count("wgmma.mma_async"), tcgen05=ptx.count("tcgen05.mma"),
    )  # fmt: skip


def modulation() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """(case, launch, modules) for the widths of public models, in the row layouts that choose another tiling."""
    from sora_kernels import _triton
    from sora_kernels.modulation import kernels

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    for D in (64, 1152, 1536, 3072, 5120):
        for name, frames in (("per clip", 1), ("per token", 4096)):
            x, y, x_new, out, dx, dy = (empty(1, 4096, D) for _ in range(6))
            gate, shift, scale, dgate, dshift, dscale = (empty(1, frames, D) for _ in range(6))
            tables = [empty(D, dtype=torch.float32) for _ in range(6)]

            def forward(x=x, y=y, gate=gate, shift=shift, scale=scale, tables=tables, x_new=x_new, out=out):
                kernels.gate_residual_norm_modulate_fwd(
                    x, y, gate, shift, scale, None, None, *tables[:3], False, 1e-6, x_new, out
                )

            def backward(
                dx_new=x, dout=out, x_new=x_new, y=y, gate=gate, scale=scale, tables=tables,
                grads=(dx, dy, dgate, dshift, dscale),
            ):  # fmt: skip
                kernels.gate_residual_norm_modulate_bwd(
                    dx_new, dout, x_new, y, gate, scale, None, None, tables[0], tables[2], False, 1e-6,
                    *grads, None, None, *tables[3:],
                )  # fmt: skip

            yield f"D={D} forward {name}", forward, (kernels, _triton)
            yield f"D={D} backward {name}", backward, (kernels, _triton)


def qknorm_rope() -> Iterator[tuple[str, Callable[[], None], tuple]]:
    """The heads of public models: across the width and per head, both pairings, partial rotation, given freqs."""
    from sora_kernels import _triton
    from sora_kernels.qknorm_rope import kernels

    cases = [  # heads, E, rotary_dim, norm, across the width, interleaved, freqs
        (12, 128, 128, 1, True, True, False),
        (40, 128, 128, 1, True, True, False),
        (24, 128, 128, 1, False, True, False),
        (24, 128, 96, 1, False, False, False),
        (48, 64, 64, 2, False, True, False),
        (16, 72, 72, 1, False, True, False),
        (24, 96, 96, 1, False, False, False),
        (24, 112, 112, 1, False, True, False),
        (1, 2048, 2048, 1, False, True, True),
    ]
    for H, E, rotary, norm, width, interleaved, given in cases:
        q, dout, out, dq = (torch.empty(1, 4096, H, E, dtype=torch.bfloat16, device="meta") for _ in range(4))
        weight, dweight = (torch.empty(H * E if width else E, device="meta") for _ in range(2))
        tables = [torch.empty(4096, rotary // 2, device="meta") if given else None for _ in range(2)]
        n = rotary // 2
        split = [] if given else [n - 2 * (n // 3), n // 3, n // 3]
        settings = (*tables, norm, width, [16, 16, 16], split, 1e4, [0, 0, 0], interleaved, 1e-6)
        none = q[:, :0]  # k is launched like q: once is enough

        def forward(q=q, none=none, weight=weight, settings=settings, out=out):
            kernels.qk_norm_rope_fwd(q, none, weight, None, *settings, out, none)

        def backward(dout=dout, q=q, none=none, weight=weight, settings=settings, dq=dq, dweight=dweight):
            kernels.qk_norm_rope_bwd(dout, none, q, none, weight, None, *settings, dq, none, dweight, None)

        name = f"{H}x{E}{' across' * width} {rotary} turn {'pairs' if interleaved else 'halves'}"
        yield f"{name} forward", forward, (kernels, _triton)
        yield f"{name} backward", backward, (kernels, _triton)


WINDOW_AND_TEXT = dict(grid=(30, 48, 80), window=(18, 24, 24), stride=(6, 8, 8), text_len=256)


def attention(cases=((128, torch.bfloat16, WINDOW_AND_TEXT), (128, torch.bfloat16, {}))) -> Iterator[tuple]:
    """Hunyuan's clip, dense and in a window with text (every mask there is), with the tiles of each GPU."""
    from sora_kernels.attention import config, kernels_backward, kernels_forward
    from sora_kernels.attention.plan import resolve

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    rules = dict(grid=None, grids=None, window=None, stride=1, causal=None, sink=0, text_len=0, text_at="end")
    S = 30 * 48 * 80 + 256
    for (E, dtype, rule), sm in itertools.product(cases, SUPPORTED):
        q, k, v, out, dout, dq, dk, dv = (empty(1, S, 24, E, dtype=dtype) for _ in range(8))
        lse = empty(1, 24, S, dtype=torch.float32)
        mode = (None, *resolve("attention", S, S, *(rules | rule).values()), 0.1)

        def on_this_gpu(launch, *args, sm=sm):
            original, config.capability = config.capability, lambda device: sm
            try:
                launch(*args)
            finally:
                config.capability = original

        forward = functools.partial(on_this_gpu, kernels_forward.spacetime_attention_fwd, q, k, v, *mode, out, lse)
        backward = functools.partial(
            on_this_gpu, kernels_backward.spacetime_attention_bwd, dout, None, q, k, v, out, lse, *mode, dq, dk, dv
        )
        name = f"E={E} {str(dtype).removeprefix('torch.')} {'window and text' if rule else 'dense'}"
        yield f"{name} forward", forward, (kernels_forward,), (sm,)
        yield f"{name} backward", backward, (kernels_backward,), (sm,)


def attention_widths() -> Iterator[tuple]:
    """Every width and dtype that has tiles of its own: minutes."""
    half = [(E, torch.bfloat16, WINDOW_AND_TEXT) for E in (64, 72, 80, 96, 112, 256)]
    rest = [(E, torch.float32, WINDOW_AND_TEXT) for E in (64, 128, 256)] + [(128, torch.float16, WINDOW_AND_TEXT)]
    yield from attention((*half, *rest))


SUPPORTED = (80, 90, 100, 120)
FAMILIES = {"modulation": modulation, "qknorm_rope": qknorm_rope, "attention": attention}
SLOW = {"attention_widths": attention_widths}


def main() -> None:
    capabilities = [int(sm.removeprefix("sm_")) for sm in sys.argv[1].split(",")]
    for family in sys.argv[2:] or FAMILIES:
        for case, call, modules, *only in (FAMILIES | SLOW)[family]():
            targets = [c for c in capabilities if not only or c in only[0]]
            for kernel, args, kwargs in record(call, *modules) if targets else ():
                for capability in targets:
                    row = measure(kernel, args, kwargs, capability)
                    print(json.dumps(dict(family=family, case=case, sm=capability, **row)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    main()
