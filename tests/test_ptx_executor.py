"""The executor of PTX, by snippets of PTX: every class of instruction against numpy and torch, every fault it names."""

from __future__ import annotations

import re

import numpy as np
import ptx
import pytest
import torch
from ptx.snippets import THREAD, module, per_element, run


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def every_half(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(values.isnan(), torch.zeros((), dtype=dtype), values)


def floats(count: int = 1 << 14) -> torch.Tensor:
    """Bit patterns of every magnitude, with the ties and borders of the half formats among them."""
    values = torch.randint(-(2**31), 2**31 - 1, (count,)).to(torch.int32).view(torch.float32)
    halves = torch.cat([every_half(torch.bfloat16).float(), every_half(torch.float16).float()])
    neighbours = halves[torch.randint(0, halves.numel(), (count,))]
    ties = (
        neighbours.view(torch.int32) + torch.tensor([0x8000, 0x1000, 0x7FFF, 1])[torch.arange(count) % 4].int()
    ).view(torch.float32)
    found = torch.cat([values, ties])
    return torch.where(found.isnan(), torch.ones(()), found)


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_conversions_between_floats_are_those_of_torch_to_the_bit(dtype, name):
    halves = every_half(dtype)
    widened = per_element(f"cvt.f32.{name} {{d}}, {{a}};", halves, result=torch.float32)
    assert torch.equal(bits(widened), bits(halves.float()))
    x = floats()
    narrowed = per_element(f"cvt.rn.{name}.f32 {{d}}, {{a}};", x, result=dtype)
    assert torch.equal(bits(narrowed), bits(x.to(dtype)))
    y = x.flip(0)
    pair = per_element(f"cvt.rn.{name}x2.f32 {{d}}, {{a}}, {{b}};", x, y, result=torch.int32)
    assert torch.equal(pair.view(torch.int16).view(-1, 2), torch.stack([bits(y.to(dtype)), bits(x.to(dtype))], 1))


def test_rounding_towards_zero_cuts():
    x = floats()
    cut = per_element("cvt.rz.bf16.f32 {d}, {a};", x, result=torch.bfloat16)
    assert torch.equal(bits(cut), (x.view(torch.int32) >> 16).to(torch.int16))
    finite = x[x.abs() < 60000]
    finite = finite[: finite.numel() // 32 * 32]
    half = per_element("cvt.rz.f16.f32 {d}, {a};", finite, result=torch.float16).float()
    nearest = finite.half().float()
    assert (half.abs() <= finite.abs()).all() and ((half == nearest) | (nearest.abs() > finite.abs())).all()


def test_tf32_keeps_ten_bits_and_rounds_ties_away():
    x = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-23, -(1 + 3 * 2**-11), 1.5] * 8)
    got = per_element("cvt.rna.tf32.f32 {d}, {a};", x, result=torch.float32)
    assert got[:4].tolist() == [1 + 2**-10, 1.0, -(1 + 2 * 2**-10), 1.5]


INTEGRAL = dict(rni=torch.round, rzi=torch.trunc, rmi=torch.floor, rpi=torch.ceil)


@pytest.mark.parametrize("mode", INTEGRAL)
def test_floats_to_integers_saturate(mode):
    x = torch.cat([floats(1 << 10), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 2.0**63] * 4)])
    whole = INTEGRAL[mode](x.double())
    signed = per_element(f"cvt.{mode}.s32.f32 {{d}}, {{a}};", x, result=torch.int32)
    assert torch.equal(signed.double(), whole.clamp(-(2.0**31), 2.0**31 - 1))
    byte = per_element(f"cvt.{mode}.u8.f32 {{d}}, {{a}};", x, result=torch.int16)
    assert torch.equal(byte.double(), whole.clamp(0, 255))


