"""Every family computes what transformers computes, in and out bit-equal, on one process."""

import pytest
import torch

from megatron.training.huggingface import export_checkpoint, import_checkpoint
from tests.helpers.hf_cases import CASES
from tests.helpers.hf_models import make_checkpoint
from tests.helpers.hf_proof import (
    ONE,
    apart,
    check_round_trip,
    imported,
    refuse_far,
    refuse_other_bits,
    run,
)

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_an_imported_checkpoint_computes_the_same_and_goes_back(name, tmp_path):
    case = imported(name, tmp_path)
    for dtype, ours in zip(DTYPES, run(case, ONE, DTYPES), strict=True):
        refuse_far(apart(case.theirs[dtype], ours), dtype)
    assert check_round_trip(case, tmp_path / "again") > 0


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_in_bf16_goes_in_and_out_bit_for_bit(name, tmp_path):
    make_checkpoint(CASES[name], tmp_path / "hf", dtype=torch.bfloat16)
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    assert refuse_other_bits(tmp_path / "hf", tmp_path / "again") > 0
