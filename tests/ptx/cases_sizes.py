"""Programs of launches at the sizes of models, in memory that is mapped when touched; run by tests/test_ptx.py."""

from __future__ import annotations

import re

import compile_kernels
import pytest
import torch

from ptx import Fault
from ptx.launcher import triton_on
from sora_kernels.modulation import kernels

FIRST_MIDDLE_LAST = (0, 1_000_003, -1)  # modulo the grid
CASES = {
    "modulation": ("D=5120 forward per token", "D=5120 backward per clip"),
    "qknorm_rope": (
        "40x128 across 128 turn pairs forward", "24x128 96 turn halves backward", "sums of 6x128 forward",
        "6x128 across ranks 128 turn pairs backward",
    ),
    "patchify": ("embed forward C=16 D=5120", "final forward C=48 D=3072", "frames of patches channels last"),
    "causal_conv": ("rms C=96 channels last forward", "rms C=96 channels last backward", "Wan up forward"),
    "watermark": ("mark 4x704x1280",),
}  # fmt: skip


def run(family: str, name: str, sm: int) -> None:
    """The case's launches, of each the first, a middle and the last program."""
    calls = {}
    for case, call, _, *only in compile_kernels.ALL[family]():
        if case == name:
            calls = dict.fromkeys(only[0] if only else [sm], call) | calls
    assert calls, f"{family} has no case {name!r}"
    if sm not in calls:
        pytest.skip(f"compiled for sm_{', sm_'.join(map(str, calls))} only")
    executed = []
    with triton_on(sm, lambda kernel, counters: executed.append(kernel), programs=FIRST_MIDDLE_LAST):
        calls[sm]()
    assert executed


@pytest.mark.parametrize("family, name", [(family, name) for family, names in CASES.items() for name in names])
def test_first_middle_and_last_program_stay_within_their_memory(family, name, pytestconfig):
    run(family, name, pytestconfig.getoption("--ptx"))


def test_an_offset_of_32_bits_is_found_where_it_overflows(pytestconfig):
    """Of rows of 5 GiB, the last: its offset in elements takes 33 bits."""
    x, out = (torch.empty(1, 500_000, 5120, dtype=torch.bfloat16, device="meta") for _ in range(2))
    shift, scale = (torch.empty(1, 1, 5120, dtype=torch.bfloat16, device="meta") for _ in range(2))

    def launch(rewrite) -> None:
        with triton_on(pytestconfig.getoption("--ptx"), programs=(0, -1), rewrite=rewrite):
            kernels.norm_modulate_fwd(x, shift, scale, *[None] * 5, False, 1e-6, 0, out)

    def in_32_bits(name: str, text: str) -> str:
        cut = r"\g<0>\n\tshl.b64 \t\1, \1, 32;\n\tshr.s64 \t\1, \1, 32;"
        changed, count = re.subn(r"m(?:ul|ad)\.lo\.s64 \t(%rd\d+), [^;]*;", cut, text)
        assert count
        return changed

    launch(None)
    with pytest.raises(Fault) as fault:
        launch(in_32_bits)
    assert fault.value.kind == "out of bounds" and "_ptr" in str(fault.value) and fault.value.program[0] > 0