def test_integers_to_floats():
    x = torch.randint(-(2**31), 2**31 - 1, (1024,)).to(torch.int32)
    assert torch.equal(per_element("cvt.rn.f32.s32 {d}, {a};", x, result=torch.float32), x.float())
    unsigned = torch.from_numpy(x.numpy().view(np.uint32).astype(np.float32))
    assert torch.equal(per_element("cvt.rn.f32.u32 {d}, {a};", x, result=torch.float32), unsigned)
    cut = per_element("cvt.rz.f32.s32 {d}, {a};", x, result=torch.float32).double()
    assert (cut.abs() <= x.double().abs()).all() and (cut - x.double()).abs().max() < 256
    long = torch.randint(-(2**62), 2**62, (1024,))
    assert torch.equal(per_element("cvt.rn.f32.s64 {d}, {a};", long, result=torch.float32), long.float())


def wrapped(function):
    """On numpy integers, where what overflows wraps."""

    def apply(*arrays):
        with np.errstate(all="ignore"):
            return function(*arrays)

    return apply


INTEGERS = {  # opcode -> numpy type, function
    "add.s32": (np.int32, np.add), "sub.u32": (np.uint32, np.subtract), "mul.lo.s32": (np.int32, np.multiply),
    "add.s64": (np.int64, np.add), "mul.lo.s64": (np.int64, np.multiply), "sub.s16": (np.int16, np.subtract),
    "mul.lo.s16": (np.int16, np.multiply), "min.s32": (np.int32, np.minimum), "max.u32": (np.uint32, np.maximum),
    "min.s64": (np.int64, np.minimum), "and.b32": (np.uint32, np.bitwise_and), "xor.b64": (np.uint64, np.bitwise_xor),
    "or.b16": (np.uint16, np.bitwise_or), "max.s16": (np.int16, np.maximum),
    "div.s32": (np.int32, lambda a, b: np.trunc(a / b.astype(float))), "div.u32": (np.uint32, np.floor_divide),
    "rem.s32": (np.int32, np.fmod), "rem.u32": (np.uint32, np.remainder),
    "div.s64": (np.int64, lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))),
    "mul.hi.u32": (np.uint32, lambda a, b: a.astype(np.uint64) * b >> 32),
    "mul.hi.s32": (np.int32, lambda a, b: a.astype(np.int64) * b >> 32),
    "mul.hi.u16": (np.uint16, lambda a, b: a.astype(np.uint32) * b >> 16),
}  # fmt: skip


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integer_arithmetic(opcode):
    kind, function = INTEGERS[opcode]
    info, generator = np.iinfo(kind), np.random.default_rng(0)
    a, b = (generator.integers(info.min, info.max, 1024, kind, endpoint=True) for _ in range(2))
    b[:256] = generator.integers(1, 100, 256)
    a[:4], b[:4] = info.max, 1
    b[b == 0] = 7
    signed = {2: np.int16, 4: np.int32, 8: np.int64}[a.itemsize]
    ta, tb = (torch.from_numpy(x.view(signed)) for x in (a, b))
    got = per_element(f"{opcode} {{d}}, {{a}}, {{b}};", ta, tb, result=ta.dtype).numpy().view(kind)
    np.testing.assert_array_equal(got, wrapped(function)(a, b).astype(kind))


def test_wide_products_shifts_and_fields():
    a = torch.randint(-(2**31), 2**31 - 1, (512,)).to(torch.int32)
    b, c = a.flip(0), torch.randint(-(2**62), 2**62, (512,))
    wide = per_element("mad.wide.s32 {d}, {a}, {b}, {c};", a, b, c, result=torch.int64)
    assert torch.equal(wide, a.long() * b.long() + c)
    by = torch.randint(0, 40, (512,), dtype=torch.int32)
    left = per_element("shl.b32 {d}, {a}, {b};", a, by, result=torch.int32)
    assert torch.equal(left, torch.where(by < 32, a << by.clamp(max=31), torch.zeros((), dtype=torch.int32)))
    right = per_element("shr.s32 {d}, {a}, {b};", a, by, result=torch.int32)
    assert torch.equal(right, a >> by.clamp(max=31))
    field = per_element("bfe.s32 {d}, {a}, 7, 5;", a, result=torch.int32)
    assert torch.equal(field, (a << 20) >> 27)
    inserted = per_element("bfi.b32 {d}, {a}, {b}, 4, 8;", a, b, result=torch.int32)
    assert torch.equal(inserted, (b & ~0xFF0) | ((a & 0xFF) << 4))
    mixed = per_element("lop3.b32 {d}, {a}, {b}, {c}, 0xCA;", a, b, by, result=torch.int32)
    assert torch.equal(mixed, (a & b) | (~a & by)), "the table of a ? b : c"
    rotated = per_element("shf.l.wrap.b32 {d}, {a}, {a}, 9;", a, result=torch.int32)
    assert torch.equal(
        rotated, torch.from_numpy((a.numpy().view(np.uint32) << 9 | a.numpy().view(np.uint32) >> 23).view(np.int32))
    )


