"""Numbers that would be lost on the way are refused, not rounded away."""

import pytest
import torch
from torch import Tensor

from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.exchange import hf_tensor, our_tensor
from tests.helpers.hf_tiny import plan_of

KEY, HF_KEY = "decoder.final_layernorm.weight", "model.norm.weight"


def exchanged(values: list[float], dtype: torch.dtype, kept: torch.dtype, way: str) -> Tensor:
    plan = plan_of("llama2")
    whole = torch.zeros(plan.shapes[KEY], dtype=kept)
    whole[: len(values)] = torch.tensor(values).to(kept)
    if way == "in":
        return our_tensor(plan, KEY, dtype, lambda name, rows: whole)
    return hf_tensor(plan, HF_KEY, dtype, lambda name: whole)


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("value", [70000.0, -1e6])
def test_a_number_beyond_fp16_is_refused(value: float, way: str) -> None:
    with pytest.raises(CheckpointError, match=r"holds .* and fp16 ends at 65504: use bf16"):
        exchanged([1.0, value], torch.float16, torch.bfloat16, way)


@pytest.mark.parametrize("way", ["in", "out"])
def test_numbers_that_fit_and_infinite_ones_pass(way: str) -> None:
    assert exchanged([1.0, 65504.0], torch.float16, torch.float32, way)[1] == 65504
    assert exchanged([1.0, 70000.0], torch.bfloat16, torch.float32, way)[1] > 69000
    assert exchanged([float("inf")], torch.float16, torch.float32, way)[0].isinf()


def test_whole_numbers_are_no_weights() -> None:
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds torch.int8"):
        exchanged([1.0], torch.float32, torch.int8, "in")
