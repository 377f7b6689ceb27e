"""R11, R12 with tensor, sequence and expert parallelism at once: 10 steps = 5 + 5, bit for bit."""

from pathlib import Path

import pytest
import torch

from tests.parity.test_resume import differing, result, start, wait, write_text

GRID = {
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "padded_vocab_size": 512,
}
SHARED = "--sequence-parallel"


@pytest.mark.slow
def test_five_and_five_steps_are_ten_bit_for_bit(tmp_path: Path) -> None:
    data = ("--data-path", write_text(tmp_path), "--num-workers", 0)
    half = tmp_path / "half"
    wait(start(half, *data, SHARED, "--exit-interval", 5, **GRID))
    resumed_data = (*data, "--load", half)
    wait(
        start(tmp_path / "unbroken", *data, SHARED, **GRID),
        start(tmp_path / "resumed", *resumed_data, SHARED, **GRID),
        start(
            tmp_path / "alone", *resumed_data, SHARED, padded_vocab_size=512
        ),  # a notice: nothing to split
    )
    unbroken, resumed, alone = (result(tmp_path / x) for x in ("unbroken", "resumed", "alone"))
    assert sorted(resumed.metrics) == [6, 7, 8, 9, 10]
    for iteration, lines in resumed.metrics.items():
        assert list(map(differing, lines, unbroken.metrics[iteration])) == [{}] * len(lines)
    assert resumed.common == unbroken.common
    for key, tensor in resumed.tensors.items():
        assert torch.equal(tensor, unbroken.tensors[key]), key
    for iteration, lines in alone.metrics.items():
        want = unbroken.metrics[iteration][0]["lm_loss"]
        assert lines[0]["lm_loss"] == pytest.approx(want, rel=1e-4), iteration
    assert "--sequence-parallel: nothing to split" in (tmp_path / "alone.rank0.log").read_text()
