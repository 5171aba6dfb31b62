"""The executor of PTX: matrices, asynchronous copies and products, barriers; the faults between warps that it names."""

from __future__ import annotations

import itertools

import ptx
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


def product(name: str, bits: int, transposed: bool, from_registers: bool):
    """The body of a kernel of 64 x 32 x 16 (a from shared memory or registers), its arguments, and what comes out."""
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
    arguments = [image, registers, out]
    return body, arguments, lambda: accumulators(out).double(), 1 + a.double() @ b.double().T


PRODUCT = ".u64 image, .u64 a, .u64 out"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, bits, transposed, from_registers", [
    ("bf16", 3, False, False), ("bf16", 2, False, False), ("bf16", 1, False, False), ("bf16", 0, False, False),
    ("bf16", 3, True, False), ("f16", 2, True, True), ("f16", 1, True, False), ("bf16", 3, False, True),
    ("tf32", 3, False, False), ("tf32", 1, False, True),
])  # fmt: skip
def test_wgmma(name, bits, transposed, from_registers, seed):
    body, arguments, result, expected = product(name, bits, transposed, from_registers)
    run(body, arguments, PRODUCT, 128, 32768, schedule=seed)
    torch.testing.assert_close(result(), expected, rtol=1e-6, atol=1e-6)


def faults(body: str, *arguments, kinds: tuple[str, ...], seeds: int = 4, **options) -> set[str]:
    """The kinds of fault, one of `kinds` under every schedule, and the messages."""
    messages = set()
    for seed in range(seeds):
        with pytest.raises(ptx.Fault) as fault:
            run(body, *arguments, schedule=seed, **options)
        assert fault.value.kind in kinds, str(fault.value)
        messages.add(str(fault.value))
    return messages


@pytest.mark.parametrize("line, says", [
    ("wgmma.wait_group.sync.aligned 0;", "before wgmma.wait_group"),
    ("wgmma.fence.sync.aligned;", "written since the last wgmma.fence"),
    ("fence.proxy.async.shared::cta;", "no fence.proxy.async between"),
])  # fmt: skip
@pytest.mark.parametrize("from_registers", [False, True])
def test_what_a_wgmma_must_wait_for(line, says, from_registers):
    body, arguments, *_ = product("bf16", 3, False, from_registers)
    found = faults(body.replace(line, ""), arguments, PRODUCT, 128, 32768, kinds=("asynchrony",))
    assert all(says in message for message in found), found


def test_a_wgmma_reads_its_operands_until_its_wait():
    body, arguments, *_ = product("bf16", 3, False, True)
    commit = "wgmma.commit_group.sync.aligned;"
    written = body.replace(commit, commit + "\nst.shared.b32 [%r3+16384], %r1;")
    assert "may still read" in faults(written, arguments, PRODUCT, 128, 32768, kinds=("asynchrony", "race")).pop()
    overwritten = body.replace(commit, commit + "\nmov.b32 %r10, 0;")
    assert "overwrites an operand" in faults(overwritten, arguments, PRODUCT, 128, 32768, kinds=("asynchrony",)).pop()


# ---- copies --------------------------------------------------------------------------------------------------------

COPY = (
    THREAD
    + """ld.param.u64 %d1, [x];
mad.wide.s32 %d2, %r1, 16, %d1;
mad.lo.s32 %r4, %r1, 16, %r3;
mov.b32 %r5, 12;
cp.async.cg.shared.global [%r4], [%d2], 16, %r5;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
xor.b32 %r6, %r1, 32;
mad.lo.s32 %r7, %r6, 16, %r3;
ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r7];
st.global.v4.b32 [%d2], {%r8, %r9, %r10, %r11};"""
)


def test_a_copy_fills_with_zeros_and_lands_by_its_wait():
    for seed in range(4):
        x = torch.arange(256, dtype=torch.int32) + 1
        want = x.view(64, 4).roll(32, 0).clone()
        want[:, 3] = 0
        run(COPY, [x], ".u64 x", 64, schedule=seed)
        assert torch.equal(x.view(64, 4), want)


