"""The executor of PTX: setmaxnreg, by which groups of warps pass on registers."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx.snippets import module

REGISTERS = """shr.u32 %r2, %r1, 7;
setp.eq.u32 %p1, %r2, 0;
@%p1 bra give;
setmaxnreg.inc.sync.aligned.u32 192;
bra end;
give:
setmaxnreg.dec.sync.aligned.u32 64;
end:
"""


CHANGES = {  # name -> pattern, replacement, kind of fault, its message
    "fits": ("", "", None, ""),
    "more than there are": ("u32 192", "u32 200", "deadlock", "wait for registers, of which 40 .*setmaxnreg.inc"),
    "none given back": ("setmaxnreg.dec.sync.aligned.u32 64;", "", "deadlock", "registers, of which 0 a thread"),
    "more in giving": ("u32 64", "u32 136", "registers", "falls to 136 registers, of a thread that has 128"),
    "less in taking": ("u32 192", "u32 120", "registers", "rises to 120 registers, of a thread that has 128"),
    "half a warp": ("%r1, 7", "%r1, 4", "barrier", "by a part of the warp only"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_registers_of_warp_groups_come_out_of_what_others_give_back(name):
    pattern, replacement, kind, message = CHANGES[name]
    assert pattern in REGISTERS
    text = module("mov.u32 %r1, %tid.x;\n" + REGISTERS.replace(pattern, replacement, 1), ".u64 out", 256)
    text = text.replace(".reqntid 256", ".reqntid 256\n.maxnreg 128")
    for schedule in range(3):
        if kind is None:
            counters = ptx.run(text, (2,), [torch.zeros(1)], schedule=schedule)
            assert counters.instructions()["setmaxnreg"] >= 2 * 8
            continue
        with pytest.raises(ptx.Fault, match=f"(?s){message}") as fault:
            ptx.run(text, (2,), [torch.zeros(1)], schedule=schedule)
        assert fault.value.kind == kind


@pytest.mark.parametrize("count, head, message", [
    ("20", ".maxnreg 128", "24 to 256 registers, in multiples of 8"), ("40", "", "ptxas ignores this without .maxnreg"),
])  # fmt: skip
def test_what_setmaxnreg_cannot_do_is_refused(count, head, message):
    text = module(f"setmaxnreg.dec.sync.aligned.u32 {count};", ".u64 out", 128)
    with pytest.raises(ptx.Unsupported, match=message):
        ptx.run(text.replace(".reqntid 128", f".reqntid 128\n{head}"), (1,), [torch.zeros(1)])


def test_launch_bounds_say_how_many_registers_a_thread_begins_with():
    text = module("setmaxnreg.inc.sync.aligned.u32 176;", ".u64 out", 384)
    text = text.replace(".reqntid 384", ".maxntid 384\n.minnctapersm 1")
    with pytest.raises(ptx.Fault, match="of which 0 a thread are left"):
        ptx.run(text, (1,), [torch.zeros(1)], block=(384,))
    ptx.run(text.replace("32 176", "32 168"), (1,), [torch.zeros(1)], block=(384,))