def test_permuted_bytes():
    a, b = (
        torch.full((32,), 0x03020100, dtype=torch.int32),
        torch.full((32,), 0x07068504, dtype=torch.int32),
    )
    got = per_element("prmt.b32 {d}, {a}, {b}, 0x7D31;", a, b, result=torch.int32)
    assert got[0].item() & 0xFFFFFFFF == 0x07FF0301, "the sign of byte 5 is spread where the selector's top bit is set"


def test_fp32_arithmetic_is_ieee():
    a, b, c = (torch.rand(1024) * 1.5 + 0.5 for _ in range(3))
    for opcode, want in (("add.f32", a + b), ("sub.rn.f32", a - b), ("mul.f32", a * b), ("div.rn.f32", a / b)):
        assert torch.equal(per_element(f"{opcode} {{d}}, {{a}}, {{b}};", a, b, result=torch.float32), want)
    wide = a.numpy().astype(np.longdouble) * b.numpy() - c.numpy()  # exact: 48 bits and one exponent apart
    fused = per_element("neg.f32 {c}, {c};\nfma.rn.f32 {d}, {a}, {b}, {c};", a, b, c, result=torch.float32)
    assert torch.equal(fused, torch.from_numpy(wide.astype(np.float32)))
    assert torch.equal(per_element("sqrt.rn.f32 {d}, {a};", a, result=torch.float32), a.double().sqrt().float())
    exponent = per_element("ex2.approx.ftz.f32 {d}, {a};", a * 20 - 20, result=torch.float32)
    torch.testing.assert_close(exponent, torch.exp2(a * 20 - 20), rtol=2e-7, atol=0)


def test_flushing_and_not_flushing_subnormals():
    tiny = torch.full((32,), 1e-39)
    assert per_element("add.f32 {d}, {a}, {a};", tiny, result=torch.float32)[0] > 0
    assert per_element("add.ftz.f32 {d}, {a}, {a};", tiny, result=torch.float32)[0] == 0


def test_minimum_and_maximum_of_nan_and_signed_zeros():
    nan = float("nan")
    a, b = torch.tensor([nan, 1.0, nan, 0.0] * 8), torch.tensor([2.0, nan, nan, -0.0] * 8)
    most = per_element("max.f32 {d}, {a}, {b};", a, b, result=torch.float32)
    assert most[:2].tolist() == [2.0, 1.0] and most[2].isnan() and not most[3].signbit()
    assert per_element("min.f32 {d}, {a}, {b};", a, b, result=torch.float32)[3].signbit()
    assert per_element("max.NaN.f32 {d}, {a}, {b};", a, b, result=torch.float32)[:3].isnan().all()


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_arithmetic_rounds_once(dtype, name):
    a, b = torch.randn(1024).to(dtype), torch.randn(1024).to(dtype)
    x, y = a.double(), b.double()
    for opcode, want in (("add", x + y), ("sub", x - y), ("mul", x * y)):
        got = per_element(f"{opcode}.{name} {{d}}, {{a}}, {{b}};", a, b, result=dtype)
        assert torch.equal(got, want.to(dtype)), opcode
    pairs = a.view(torch.int32), b.view(torch.int32)
    pair = per_element(f"add.{name}x2 {{d}}, {{a}}, {{b}};", *pairs, result=torch.int32)
    assert torch.equal(pair.view(dtype), a + b)


