"""Faults planted into compiled kernels, one at a time: which are found, and by what. python -m ptx.mutations CASE ...

Prints a JSON line for each: case, fault, source line, and what found it: a kind of fault, "wrong result" by the error
rule, or null for a survivor.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from sora_kernels import norm_modulate, spacetime_attention
from sora_kernels.testing import assert_matches_oracle, poison_empty

from . import Fault, Unsupported
from .launcher import triton_on

FAULTS = {  # label -> pattern, replacement; each place by itself
    "a barrier removed": (r"^\tbar\.sync \t0;$", ""),
    "a wait for copies removed": (r"^\tcp\.async\.wait_group \t\d+;$", ""),
    "a wait for copies one group too lax": (r"^\tcp\.async\.wait_group \t(\d+);$", r"\tcp.async.wait_group \t9;"),
    "a fence of the async proxy removed": (r"^\tfence\.proxy\.async\.shared::cta;$", ""),
    "a wait for products removed": (r"^.*wgmma\.wait_group\.sync\.aligned.*$", ""),
    "a fence of products removed": (r"^\twgmma\.fence\.sync\.aligned;$", ""),
    "a sign lost": (r"^\tsub\.f32 ", r"\tadd.f32 "),
    "an offset one element off": (r"^(\tmad\.wide\.s32 \t%rd\d+, %r\d+, )2, ", r"\g<1>4, "),
}
EVERYWHERE = {  # in all places together: most masks of a kernel are true for these shapes
    "stores without their masks": (r"@%p\d+ (st\.global)", r"\1"),
    "loads without their masks": (r"@%p\d+ (ld\.global)", r"\1"),
    "bf16 cut, not rounded": (r"cvt\.rn\.bf16", "cvt.rz.bf16"),
}


def modulation() -> Callable[[], None]:
    x, shift, scale = torch.randn(2, 5, 1000) + 2, torch.randn(2, 1, 1000), torch.randn(2, 1, 1000)
    x, shift, scale = (t.bfloat16() for t in (x, shift, scale))

    def formula(x, shift, scale):
        return F.layer_norm(x, [1000], eps=1e-6) * (1 + scale) + shift

    oracle, baseline = formula(x.double(), shift.double(), scale.double()), formula(x, shift, scale)
    return lambda: assert_matches_oracle(norm_modulate(x, shift, scale, impl="triton"), oracle, baseline, "out")


def attention() -> Callable[[], None]:
    q, k, v = (torch.randn(1, 200, 1, 128).bfloat16() for _ in range(3))
    oracle = spacetime_attention(q.double(), k.double(), v.double(), impl="reference")
    baseline = spacetime_attention(q, k, v, impl="reference")
    return lambda: assert_matches_oracle(spacetime_attention(q, k, v, impl="triton"), oracle, baseline, "out")


CASES = {
    "modulation": (80, modulation, "modulation_fwd_kernel"),
    "attention": (80, attention, "attention_fwd_kernel"),
    "attention with wgmma": (90, attention, "attention_fwd_kernel"),
}


def attempt(check: Callable[[], None], sm: int, rewrite: Callable[[str, str], str]) -> str | None:
    """What finds the fault, under one of three schedules."""
    for schedule in range(3):
        try:
            with poison_empty(), triton_on(sm, rewrite=rewrite, schedule=schedule, budget=1_000_000):
                check()
        except Fault as fault:
            return fault.kind
        except Unsupported:
            raise
        except AssertionError:
            return "wrong result"
    return None


def planted(text: str) -> Iterator[tuple[str, str, str]]:
    """(fault, source line, the changed text)"""
    for label, (pattern, replacement) in FAULTS.items():
        for hit in re.finditer(pattern, text, re.M):
            lines = re.findall(r"// (\S+\.py:\d+)", text[: hit.start()])
            yield label, lines[-1], text[: hit.start()] + hit.expand(replacement) + text[hit.end() :]
    for label, (pattern, replacement) in EVERYWHERE.items():
        if re.search(pattern, text):
            yield label, "everywhere", re.sub(pattern, replacement, text)


def main() -> None:
    for name in sys.argv[1:] or CASES:
        torch.manual_seed(0)
        sm, prepare, kernel = CASES[name]
        check, original = prepare(), {}

        def keep(found: str, text: str, original=original) -> str:
            original[found] = text
            return text

        assert attempt(check, sm, keep) is None, "the kernel as it is"
        for label, line, changed in planted(original[kernel]):
            found = attempt(check, sm, lambda n, t, kernel=kernel, changed=changed: changed if n == kernel else t)
            print(json.dumps(dict(case=name, fault=label, line=line, found=found)), flush=True)


if __name__ == "__main__":
    main()