@pytest.mark.parametrize("line, kinds", [
    ("cp.async.wait_group 0;", ("asynchrony", "race", "uninitialised")),
    ("cp.async.commit_group;", ("asynchrony", "race", "uninitialised")),
    ("bar.sync 0;", ("race", "asynchrony", "uninitialised")),
])  # fmt: skip
def test_what_a_copy_must_wait_for(line, kinds):
    faults(COPY.replace(line, "", 1), [torch.zeros(256)], ".u64 x", 64, kinds=kinds)


BOX = (
    THREAD
    + """setp.eq.s32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
bar.sync 0;
mov.b64 %d1, m;
cvta.param.u64 %d2, %d1;
mov.b64 %d3, n;
mov.b32 %r10, -8;
mov.b32 %r11, 8;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r3+1024], [%d2, {%r10, %r11}], [%r3];
mov.b32 %r4, 0;
again:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], %r4;
@!%p2 bra again;
ld.param.u64 %d4, [out];
and.b32 %r5, %r1, 31;
mad.wide.s32 %d5, %r5, 16, %d4;
mad.lo.s32 %r6, %r5, 16, %r3;
ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r6+1024];
st.global.v4.b32 [%d5], {%r20, %r21, %r22, %r23};
bar.sync 0;
st.shared.v4.b32 [%r6+1024], {%r20, %r21, %r22, %r23};
fence.proxy.async.shared::cta;
bar.sync 0;
@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d3, {%r10, %r11}], [%r3+1024];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;"""
)
BOXES = ".align 64 .b8 m[128], .align 64 .b8 n[128], .u64 out"


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_boxes_there_and_back(bits):
    """A box of 512 bytes at (8, -8) of [10, 40]: zeros outside, 16-byte pieces swizzled, stored as loaded."""
    width = 8 << bits if bits else 64
    box, inside = (256 // width, width), min(width, 48) - 8
    for seed in range(3):
        x, back = torch.randn(10, 40).bfloat16(), torch.zeros(10, 40).bfloat16()
        out = torch.zeros(256, dtype=torch.bfloat16)
        counters = run(BOX, [ptx.Box(x, box, bits), ptx.Box(back, box, bits), out], BOXES, 64, 2048, schedule=seed)
        padded = torch.zeros(box).bfloat16()
        padded[:2, 8 : 8 + inside] = x[8:, :inside]
        want = torch.empty(256, dtype=torch.bfloat16)
        for piece in range(32):
            at = swizzle(0x800 + 16 * piece, bits) - 0x800 >> 1
            want[at : at + 8] = padded.view(32, 8)[piece]
        assert torch.equal(out, want)
        assert (
            torch.equal(back[8:, :inside], x[8:, :inside]) and (back[:8] == 0).all() and (back[8:, inside:] == 0).all()
        )
        traffic = counters.traffic()["cp.async.bulk"]
        assert (traffic["requests"], traffic["bytes"]) == (2, 2 * inside * 2 + 512)


def test_boxes_that_no_descriptor_takes():
    x, out = torch.zeros(10, 40).bfloat16(), torch.zeros(256).bfloat16()
    for box in (ptx.Box(x, (4, 64), 1), ptx.Box(x[:, 1:], (4, 64)), ptx.Box(x.T, (4, 64)), ptx.Box(x, (300, 8))):
        with pytest.raises(ValueError, match="argument 0"):
            run(BOX, [box, ptx.Box(x, (4, 64)), out], BOXES, 64, 2048)


WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], %r4;\n@!%p2 bra again;"


