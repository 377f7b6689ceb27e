"""Every family computes what transformers computes, in and out bit-equal, on one process."""

import pytest
import torch

from tests.helpers.hf_cases import CASES, RICHEST
from tests.helpers.hf_proof import (
    ONE,
    apart,
    check_round_trip,
    check_round_trip_in_bf16,
    imported,
    refuse_far,
    run,
)

DTYPES = (torch.float32, torch.float64)
EACH = [pytest.param(name, marks=() if name in RICHEST else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", EACH)
def test_an_imported_checkpoint_computes_the_same_and_goes_back(name, tmp_path):
    case = imported(name, tmp_path)
    for dtype, ours in zip(DTYPES, run(case, ONE, DTYPES), strict=True):
        refuse_far(apart(case.theirs[dtype], ours), dtype)
    assert check_round_trip(case, tmp_path / "again") > 0


@pytest.mark.parametrize("name", EACH)
def test_a_checkpoint_in_bf16_goes_in_and_out_bit_for_bit(name, tmp_path):
    assert check_round_trip_in_bf16(name, tmp_path) > 0


def test_the_quick_cases_are_one_of_each_family():
    assert sorted(CASES[name].family for name in RICHEST) == sorted(
        {case.family for case in CASES.values()}
    )
