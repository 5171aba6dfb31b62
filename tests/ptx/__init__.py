"""Compiled GPU kernels executed on a CPU: the PTX of Triton (sm_80, sm_90) and nvcc, instruction by instruction.

The project's own Triton tests with compiled code, bf16 included, as sm_90 would run them:

    PYTHONPATH=tests python -m pytest -p ptx.plugin --ptx=90 tests/test_modulation.py -k triton

One call, in a process that imported triton without TRITON_INTERPRET (tests/ on the path):

    from ptx.launcher import triton_on
    with triton_on(90, schedule=3, observe=lambda kernel, counters: print(kernel.__name__, counters.traffic())):
        y = sora_kernels.norm_modulate(x, shift, scale, impl="triton")

Any PTX, Triton not needed: arguments in the order of the parameters, tensors on the CPU (or on the meta device: zeros
of any size, mapped when touched), numbers, None, Struct (by value), Box (a TMA descriptor):

    counters = ptx.run(text, grid=(8,), arguments=[x, out, 128], name="kernel", block=(128,), shared=4096)

A Fault names the source line, thread, program and buffer of: an access out of bounds or misaligned; a read of what was
never written; a race in shared memory between warps, or between lanes of one; an operand, accumulator or copy used
before its wait, or a fence missing; a deadlock, for registers too; a setmaxnreg in the wrong direction; a barrier for
part of a warp; no end.
`schedule` draws the order of programs and warps and when asynchronous copies and products take effect. Races through
global memory are seen where they change a bit under another schedule (`run_again`). Not seen: lanes that go on before
one that waits at an mbarrier for their warp has met them; the last bits of approximations and of the tensor cores'
sums, NaN payloads, time, and whatever ptxas does.

parser.py text -> instructions; decoder.py -> records; core/ executes them; device.py arguments, faults, counters;
launcher.py Triton's launches; plugin.py pytest.
"""

from .decoder import Program
from .device import CHECKS, Box, Counters, Fault, Struct, load, run, run_again, unwritten
from .parser import Unsupported

__all__ = [
    "CHECKS", "Box", "Counters", "Fault", "Program", "Struct", "Unsupported", "load", "run", "run_again", "unwritten",
]  # fmt: skip
