"""Snippets of PTX made into kernels and run, for the tests of the executor."""

from __future__ import annotations

import textwrap

import torch

from . import device

KINDS = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}


def module(body: str, parameters: str, threads: int = 32, sm: str = "sm_90a", shared: str = "") -> str:
    """A kernel named k around the body."""
    declared = ",\n".join(f".param {p}" for p in parameters.split(", "))
    registers = "\n".join(f".reg .{kind} %{name}<64>;" for kind, name in (
        ("pred", "p"), ("b16", "h"), ("b32", "r"), ("b64", "d")))  # fmt: skip
    return (
        f".version 8.4\n.target {sm}\n.address_size 64\n{shared}\n.visible .entry k(\n{declared}\n)\n"
        f".reqntid {threads}\n{{\n{registers}\n{textwrap.dedent(body)}\nret;\n}}\n"
    )


def per_element(instruction: str, *sources: torch.Tensor, result: torch.dtype) -> torch.Tensor:
    """`instruction` of {d} and {a}, {b}, {c}, executed for each element of the sources by a thread of its own."""
    names = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}
    size = torch.empty(0, dtype=result).element_size()
    body = [
        "mov.u32 %r50, %ctaid.x;", "mov.u32 %r51, %tid.x;", "mad.lo.s32 %r52, %r50, 32, %r51;",
    ]  # fmt: skip
    operands = {"d": f"{names[size]}40"}
    for n, (letter, tensor) in enumerate(zip("abc", sources, strict=False)):
        bytes_ = tensor.element_size()
        operands[letter] = f"{names[bytes_]}{n}"
        body += [
            f"ld.param.u64 %d{10 + n}, [{letter}];", f"mad.wide.s32 %d{20 + n}, %r52, {bytes_}, %d{10 + n};",
            f"ld.global.{KINDS[bytes_]} {operands[letter]}, [%d{20 + n}];",
        ]  # fmt: skip
    body += [
        instruction.format(**operands), "ld.param.u64 %d30, [out];", f"mad.wide.s32 %d31, %r52, {size}, %d30;",
        f"st.global.{KINDS[size]} [%d31], {operands['d']};",
    ]  # fmt: skip
    count = sources[0].numel()
    assert count % 32 == 0
    out = torch.zeros(count, dtype=result)
    parameters = ", ".join([f".u64 {letter}" for letter in "abc"[: len(sources)]] + [".u64 out"])
    device.run(module("\n".join(body), parameters), (count // 32,), [*sources, out], checks=())
    return out


def run(body, arguments, parameters, threads=32, shared=1024, sm="sm_90a", **options):
    text = module(body, parameters, threads, sm, ".extern .shared .align 1024 .b8 s[];")
    return device.run(text, (1,), arguments, shared=shared, **options)


THREAD = "mov.u32 %r1, %tid.x;\nmov.u32 %r3, s;\n"