def test_a_tie_is_decided_by_what_is_far_below():
    """(1 + 2⁻⁷)(1 + 2⁻⁷·n) that falls halfway between two bf16, and 2⁻⁹⁰, which a sum in fp64 loses."""
    factor = torch.full((32,), 1.5, dtype=torch.bfloat16)
    other = torch.full((32,), 1 + 2.0**-7, dtype=torch.bfloat16)  # the product: 1.5 + 1.5 * 2⁻⁷, halfway
    for far, want in ((2.0**-90, 1.5 + 2.0**-6), (-(2.0**-90), 1.5 + 2.0**-7)):
        c = torch.full((32,), far, dtype=torch.bfloat16)
        got = per_element("fma.rn.bf16 {d}, {a}, {b}, {c};", factor, other, c, result=torch.bfloat16)
        assert got[0].item() == want


COMPARISONS = dict(eq=torch.eq, ne=torch.ne, lt=torch.lt, le=torch.le, gt=torch.gt, ge=torch.ge)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons(comparison):
    a = torch.randint(-3, 3, (256,), dtype=torch.int32)
    b = a.flip(0)
    choose = "setp.{}.{} %p1, {{a}}, {{b}};\nselp.b32 {{d}}, 1, 0, %p1;"
    got = per_element(choose.format(comparison, "s32"), a, b, result=torch.int32)
    assert torch.equal(got.bool(), COMPARISONS[comparison](a, b))
    x, y = a.float(), b.float()
    x[::7] = float("nan")
    got = per_element(choose.format(comparison, "f32"), x, y, result=torch.int32)
    want = COMPARISONS[comparison](x, y) & ~x.isnan()
    assert torch.equal(got.bool(), want), "ordered: false where one is NaN"
    if comparison != "ne":
        got = per_element(choose.format(comparison + "u", "f32"), x, y, result=torch.int32)
        assert torch.equal(got.bool(), want | x.isnan()), "unordered: true where one is NaN"


def test_predicates_combine_and_guard():
    a = torch.arange(32, dtype=torch.int32)
    body = """setp.lt.s32 %p1, {a}, 20;
    setp.gt.and.s32 %p2|%p3, {a}, 10, %p1;
    not.pred %p4, %p2;
    mov.b32 {d}, 0;
    @%p2 mov.b32 {d}, 1;
    @!%p4 add.s32 {d}, {d}, 2;
    @%p3 mov.b32 {d}, 7;"""
    got = per_element(body, a, result=torch.int32)
    inside = (a > 10) & (a < 20)
    assert torch.equal(got, torch.where(inside, 3, torch.where(a <= 10, 7, 0)).int())


def test_lanes_that_branch_apart_meet_again():
    """Each lane runs its own number of turns."""
    a = torch.arange(32, dtype=torch.int32)
    body = """mov.b32 {d}, 0;
    mov.b32 %r10, {a};
    again:
    setp.le.s32 %p1, %r10, 0;
    @%p1 bra done;
    add.s32 {d}, {d}, %r10;
    sub.s32 %r10, %r10, 1;
    bra again;
    done:
    shfl.sync.bfly.b32 {d}, {d}, 1, 31, -1;"""
    got = per_element(body, a, result=torch.int32)
    sums = a * (a + 1) // 2
    assert torch.equal(got, sums.view(-1, 2).flip(1).reshape(-1))


def test_exchanges_within_a_warp():
    a = torch.randint(0, 100, (32,), dtype=torch.int32)
    lane = torch.arange(32)

    def moved(form):
        return per_element(form, a, result=torch.int32)

    assert torch.equal(moved("shfl.sync.idx.b32 {d}, {a}, 5, 31, -1;"), a[5].expand(32))
    assert torch.equal(moved("shfl.sync.bfly.b32 {d}, {a}, 6, 31, -1;"), a[lane ^ 6])
    assert torch.equal(moved("shfl.sync.up.b32 {d}, {a}, 3, 0, -1;"), a[(lane - 3).where(lane >= 3, lane)])
    assert torch.equal(moved("shfl.sync.down.b32 {d}, {a}, 3, 31, -1;"), a[(lane + 3).where(lane < 29, lane)])
    eights = (lane % 8 + 3).where(lane % 8 < 5, lane % 8) + lane // 8 * 8
    assert torch.equal(moved("shfl.sync.down.b32 {d}, {a}, 3, 0x181f, -1;"), a[eights]), "in groups of eight"
    ballot = "setp.gt.s32 %p1, {a}, 50;\nvote.sync.ballot.b32 {d}, %p1, -1;"
    assert moved(ballot)[3].item() & 0xFFFFFFFF == sum(1 << n for n in range(32) if a[n] > 50)
    assert moved("redux.sync.max.s32 {d}, {a}, -1;")[9] == a.max()
    assert moved("redux.sync.add.s32 {d}, {a}, -1;")[9] == a.sum()
    same = moved("match.any.sync.b32 {d}, {a}, -1;")
    assert all(same[n].item() & 0xFFFFFFFF == sum(1 << k for k in range(32) if a[k] == a[n]) for n in range(32))
    assert moved("elect.sync {d}|%p1, -1;\nselp.b32 {d}, 1, 0, %p1;").tolist() == [1] + [0] * 31


