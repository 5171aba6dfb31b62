"""The executor of PTX: matrices, asynchronous copies and products, barriers; the faults between warps that it names."""

from __future__ import annotations

import itertools

import pytest
import torch
from ptx.snippets import THREAD, run

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def each(count: int, form: str, first: int, step: int = 1, start: int = 0) -> str:
    """The line for each of `count` registers from `first`, with start, start + step, ..."""
    return "\n".join(form.format(first + n, start + n * step) for n in range(count))


def listed(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


def packed(elements: list[torch.Tensor]) -> torch.Tensor:
    """One element, or two side by side, as int32."""
    return torch.stack(elements, 1).contiguous().view(torch.int32)[:, 0]


def fragment(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """A left operand [16, K] as the registers of a warp, [registers, 32] of int32, by the manual's figures."""
    pair = 1 if name == "tf32" else 2
    K = matrix.shape[1]
    registers = []
    for right, down in itertools.product(range(K // (4 * pair)), range(2)):
        lane = torch.arange(32)
        row, column = lane // 4 + 8 * down, lane % 4 * pair + 4 * pair * right
        registers.append(
            torch.stack([matrix[row, column + p] for p in range(pair)], 1).contiguous().view(torch.int32)[:, 0]
        )
    return torch.stack(registers)


def right_fragment(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """A right operand [K, 8] likewise."""
    pair = 1 if name == "tf32" else 2
    lane, registers = torch.arange(32), []
    for down in range(matrix.shape[0] // (4 * pair)):
        row, column = lane % 4 * pair + 4 * pair * down, lane // 4
        registers.append(
            torch.stack([matrix[row + p, column] for p in range(pair)], 1).contiguous().view(torch.int32)[:, 0]
        )
    return torch.stack(registers)


def accumulators(values: torch.Tensor) -> torch.Tensor:
    """[registers, lanes] of a 16 x N result -> the matrix."""
    lanes = values.shape[1]
    result = torch.empty(16 * lanes // 32, values.shape[0] * 2)
    for register, lane in itertools.product(range(values.shape[0]), range(lanes)):
        row = lane // 32 * 16 + lane % 32 // 4 + 8 * (register // 2 % 2)
        result[row, register // 4 * 8 + lane % 4 * 2 + register % 2] = values[register, lane]
    return result


@pytest.mark.parametrize("name, K", [("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(name, K):
    a, b = torch.randn(16, K).to(DTYPES[name]), torch.randn(K, 8).to(DTYPES[name])
    if name == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    left, right, out = fragment(a, name), right_fragment(b, name), torch.zeros(4, 32)
    operands = ", ".join(listed(*x) for x in ((30, 4), (10, len(left)), (20, len(right)), (30, 4)))
    body = (
        THREAD
        + f"""ld.param.u64 %d1, [a];
    ld.param.u64 %d2, [b];
    ld.param.u64 %d3, [out];
    {each(3, "mad.wide.s32 %d{0}, %r1, 4, %d{1};", 4, 1, 1)}
    {each(len(left), "ld.global.b32 %r{0}, [%d4+{1}];", 10, 128)}
    {each(len(right), "ld.global.b32 %r{0}, [%d5+{1}];", 20, 128)}
    {each(4, "mov.b32 %r{0}, 0f3F800000;", 30)}
    mma.sync.aligned.m16n8k{K}.row.col.f32.{name}.{name}.f32 {operands};
    {each(4, "st.global.b32 [%d6+{1}], %r{0};", 30, 128)}"""
    )
    run(body, [left, right, out], ".u64 a, .u64 b, .u64 out")
    torch.testing.assert_close(accumulators(out).double(), 1 + a.double() @ b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_to_and_from_shared_memory(trans):
    """stmatrix puts where ldmatrix takes; a transposed one is the transpose."""
    x, out = torch.arange(256, dtype=torch.int16), torch.zeros(4, 32, dtype=torch.int32)
    body = (
        THREAD
        + f"""ld.param.u64 %d1, [x];
    ld.param.u64 %d2, [out];
    mad.wide.s32 %d3, %r1, 16, %d1;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d3];
    mad.lo.s32 %r8, %r1, 16, %r3;
    st.shared.v4.b32 [%r8], {{%r4, %r5, %r6, %r7}};
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r8];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r8+512], {{%r10, %r11, %r12, %r13}};
    ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r8+512];
    st.global.v4.b32 [%d3], {{%r14, %r15, %r16, %r17}};
    mad.wide.s32 %d4, %r1, 4, %d2;
    st.global.b32 [%d4], %r10;
    st.global.b32 [%d4+128], %r11;
    st.global.b32 [%d4+256], %r12;
    st.global.b32 [%d4+384], %r13;"""
    )
    before = x.clone()
    run(body, [x, out], ".u64 x, .u64 out")
    assert torch.equal(x, before)
    tiles = before.view(4, 8, 8)
    want = (tiles.mT if trans else tiles).contiguous().view(torch.int32).view(4, 32)
    assert torch.equal(out, want)


def swizzle(address: int, bits: int) -> int:
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


def arranged(matrix: torch.Tensor, bits: int, transposed: bool) -> tuple[torch.Tensor, int, int]:
    """[rows, K] as wgmma reads it from shared memory, with the two byte offsets of its descriptor."""
    rows, K = matrix.shape
    size, row = matrix.element_size(), 16 << bits
    flat = torch.zeros(64 * 1024 // size, dtype=matrix.dtype)
    leading, stride = 4096 if transposed and bits else 128 * rows // 8, 8 * row
    for r, k in itertools.product(range(rows), range(K)):
        if transposed:
            wide = row // size
            at = r % wide * size + r // wide * leading + k % 8 * row + k // 8 * stride
        elif bits:
            at = r // 8 * stride + r % 8 * row + k * size
        else:
            at = r // 8 * 128 + r % 8 * 16 + k * size // 16 * leading + k * size % 16
        flat[swizzle(at, bits) // size] = matrix[r, k]
    return flat, leading, 128 if not bits else stride


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, bits, transposed, from_registers", [
    ("bf16", 3, False, False), ("bf16", 2, False, False), ("bf16", 1, False, False), ("bf16", 0, False, False),
    ("bf16", 3, True, False), ("f16", 2, True, True), ("f16", 1, True, False), ("bf16", 3, False, True),
    ("tf32", 3, False, False), ("tf32", 1, False, True),
])  # fmt: skip
def test_wgmma(name, bits, transposed, from_registers, seed):
    """64 x 32 x 16: a from shared memory or registers, both operands in one layout."""
    N, K = 32, 8 if name == "tf32" else 16
    a, b = torch.randn(64, K).to(DTYPES[name]), torch.randn(N, K).to(DTYPES[name])
    if name == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    (left, *offsets), (right, leading, _) = arranged(a, bits, transposed), arranged(b, bits, transposed)
    image = torch.cat([left[: 16384 // left.element_size()], right[: 16384 // right.element_size()]]).view(torch.int32)
    registers = torch.cat([fragment(a[16 * w : 16 * w + 16], name) for w in range(4)], 1)
    out = torch.zeros(N // 2, 128)

    def descriptor(start, leading):
        return (0x400 + start) >> 4 | leading >> 4 << 16 | offsets[1] >> 4 << 32 | (4 - bits if bits else 0) << 62

    flags = f"1, 1{f', {int(transposed)}' * (2 - from_registers) if name != 'tf32' else ''}"
    of = listed(10, len(registers)) if from_registers else "%d10"
    body = (
        THREAD
        + f"""ld.param.u64 %d1, [image];
    ld.param.u64 %d2, [a];
    ld.param.u64 %d3, [out];
    mad.wide.s32 %d4, %r1, 4, %d1;
    mad.wide.s32 %d5, %r1, 4, %d2;
    mad.wide.s32 %d6, %r1, 4, %d3;
    mad.lo.s32 %r4, %r1, 4, %r3;
    mov.b32 %r5, 0;
    copy:
    ld.global.b32 %r6, [%d4];
    st.shared.b32 [%r4], %r6;
    add.s64 %d4, %d4, 512;
    add.s32 %r4, %r4, 512;
    add.s32 %r5, %r5, 1;
    setp.lt.s32 %p1, %r5, 64;
    @%p1 bra copy;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {each(len(registers), "ld.global.b32 %r{0}, [%d5+{1}];", 10, 512)}
    {each(N // 2, "mov.b32 %r{0}, 0f3F800000;", 20)}
    mov.b64 %d10, {descriptor(0, offsets[0])};
    mov.b64 %d11, {descriptor(16384, leading)};
    mov.pred %p2, -1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{N}k{K}.f32.{name}.{name} {listed(20, N // 2)}, {of}, %d11, %p2, {flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {each(N // 2, "st.global.b32 [%d6+{1}], %r{0};", 20, 512)}"""
    )
    run(body, [image, registers, out], ".u64 image, .u64 a, .u64 out", 128, 32768, schedule=seed)
    torch.testing.assert_close(accumulators(out).double(), 1 + a.double() @ b.double().T, rtol=1e-6, atol=1e-6)
