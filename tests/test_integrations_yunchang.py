"""The ring "sora" of yunchang, on two processes and with Ulysses on four, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from in_ranks import in_ranks

from sora_kernels.integrations import _host, yunchang
from sora_kernels.testing import assert_matches_oracle

pytest.importorskip("yunchang")

CASES = {"plain": {}, "causal and scaled": {"causal": True, "softmax_scale": 0.4}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def drawn(dtype):
    torch.manual_seed(0)
    shapes = (2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16), (2, 12, 4, 16)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def whole(dtype, how, double=False):
    """Output and gradients of plain PyTorch on all tokens."""
    q, k, v, grad = (t.double() if double else t for t in drawn(dtype))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attend = {"is_causal": how.get("causal", False), "scale": how.get("softmax_scale")}
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), enable_gqa=True, **attend)
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _in_parallel(rank, folder, world, ulysses):
    from yunchang import LongContextAttention, set_seq_parallel_pg

    set_seq_parallel_pg(ulysses, world // ulysses, rank, world)
    yunchang.register()
    attention = LongContextAttention(ring_impl_type="sora")
    for case, how in CASES.items():
        for name, dtype in DTYPES.items():
            *leaves, grad = (t.chunk(world, 1)[rank].clone() for t in drawn(dtype))
            leaves = [t.requires_grad_() for t in leaves]
            out = attention(*leaves, **how)
            torch.save([out.detach(), *torch.autograd.grad(out, leaves, grad)], f"{folder}/{case} {name} {rank}.pt")
    torch.distributed.barrier()


@pytest.mark.parametrize(("world", "ulysses"), [(2, 1), (4, 2)], ids=["ring", "ring and Ulysses"])
def test_output_and_gradients_are_those_of_one_process(tmp_path, world, ulysses):
    in_ranks(_in_parallel, world, tmp_path, world, ulysses)
    for case, how in CASES.items():
        for name, dtype in DTYPES.items():
            parts = [torch.load(tmp_path / f"{case} {name} {rank}.pt") for rank in range(world)]
            ours = [torch.cat(shards, 1) for shards in zip(*parts, strict=True)]
            pairs = zip(ours, whole(dtype, how, double=True), whole(dtype, how), strict=True)
            for result, (actual, exact, plain) in zip(("output", "dq", "dk", "dv"), pairs, strict=True):
                assert_matches_oracle(actual, exact, plain, f"{case} {name} {result}")


@pytest.mark.parametrize(
    "given",
    [{"dropout_p": 0.1}, {"window_size": (4, 0)}, {"softcap": 5.0}, {"alibi_slopes": torch.ones(4)},
     {"return_attn_probs": True}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_what_is_refused(given):
    with pytest.raises(ValueError, match=f"does not serve {next(iter(given))}; use another ring"):
        yunchang.ring_attention(*drawn(torch.float32)[:3], **given)


def test_a_missing_or_old_host_is_named(monkeypatch):
    monkeypatch.setattr(_host, "release", lambda distribution: (0, 5))
    with pytest.raises(ImportError, match="needs yunchang >= 0.6 for a ring.*; found 0.5: pip install -U"):
        yunchang.register()
