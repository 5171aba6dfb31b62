"""CUDA C++ gradients of attention as nvcc compiles them for sm_90a, executed without a GPU: numbers, faults."""

from __future__ import annotations

import re
from collections.abc import Iterator

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.sweeps import faults, in_turns
from test_attention import explicit

from sora_kernels import Unavailable, _dispatch, _library, attention_backward, spacetime_attention
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)
# Sq, Sk, H, Hk, E; a block owns 128 tokens, a tile visited has 96 keys or 64 queries (96 of heads of 64), a ring three.
# One of each; one more than a tile of each; rings that wrap; heads that share keys; tokens that fill their tiles.
CASES = [
    (1, 1, 1, 1, 64), (193, 97, 2, 2, 64), (97, 300, 4, 2, 64), (70, 200, 1, 1, 96), (128, 192, 2, 1, 128),
    (200, 129, 1, 1, 128),
]  # fmt: skip


class Problem:
    """Operands, the gradients in fp64, and those of plain PyTorch in the dtype."""

    def __init__(
        self, Sq: int, Sk: int, H: int, Hk: int, E: int, dtype: torch.dtype, scale: float = 0.2, far: float = 0
    ):
        draw = lambda S, heads: torch.randn(1, S, heads, E).to(dtype)  # noqa: E731
        self.inputs, self.scale = dict(q=draw(Sq, H), k=draw(Sk, Hk), v=draw(Sk, Hk)), scale
        if far:  # every score is below 0
            self.inputs["q"].abs_().add_(far), self.inputs["k"].abs_().add_(far).neg_()
        self.dout, self.dlse = draw(Sq, H), torch.randn(1, H, Sq)
        self.terms = dict(dq=max(Sk, E), dk=max(Sq * H // Hk, E), dv=max(Sq * H // Hk, E))

        def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            def formula(**tensors):
                out, lse = explicit(**tensors, scale=scale)
                return out, lse.to(torch.promote_types(dtype, torch.float32))

            tensors = {name: t.to(dtype) for name, t in self.inputs.items()}
            dlse = self.dlse.to(torch.promote_types(dtype, torch.float32))
            return tuple(outputs_and_grads(formula, tensors, [self.dout.to(dtype), dlse]).values())

        out, lse, *self.oracle = gradients(torch.float64)
        self.baseline = gradients(dtype)[2:]
        self.out, self.lse = out.to(dtype), lse.float()

    def run(self, wanted: str = "qkv", **options) -> list[torch.Tensor | None]:
        grads = [ptx.unwritten(*t.shape, dtype=t.dtype) if name in wanted else None for name, t in self.inputs.items()]
        tensors = self.dout, self.dlse, *self.inputs.values(), self.out, self.lse
        nvcc.attention_bwd(90, *tensors, self.scale, *grads, **options)
        return grads

    def compare(self, grads: list[torch.Tensor | None]) -> None:
        for (name, terms), *found in zip(self.terms.items(), grads, self.oracle, self.baseline, strict=True):
            if found[0] is not None:
                assert_matches_oracle(*found, name, terms)


@pytest.mark.parametrize("Sq, Sk, H, Hk, E, dtype", in_turns(CASES, DTYPES), ids=str)
def test_gradients_as_nvcc_compiles_them(Sq, Sk, H, Hk, E, dtype):
    problem = Problem(Sq, Sk, H, Hk, E, dtype)
    problem.compare(problem.run(schedule=2, again=5))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [64, 96, 128])
@pytest.mark.parametrize("Sk", [2, 95, 96, 127, 128, 400])
def test_sweep_of_sizes_and_schedules(Sk, E, dtype):
    for seed, Sq in enumerate((63, 64, 96, 129, 300)):
        problem = Problem(Sq, Sk, 3, 1, E, dtype)
        first = problem.run(schedule=10 + seed)
        problem.compare(first)
        for schedule in (0, 1, 20 + seed):
            assert all(map(torch.equal, first, problem.run(schedule=schedule))), schedule


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_one_gradient_alone_is_the_same_and_nothing_else_is_written(wanted):
    problem = Problem(70, 100, 2, 1, 64, torch.bfloat16)
    for name, alone, beside in zip("qkv", problem.run(wanted), problem.run(), strict=True):
        assert alone is None if name != wanted else torch.equal(alone, beside)


FAULTS = {  # label -> pattern, replacement; each place by itself
    "a wait for an mbarrier removed": (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, .*$", "setp.eq.u32 p, 0, 0;"),
    "an arrival at an mbarrier removed": (r"^\tmbarrier\.arrive\.shared::cta\.b64 _, .*$", ""),
    "a barrier of the block removed": (r"^\tbar\.sync \t0;$", ""),
    "a named barrier removed": (r"^\tbar\.sync %r\d+, %r\d+;$", ""),
    "a fence of the async proxy removed": (r"^\tfence\.proxy\.async\.shared::cta;$", ""),
    "a wait for products removed": (r"^\twgmma\.wait_group\.sync\.aligned \d;$", ""),
    "a wait for products too lax": (r"(?<=^\twgmma\.wait_group\.sync\.aligned )[01];$", "2;"),
    "a fence of products removed": (r"^\twgmma\.fence\.sync\.aligned;$", ""),
    "a wait for stores removed": (r"^\tcp\.async\.bulk\.wait_group\.read 0;$", ""),
}  # fmt: skip
UNSEEN = {  # places of a fault that may go unseen
    "a wait for products removed": 1,  # of keys, for those of dv: it gives back registers, and guards no data
    "a wait for products too lax": 1,  # the same
    "a fence of products removed": 2,  # of scores and slopes, whose old values products do not read
}


def planted(label: str, of_keys: bool) -> Iterator[str]:
    """The PTX with one fault in a kernel of bf16 heads of 64."""
    text = nvcc.compiled("attention_backward", 90)
    begin = text.index(f"13__nv_bfloat16Li64ELb{int(of_keys)}E")
    end = text.find(".entry", begin)
    pattern, replacement = FAULTS[label]
    for hit in re.compile(pattern, re.M).finditer(text, begin, end if end > 0 else len(text)):
        yield text[: hit.start()] + hit.expand(replacement) + text[hit.end() :]


def found(text: str, problem: Problem, wanted: str) -> str | None:
    """What finds the fault, under one of eight schedules."""
    for schedule in range(8):
        try:
            problem.compare(problem.run(wanted, rewrite=lambda _: text, schedule=schedule, budget=400_000))
        except ptx.Fault as fault:
            return fault.kind
        except AssertionError:
            return "wrong result"
    return None


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("label", faults(FAULTS))
def test_planted_faults_are_found(label, of_keys):
    problem = Problem(*((390, 70) if of_keys else (70, 390)), 1, 1, 64, torch.bfloat16)
    by = [found(text, problem, "kv" if of_keys else "q") for text in planted(label, of_keys)]
    assert len(by) - by.count(None) >= 1 and by.count(None) <= UNSEEN.get(label, 0), by
    assert "wrong result" not in by, f"{by}: the checks themselves should have found it"


def test_weights_beyond_the_last_key_and_query_stay_out_of_sums():
    """Scores far below 0: the weight of a score of 0, which zeros beyond the keys have, would be infinite."""
    problem = Problem(70, 100, 1, 1, 64, torch.bfloat16, far=3)
    assert problem.lse.max() < -89
    problem.compare(problem.run())


def test_a_query_that_saw_nothing_gives_no_gradient():
    problem = Problem(70, 40, 1, 1, 64, torch.float16)
    problem.lse[0, 0, 3], problem.out[0, 3] = float("-inf"), 0
    dq, dk, dv = problem.run()
    others = Problem.__new__(Problem)
    others.__dict__ |= problem.__dict__
    others.dout, others.dlse = problem.dout.clone(), problem.dlse.clone()
    others.dout[0, 3], others.dlse[0, 0, 3] = 5, 7
    assert not dq[0, 3].any() and all(map(torch.equal, (dq, dk, dv), others.run()))


def test_autograd_takes_slices_and_gradients_of_any_strides():
    """Of packed qkv, keys [B, H, S, E], a gradient of the output expanded over the heads: which is copied."""
    q, _, v = torch.randn(2, 40, 6, 64).bfloat16().view(2, 40, 2, 3, 64).unbind(3)
    k = torch.randn(2, 2, 40, 64).bfloat16().transpose(1, 2)
    inputs = dict(q=q, k=k, v=v)
    douts = (
        torch.randn(2, 40, 1, 64).bfloat16().expand(2, 40, 2, 64),
        torch.randn(2, 2, 40, 64).bfloat16().transpose(1, 2),
    )
    for dout in douts:
        launched: list[str] = []
        with nvcc.nvcc_on(90, lambda name, _: launched.append(name), schedule=3):  # noqa: B023
            actual = outputs_and_grads(lambda **t: spacetime_attention(**t, impl="cuda"), inputs, [dout])
        assert launched == ["attention_fwd_kernel", *(f"attention_bwd_{n}_kernel" for n in ("rows", "queries", "keys"))]
        wide = {name: t.double() for name, t in inputs.items()}
        oracle = outputs_and_grads(lambda **t: explicit(**t)[0], wide, [dout.double()])
        baseline = outputs_and_grads(lambda **t: explicit(**t)[0], inputs, [dout])
        for name in oracle:
            assert_matches_oracle(actual[name], oracle[name], baseline[name], name, 64)


def test_the_backward_of_a_part_of_the_keys_works_with_the_lse_of_all():
    problem = Problem(40, 100, 2, 2, 64, torch.bfloat16)
    q, k, v = problem.inputs.values()
    rest = dict(dlse=problem.dlse, scale=problem.scale)
    whole = problem.run()
    with nvcc.nvcc_on(90):
        parts = [
            attention_backward(problem.dout, q, k[:, part], v[:, part], problem.out, problem.lse, **rest, impl="cuda")
            for part in (slice(0, 50), slice(50, 100))
        ]
    for name, i in (("dk", 1), ("dv", 2)):
        joined = torch.cat([p[i] for p in parts], 1)
        assert_matches_oracle(joined, problem.oracle[i], problem.baseline[i], name, 64)
    summed = parts[0][0].double() + parts[1][0].double()
    assert (summed - whole[0].double()).abs().max() <= 3 * 2**-8 * whole[0].abs().max()


def test_what_the_kernels_do_not_take_is_unavailable_with_the_reason():
    x = torch.randn(1, 10, 2, 64).bfloat16()
    leaf = x.clone().requires_grad_()
    wide, odd = torch.randn(1, 10, 2, 72).bfloat16(), torch.zeros(1, 10, 2, 68, dtype=x.dtype)[..., :64]
    with nvcc.nvcc_on(90):
        for message, call in (
            (r"heads of \(64, 96, 128\); got torch.bfloat16 heads of 72", lambda: (wide.requires_grad_(), wide, wide)),
            ("no expanded ones; got k with strides", lambda: (leaf, odd, x)),
        ):
            with pytest.raises(Unavailable, match=message):
                spacetime_attention(*call(), impl="cuda")
        for mode in (
            dict(kv_lens=torch.tensor([3])),
            dict(grid=(1, 2, 5), window=(1, 1, 3)),
            dict(grid=(5, 1, 2), causal=1),
        ):
            with pytest.raises(Unavailable, match="cuda has gradients of attention without kv_lens, window, causal or"):
                spacetime_attention(leaf, x, x, **mode, impl="cuda")
        with pytest.raises(
            Unavailable, match="cuda gives torch.bfloat16 for torch.bfloat16; got out_dtype=torch.float32"
        ):
            attention_backward(x, x, x, x, x, torch.zeros(1, 2, 10), out_dtype=torch.float32, impl="cuda")


def test_auto_does_not_choose_what_was_never_run():
    assert "cuda" in _library.impls("spacetime_attention_bwd")
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__("spacetime_attention", "cpu", torch.bfloat16, True)
