"""As cases_sizes.py for a few: programs of the launches of all other cases at the sizes of models."""

from __future__ import annotations

import compile_kernels
import pytest

from ptx.cases_sizes import CASES, run

FAMILIES = compile_kernels.ALL.keys() - {"attention"}  # whose programs visit tens of thousands of keys each
EVERY = dict.fromkeys((family, name) for family in sorted(FAMILIES) for name, *_ in compile_kernels.ALL[family]())


@pytest.mark.parametrize("family, name", [case for case in EVERY if case[1] not in CASES[case[0]]])
def test_first_middle_and_last_program_stay_within_their_memory(family, name, pytestconfig):
    run(family, name, pytestconfig.getoption("--ptx"))