# ---- memory ----


def test_vectors_and_narrow_types_and_parameters():
    x = torch.arange(128, dtype=torch.int32)
    out, small = torch.zeros(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int8)
    body = (
        THREAD
        + """ld.param.u64 %d1, [x];
    ld.param.u64 %d2, [out];
    ld.param.s32 %d5, [n];
    ld.param.u64 %d6, [small];
    mad.wide.s32 %d3, %r1, 16, %d1;
    mad.wide.s32 %d4, %r1, 16, %d2;
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d3];
    cvt.u32.u64 %r8, %d5;
    add.s32 %r4, %r4, %r8;
    st.global.v4.b32 [%d4], {%r7, %r6, %r5, %r4};
    cvt.s64.s32 %d7, %r1;
    add.s64 %d7, %d7, %d6;
    cvt.u16.u32 %h1, %r4;
    st.global.b8 [%d7], %h1;
    ld.global.s8 %r9, [%d7];
    mad.wide.s32 %d8, %r1, 16, %d2;
    st.global.b32 [%d8+4], %r9;"""
    )
    counters = run(body, [x, out, -5, small], ".u64 x, .u64 out, .u32 n, .u64 small")
    want = x.view(32, 4).flip(1).clone()
    want[:, 3] -= 5
    want[:, 1] = want[:, 3].to(torch.int8)
    assert torch.equal(out.view(32, 4), want) and torch.equal(small, want[:, 3].to(torch.int8))
    traffic = counters.traffic()
    assert traffic["ld.global"]["bytes"] == 512 + 32 and counters.read == 16 + 1 and counters.written == 16 + 1


def test_a_parameter_chosen_by_its_address():
    """In 32 bits, as LLVM compiles a choice between two parameters."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """setp.lt.u32 %p1, %r1, 11;
    mov.b32 %r4, n;
    mov.b32 %r5, m;
    selp.b32 %r6, %r4, %r5, %p1;
    ld.param.b32 %r7, [%r6];
    ld.param.u64 %d1, [out];
    mad.wide.s32 %d2, %r1, 4, %d1;
    st.global.b32 [%d2], %r7;"""
    run(THREAD + body, [3, -4, out], ".u32 n, .u32 m, .u64 out")
    assert out.tolist() == [3] * 11 + [-4] * 21


EACH = """ld.param.u64 %d1, [x];
    ld.param.u64 %d2, [out];
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r4, %r2, 64, %r1;
    mad.wide.s32 %d3, %r4, 4, %d1;
    ld.global.b32 %r5, [%d3];