@pytest.mark.parametrize("line, kinds", [
    (WAIT, ("race", "asynchrony", "uninitialised")), ("fence.proxy.async.shared::cta;", ("asynchrony",)),
    ("cp.async.bulk.wait_group.read 0;", ("asynchrony",)), ("bar.sync 0;", ("race", "asynchrony", "uninitialised")),
    ("@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;", ("deadlock",)),
])  # fmt: skip
def test_what_boxes_must_wait_for(line, kinds):
    x, out = torch.zeros(10, 40).bfloat16(), torch.zeros(256).bfloat16()
    arguments = [ptx.Box(x, (4, 64)), ptx.Box(torch.zeros(10, 40).bfloat16(), (4, 64)), out]
    faults(BOX.replace(line, ""), arguments, BOXES, 64, 2048, kinds=kinds, seeds=8)


# ---- barriers and races --------------------------------------------------------------------------------------------

EXCHANGE = (
    THREAD
    + """mad.lo.s32 %r4, %r1, 4, %r3;
st.shared.b32 [%r4], %r1;
bar.sync 0;
xor.b32 %r5, %r4, 128;
ld.shared.b32 %r6, [%r5];
bar.sync 0;
st.shared.b32 [%r4], %r6;"""
)


def test_barriers_order_warps():
    run(EXCHANGE, [1], ".u32 x", 64)
    first, second = EXCHANGE.replace("bar.sync 0;", "", 1), EXCHANGE[::-1].replace(";0 cnys.rab", "", 1)[::-1]
    faults(first, [1], ".u32 x", 64, kinds=("race", "uninitialised"))
    found = faults(second, [1], ".u32 x", 64, kinds=("race",), seeds=64)
    assert any("read, with no barrier between" in message for message in found)
    assert any("wrote, with no barrier between" in message for message in found)


def test_the_same_value_written_twice_is_no_race():
    write = THREAD + "shr.u32 %r5, %r1, {};\nst.shared.b32 [%r3], %r5;"
    run(write.format(6), [1], ".u32 x", 64)
    faults(write.format(5), [1], ".u32 x", 64, kinds=("race",))


def test_named_barriers():
    """Warp 0 writes and arrives; warp 1 waits for it, and no other."""
    body = (
        THREAD
        + """setp.lt.s32 %p1, %r1, 32;
    @%p1 st.shared.b32 [%r3], %r3;
    @%p1 bar.arrive 1, 64;
    @!%p1 bar.sync 1, 64;
    @!%p1 ld.shared.b32 %r4, [%r3];"""
    )
    for seed in range(4):
        run(body, [1], ".u32 x", 64, schedule=seed)
    faults(body.replace("bar.arrive 1, 64", "bar.arrive 2, 64"), [1], ".u32 x", 64, kinds=("deadlock",))


AMONG_LANES = (
    THREAD
    + """mad.lo.s32 %r4, %r1, 4, %r3;
st.shared.b32 [%r4], %r1;
bar.warp.sync -1;
xor.b32 %r5, %r4, 4;
ld.shared.b32 %r6, [%r5];
bar.warp.sync -1;
st.shared.b32 [%r4], %r6;"""
)


@pytest.mark.parametrize("order", ["bar.warp.sync -1;", "bar.sync 0;"])
def test_lanes_that_exchange_wait_for_each_other(order):
    body = AMONG_LANES.replace("bar.warp.sync -1;", order)
    run(body, [1], ".u32 x")
    found = faults(body.replace(order, "", 1), [1], ".u32 x", 32, kinds=("race",), seeds=1)
    assert "reads shared byte 4, which lane 1 wrote, with no bar.warp.sync between" in found.pop()
    found = faults(body[::-1].replace(order[::-1], "", 1)[::-1], [1], ".u32 x", 32, kinds=("race",), seeds=1)
    assert "writes shared byte 0, which lane 1 read, with no bar.warp.sync between" in found.pop()
    twice = THREAD + "mov.b16 %h1, 0;\nshr.u32 %r5, %r1, {};\nsetp.eq.s32 %p1, %r1, 0;\nst.shared.b32 [%r3], %r5;\n{}"
    twice += "@%p1 st.shared.b16 [%r3], %h1;"
    run(twice.format(5, ""), [1], ".u32 x")
    run(twice.format(0, order), [1], ".u32 x")
    found = faults(twice.format(0, ""), [1], ".u32 x", 32, kinds=("race",), seeds=1)
    assert "which lane 31 wrote with another value, with no bar.warp.sync between" in found.pop()


