"""R11, R12 over stages: 10 steps = 5 + 5, bit for bit, and one pipeline rank goes on from two."""

from pathlib import Path

import pytest
import torch

from tests.parity.test_resume import differing, result, start, wait, write_text

STAGES = {
    "pipeline_model_parallel_size": 2,
    "num_virtual_stages_per_pipeline_rank": 2,
    "num_layers": 4,
    "expert_model_parallel_size": 1,
}


@pytest.mark.slow
def test_five_and_five_steps_are_ten_bit_for_bit(tmp_path: Path) -> None:
    data = ("--data-path", write_text(tmp_path), "--num-workers", 0)
    half = tmp_path / "half"
    wait(start(half, *data, "--exit-interval", 5, **STAGES))
    resumed_data = (*data, "--load", half)
    wait(
        start(tmp_path / "unbroken", *data, **STAGES),
        start(tmp_path / "resumed", *resumed_data, **STAGES),
        start(tmp_path / "data", *resumed_data, "--use-distributed-optimizer", num_layers=4),
    )
    unbroken, resumed, other = (result(tmp_path / x) for x in ("unbroken", "resumed", "data"))
    assert sorted(resumed.metrics) == [6, 7, 8, 9, 10]
    for iteration, lines in resumed.metrics.items():
        assert list(map(differing, lines, unbroken.metrics[iteration])) == [{}] * len(lines)
    assert resumed.common == unbroken.common
    assert resumed.tensors.keys() == unbroken.tensors.keys() == other.tensors.keys()
    for key, tensor in resumed.tensors.items():
        assert torch.equal(tensor, unbroken.tensors[key]), key
    for iteration, lines in other.metrics.items():
        want = unbroken.metrics[iteration]
        assert lines[0]["lm_loss"] == pytest.approx(want[0]["lm_loss"], rel=1e-4), iteration
        assert lines[-1].keys() == want[-1].keys()