"""
BY_ORDER = {  # of 8 programs of two warps, or of the warps of a program
    "a sum by atomics": "red.global.add.f32 [%d2], %r5;",
    "the last program to write": "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.global.b32 [%d2], %r5;",
    "the last warp to write": "mad.wide.s32 %d2, %r2, 4, %d2;\nst.global.b32 [%d2], %r5;",
}


def again(body: str, out: torch.Tensor, schedule: int) -> ptx.Counters:
    text = module(THREAD + EACH + body, ".u64 x, .u64 out", 64, shared=".extern .shared .align 4 .b8 s[];")
    x = torch.arange(512).sin()
    return ptx.run_again(text, (8,), [x, out], schedule, names=["x_ptr", "out_ptr"])


@pytest.mark.parametrize("name", BY_ORDER)
def test_bits_that_depend_on_an_order_are_found(name):
    found = []
    for schedule in range(1, 9):
        try:
            again(BY_ORDER[name], torch.zeros(9)[1:], schedule)
        except ptx.Fault as fault:
            found.append(fault)
            says = rf"k: order: schedules 0 and {schedule} leave .* bytes of out_ptr .* in element \d of its storage"
            assert re.search(says, str(fault))
    assert len(found) >= 4 and {fault.kind for fault in found} == {"order"}


def test_both_orders_begin_with_the_same_memory():
    """Each program adds to an element of its own."""
    out = torch.full((8,), 2.0)
    own = "mad.wide.s32 %d2, %r2, 4, %d2;\nsetp.eq.u32 %p1, %r1, 5;\n@%p1 red.global.add.f32 [%d2], %r5;"
    counters = again(own, out, 3)
    assert torch.equal(out, torch.arange(512).sin()[5::64] + 2) and counters.executed.max() == 16


def test_atomics():
    total, most = torch.zeros(1), torch.full((1,), -9, dtype=torch.int32)
    body = (
        THREAD
        + """ld.param.u64 %d1, [total];
    ld.param.u64 %d2, [most];
    cvt.rn.f32.s32 %r4, %r1;
    atom.global.add.f32 %r5, [%d1], %r4;
    red.global.max.s32 [%d2], %r1;"""
    )
    run(body, [total, most], ".u64 total, .u64 most", threads=64)
    assert total.item() == 63 * 32 and most.item() == 63


def test_wavefronts_beside_the_ideal():
    body = (
        THREAD
        + """shl.b32 %r4, %r1, {shift};
    add.s32 %r5, %r3, %r4;
    st.shared.b32 [%r5], %r1;"""
    )
    for shift, wavefronts in ((2, 1), (3, 2), (7, 32)):
        counts = run(body.format(shift=shift), [1], ".u32 x", shared=4096).traffic()["st.shared"]
        assert (counts["wavefronts"], counts["ideal_wavefronts"]) == (wavefronts, 1)


def test_bounds_alignment_and_what_lies_between_the_elements():
    x, out = torch.zeros(40), torch.zeros(32)
    load = (
        THREAD
        + """ld.param.u64 %d1, [x];
    mad.wide.s32 %d2, %r1, {step}, %d1;
    ld.global.b32 %r4, [%d2+{offset}];
    st.global.b32 [%d2], %r4;"""
    )
    run(load.format(step=4, offset=0), [x], ".u64 x")
    cases = [
        (x, 4, 36, "out of bounds", "reads 4 bytes at byte 160 of argument 0 (float32 [40]), which has 160"),
        (x, 4, -4, "out of bounds", "byte -4 of argument 0"),
        (x, 4, 2**41, "out of bounds", "in no argument's memory"),
        (x, 2, 0, "misaligned", "byte 2 of argument 0 (float32 [40]), which is not aligned"),
        (
            torch.zeros(80)[::2],
            4,
            0,
            "out of bounds",
            "byte 4 of argument 0 (float32 [40]), which lies between its elements",
        ),
        (torch.zeros(100)[7:47], 4, 132, "out of bounds", "byte 160 of"),
    ]
    for tensor, step, offset, kind, message in cases:
        with pytest.raises(ptx.Fault) as fault:
            run(load.format(step=step, offset=offset), [tensor], ".u64 x")
        assert fault.value.kind == kind and message in str(fault.value), str(fault.value)
        assert "thread" in str(fault.value) and "ld.global.b32" in str(fault.value)
    with pytest.raises(ptx.Fault, match="shared byte 1024, 4 wide, lies outside the 1024 bytes"):
        run(THREAD + "mad.lo.s32 %r4, %r1, 64, %r3;\nst.shared.b32 [%r4], %r1;", [1], ".u32 x")
    assert out.sum() == 0


def test_memory_that_was_never_written():
    x = ptx.unwritten(32, dtype=torch.bfloat16)
    x[:30] = 1
    body = (
        THREAD
        + """ld.param.u64 %d1, [x];
    mad.wide.s32 %d2, %r1, 2, %d1;
    ld.global.b16 %h1, [%d2];"""
    )
    with pytest.raises(ptx.Fault, match="reads byte 60 of argument 0 .*never written .thread 30"):
        run(body, [x], ".u64 x")
    run(body, [x], ".u64 x", checks=["races"])
    with pytest.raises(ptx.Fault, match="reads shared byte 16, which was never written"):
        run(
            THREAD + "mov.b32 %r4, 1;\nst.shared.b32 [%r3+12], %r4;\nld.shared.v2.b32 {%r5, %r6}, [%r3+16];",
            [1],
            ".u32 x",
        )


def test_tensors_beyond_32_bits_take_no_memory():
    x = torch.empty(3, 2**31, device="meta")
    body = (
        THREAD
        + """ld.param.u64 %d1, [x];
    mul.wide.s32 %d2, %r1, 4;
    {offset}
    add.s64 %d2, %d2, %d3;
    add.s64 %d1, %d1, %d2;
    st.global.b32 [%d1], %r1;
    ld.global.b32 %r9, [%d1];"""
    )
    counters = run(body.format(offset="mov.b64 %d3, 25769803648;"), [x], ".u64 x")
    assert counters.written == 4
    with pytest.raises(ptx.Fault, match="writes 4 bytes at byte -2147483648 of argument 0"):
        run(body.format(offset="mov.b32 %r8, 0x80000000;\ncvt.s64.s32 %d3, %r8;"), [x], ".u64 x")


# ---- what cannot run -----------------------------------------------------------------------------------------------

TEXT = module("mov.u32 %r1, %tid.x;", ".u64 x, .u32 n", shared=".extern .shared .align 16 .b8 s[];")


@pytest.mark.parametrize("change, says", [
    (("8.4", "12.1"), "PTX of version 12.1; versions 6.0 to 9.4 are known"),
    ((".version 8.4", ""), "this is no PTX: it has no .version"),
    (("mov.u32 %r1, %tid.x;", ".loc 1 1\ntcgen05.ld %r1;"), "the instruction tcgen05.ld is not modelled"),
    (("mov.u32 %r1, %tid.x;", "add.rz.f32 %r1, %r1, %r1;"), "the instruction add.rz.f32 is not modelled"),
    (("mov.u32 %r1, %tid.x;", "ld.local.b32 %r1, [%r2];"), "generic or local memory are not modelled"),
    (("mov.u32 %r1, %tid.x;", "add.s32 %r1, %h1, %r1;"), "%h1 has 16 bits where 32 are wanted"),
    (("mov.u32 %r1, %tid.x;", "bra nowhere;"), "no label nowhere"),
    (("mov.u32 %r1, %tid.x;", "mov.u32 %r1, %clock;"), "%clock is not modelled"),
    (("ret;\n}", "ret;"), "cut off"),
    ((".entry k(", ".entry other("), "there is no kernel 'k' in this PTX; it has other"),
    (("sm_90a", "sm_100a"), "is for sm_100; sm_80"),
])  # fmt: skip
def test_ptx_that_is_not_known(change, says):
    with pytest.raises(ptx.Unsupported, match=re.escape(says)):
        ptx.run(TEXT.replace(*change), (1,), [None, 1], name="k")


@pytest.mark.parametrize("given, says", [
    (dict(grid=(0,)), "the grid of k is (0, 1, 1)"), (dict(grid=(1, 70000)), "the grid of k is (1, 70000, 1)"),
    (dict(block=(2048,)), "has (2048, 1, 1) threads"), (dict(block=(64,)), "compiled for blocks of (32, 1, 1)"),
    (dict(shared=1 << 20), "takes 1048576 bytes of shared memory; a block on sm_90 has 232448"),
    (dict(arguments=[None, 1, 2]), "k has 2 parameters; 3 arguments were given"),
    (dict(arguments=[None, 2**40]), "argument 1 is 1099511627776, which 4 bytes do not hold"),
    (dict(arguments=[None, torch.zeros(2)]), "argument 1 of k has 4 bytes"),
    (dict(checks=["speed"]), "checks names ['speed']; there are alignment, initialised, races, async"),
])  # fmt: skip
def test_launches_that_do_not_fit(given, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ptx.run(TEXT, **(dict(grid=(1,), arguments=[None, 1]) | given))
