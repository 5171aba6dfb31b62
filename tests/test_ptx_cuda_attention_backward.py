"""CUDA C++ gradients of attention as nvcc compiles them for sm_90a, executed without a GPU: numbers, faults."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.planted import found, planted
from ptx.sweeps import faults, in_turns
from test_attention import explicit
from test_ptx_cuda_attention import PADDED, PLANS, RULES

from sora_kernels import Unavailable, _dispatch, _library, attention_backward, spacetime_attention
from sora_kernels.attention import kernels_cuda, reference
from sora_kernels.attention.mode import resolve
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
    """Operands, the gradients in fp64, and those of plain PyTorch in the dtype. What lengths hide is no number."""

    def __init__(
        self, Sq: int, Sk: int, H: int, Hk: int, E: int, dtype: torch.dtype, mode: dict | None = None,
        lengths: list[int] | None = None, scale: float = 0.2, far: float = 0,
    ):  # fmt: skip
        B, mode = len(lengths or (1,)), mode or {}
        draw = lambda S, heads: torch.randn(B, S, heads, E).to(dtype)  # noqa: E731
        self.inputs, self.scale = dict(q=draw(Sq, H), k=draw(Sk, Hk), v=draw(Sk, Hk)), scale
        if far:  # every score is below 0
            self.inputs["q"].abs_().add_(far), self.inputs["k"].abs_().add_(far).neg_()
        self.dout, self.dlse = draw(Sq, H), torch.randn(B, H, Sq)
        self.terms = dict(dq=max(Sk, E), dk=max(Sq * H // Hk, E), dv=max(Sq * H // Hk, E))
        self.lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        self.form = resolve("test", Sq, Sk, *(mode.get(n, d) for n, d in RULES), heads=H)
        mask = None
        if mode or lengths:
            parts = reference.masks(self.inputs["q"], self.inputs["k"], self.lengths, *self.form)
            mask = torch.cat([part.expand(B, H, -1, Sk) for _, part in parts], 2)

        def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            def formula(**tensors):
                out, lse = explicit(**tensors, mask=mask, scale=scale)
                return out, lse.to(torch.promote_types(dtype, torch.float32))

            tensors = {name: t.to(dtype) for name, t in self.inputs.items()}
            dlse = self.dlse.to(torch.promote_types(dtype, torch.float32))
            return tuple(outputs_and_grads(formula, tensors, [self.dout.to(dtype), dlse]).values())

        out, lse, *self.oracle = gradients(torch.float64)
        self.baseline = gradients(dtype)[2:]
        self.out, self.lse = out.to(dtype), lse.float()
        if lengths:
            hidden = (torch.arange(Sk) >= self.lengths[:, None])[:, :, None, None]
            self.inputs |= {name: self.inputs[name].masked_fill(hidden, float("nan")) for name in "kv"}

    def run(self, wanted: str = "qkv", **options) -> list[torch.Tensor | None]:
        grads = [ptx.unwritten(*t.shape, dtype=t.dtype) if name in wanted else None for name, t in self.inputs.items()]
        tensors = self.dout, self.dlse, *self.inputs.values(), self.out, self.lse, self.lengths
        with nvcc.nvcc_on(90, **options):
            kernels_cuda.spacetime_attention_bwd(*tensors, *self.form, self.scale, True, *grads)
        return grads

    def compare(self, grads: list[torch.Tensor | None]) -> None:
        for (name, terms), *tensors in zip(self.terms.items(), grads, self.oracle, self.baseline, strict=True):
            if tensors[0] is not None:
                assert_matches_oracle(*tensors, name, terms)


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


# A tile that owns has 128 tokens, one visited 64, a ring three. Heads that share keys, those of 128, hidden keys.
SHORT = {
    "tiles": (150, 150, 2, 1, 128, dict(grid=(2, 5, 15), window=(1, 3, 6), stride=(1, 3, 3)), [150, 71]),
    "window, text": (170, 170, 1, 1, 64, dict(grid=(4, 5, 8), window=(2, 5, 4), text_len=10), [170, 164]),
    "causal window, sink": (150, 150, 1, 1, 64, dict(grid=(5, 5, 6), window=(2, 5, 6), causal="frame", sink=1)),
    "packed": (150, 150, 1, 1, 96, dict(grids=[(2, 5, 9), (3, 4, 5)], causal="frame")),
    "cache, text first": (90, 170, 1, 1, 64, dict(grid=(2, 8, 10), window=(1, 5, 4), text_len=10, text_at="start")),
    "heads": (160, 160, 4, 2, 64, dict(grid=(2, 8, 10), window=[(1, 8, 10), (2, 4, 4), (2, 8, 10), (1, 8, 10)])),
}


@pytest.mark.parametrize("name", SHORT)
def test_gradients_over_plans_as_nvcc_compiles_them(name):
    """Each in one dtype here; in the sweep in both."""
    Sq, Sk, H, Hk, E, *rest = SHORT[name]
    problem = Problem(Sq, Sk, H, Hk, E, DTYPES[len(name) % 2], *rest)
    problem.compare(problem.run(schedule=2, again=5))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*PLANS, *(f"{name}, padded" for name in PADDED), "tiles, short"])
def test_sweep_of_plans_and_schedules(name, dtype):
    plans = PLANS | {f"{name}, padded": plan for name, plan in PADDED.items()} | {"tiles, short": SHORT["tiles"]}
    Sq, Sk, H, Hk, _, *rest = plans[name]
    for seed, E in enumerate((64, 96, 128)):
        problem = Problem(Sq, Sk, H, Hk, E, dtype, *rest)
        first = problem.run(schedule=10 + seed)
        problem.compare(first)
        assert all(map(torch.equal, first, problem.run(schedule=20 + seed)))


@pytest.mark.parametrize("E, dtype", [(64, DTYPES[0]), (96, DTYPES[1])], ids=str)
def test_keys_that_kv_lens_hides_are_no_numbers_and_have_no_gradients(E, dtype):
    """No key at all, one; a tile less one, a tile, one more; all of two tiles that own."""
    problem = Problem(40, 190, 1, 1, E, dtype, lengths=[0, 1, 95, 96, 97, 190])
    grads = problem.run(schedule=3, again=4)
    problem.compare(grads)
    assert all(not t[b, n:].any() for t in grads[1:] for b, n in enumerate(problem.lengths))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [64, 96, 128])
def test_sweep_of_lengths_and_schedules(E, dtype):
    for seed, lengths in enumerate(([352, 0, 353], [95, 96, 97], [400, 399, 2], [1, 129, 128])):
        problem = Problem(1 + 64 * seed, 400, 2, 1, E, dtype, lengths=lengths)
        problem.compare(problem.run(schedule=seed, again=20 + seed))


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_one_gradient_alone_is_the_same_and_nothing_else_is_written(wanted):
    problem = Problem(70, 100, 2, 1, 64, torch.bfloat16)
    for name, alone, beside in zip("qkv", problem.run(wanted), problem.run(), strict=True):
        assert alone is None if name != wanted else torch.equal(alone, beside)


FAULTS = {  # label -> pattern, replacement; each place by itself
    "a wait for an mbarrier removed": (r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, .*$", "setp.eq.u32 p, 0, 0;"),
    "an arrival at an mbarrier removed": (r"^\tmbarrier\.arrive\.shared::cta\.b64 _, .*$", ""),
    "a barrier of the block removed": (r"^\tbar\.sync \t0;$", ""),
    "a barrier of a warp removed": (r"^\tbar\.warp\.sync \t-1;$", ""),
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
PLANNED = [  # what of them over plans is not as it is dense
    ("a wait for an mbarrier removed", False), ("a wait for an mbarrier removed", True),
    ("an arrival at an mbarrier removed", False), ("an arrival at an mbarrier removed", True),
    ("a fence of the async proxy removed", False),
    ("a barrier of a warp removed", False), ("a barrier of a warp removed", True),
]  # fmt: skip


def by(label: str, problem: Problem, of_keys: bool, planned: bool) -> list[str | None]:
    """What finds the fault at each of its places in a kernel of bf16 heads of 64."""
    wanted, kernel = "kv" if of_keys else "q", f"13__nv_bfloat16Li64ELb{of_keys:d}ELb{planned:d}E"

    def found_in(text: str) -> str | None:
        how = dict(rewrite=lambda _: text, budget=400_000)
        return found(lambda schedule: problem.compare(problem.run(wanted, schedule=schedule, **how)))

    return [found_in(text) for text in planted("attention_backward", kernel, *FAULTS[label])]


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("label", faults(label for label in FAULTS if "warp" not in label))  # which kv_lens asks for
def test_planted_faults_are_found(label, of_keys):
    sizes, lengths = ((390, 70), None) if of_keys else ((70, 390), [350])
    problem = Problem(*sizes, 1, 1, 64, torch.bfloat16, lengths=lengths)
    kinds = by(label, problem, of_keys, False)
    assert len(kinds) - kinds.count(None) >= 1 and kinds.count(None) <= UNSEEN.get(label, 0), kinds
    assert "wrong result" not in kinds, f"{kinds}: the checks themselves should have found it"


@pytest.mark.slow
@pytest.mark.parametrize("label, of_keys", PLANNED, ids=lambda value: {False: "queries", True: "keys"}.get(value))
def test_planted_faults_are_found_over_plans(label, of_keys):
    """Keys are hidden in part, and a ring's places are used again."""
    mode = dict(grid=(4, 8, 9), window=(2, 5, 4), text_len=10)
    kinds = by(label, Problem(298, 298, 1, 1, 64, torch.bfloat16, mode, [293]), of_keys, True)
    assert kinds and None not in kinds and "wrong result" not in kinds, kinds


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
        with pytest.raises(Unavailable, match=r"cuda takes no dilation; got \(1, 1, 2\)"):
            spacetime_attention(leaf, x, x, grid=(1, 2, 5), window=(1, 1, 3), dilation=(1, 1, 2), impl="cuda")
        with pytest.raises(
            Unavailable, match="cuda gives torch.bfloat16 for torch.bfloat16; got out_dtype=torch.float32"
        ):
            attention_backward(x, x, x, x, x, torch.zeros(1, 2, 10), out_dtype=torch.float32, impl="cuda")


def test_auto_does_not_choose_what_was_never_run():
    assert "cuda" in _library.impls("spacetime_attention_bwd")
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__("spacetime_attention", "cpu", torch.bfloat16, True)