ARRIVAL = (
    THREAD
    + """and.b32 %r2, %r1, 31;
setp.eq.s32 %p1, %r2, 0;
setp.lt.s32 %p2, %r1, 32;
mad.lo.s32 %r4, %r2, 4, %r3;
setp.eq.s32 %p3, %r1, 0;
@%p3 mbarrier.init.shared::cta.b64 [%r3+512], {arrivals};
bar.sync 0;
@!%p2 bra others;
st.shared.b32 [%r4], %r1;
{order}
{who}mbarrier.arrive.shared::cta.b64 _, [%r3+512];
bra end;
others:
mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r3+512], 0;
@!%p4 bra others;
ld.shared.b32 %r6, [%r4];
end:"""
)


def test_a_lane_that_arrives_for_others_waits_for_them():
    for order, who, arrivals in (("bar.warp.sync -1;", "@%p1 ", 1), ("", "", 32)):
        for seed in range(4):
            run(ARRIVAL.format(order=order, who=who, arrivals=arrivals), [1], ".u32 x", 64, schedule=seed)
    found = faults(ARRIVAL.format(order="", who="@%p1 ", arrivals=1), [1], ".u32 x", 64, kinds=("race",))
    assert "which warp 0 wrote, with no barrier between" in found.pop()


LINE = (
    THREAD
    + """ld.param.u64 %d1, [out];
setp.eq.s32 %p1, %r1, 0;
mad.lo.s32 %r4, %r1, 4, %r3;
st.shared.b32 [%r4], %r1;
fence.proxy.async.shared::cta;
bar.warp.sync -1;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r3], 128;
@%p1 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0;
bar.warp.sync 0xffffffff;
st.shared.b32 [%r4], %r3;"""
)


def test_a_lane_that_stores_for_others_waits_for_them_and_they_for_it():
    out = torch.zeros(32, dtype=torch.int32)
    run(LINE, [out], ".u64 out")
    assert torch.equal(out, torch.arange(32, dtype=torch.int32))
    for order, says in (("bar.warp.sync -1;", "reads shared byte 4, which lane 1 wrote"),
                        ("bar.warp.sync 0xffffffff;", "writes shared byte 4, which lane 0 read")):  # fmt: skip
        found = faults(LINE.replace(order, ""), [out], ".u64 out", 32, kinds=("race",), seeds=1)
        assert says in found.pop()


def test_a_deadlock_says_where_each_warp_stands():
    body = THREAD + "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra out;\nbar.sync 0;\nout:"
    message = faults(body, [1], ".u32 x", 96, kinds=("deadlock",)).pop()
    assert "warps 1, 2: ?: bar.sync 0;" in message and "warps 0: left" in message


def test_a_barrier_in_a_part_of_a_warp():
    body = THREAD + "setp.lt.s32 %p1, %r1, 16;\n@%p1 bar.sync 0;"
    assert "lanes 0000ffff of ffffffff" in faults(body, [1], ".u32 x", 32, kinds=("barrier",)).pop()
    shuffle = THREAD + "setp.lt.s32 %p1, %r1, 16;\n@%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;"
    assert "elsewhere" in faults(shuffle, [1], ".u32 x", 32, kinds=("barrier",)).pop()


def test_no_end():
    body = THREAD + "again:\nadd.s32 %r1, %r1, 1;\nbra again;"
    for threads in (32, 64):
        message = faults(body, [1], ".u32 x", threads, kinds=("endless",), budget=1000, seeds=1).pop()
        assert "warps 0" in message and "bra again" in message or "add.s32" in message
