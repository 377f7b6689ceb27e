"""R11, R12 where ranks share experts: 10 steps = 5 + 5 bit for bit, and other layouts go on too."""

import pytest
import torch

from tests.parity.test_resume import Steps, differing, result, start, wait, write_text

SHARED = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
    folder = tmp_path_factory.mktemp("resume_shared")
    data = ("--data-path", write_text(folder), "--num-workers", 0)
    half = folder / "half"
    wait(start(half, *data, "--exit-interval", 5, **SHARED))
    resumed = (*data, "--load", half)
    wait(
        start(folder / "unbroken", *data, **SHARED),
        start(folder / "resumed", *resumed, **SHARED),
        start(folder / "spread", *resumed, expert_model_parallel_size=2),
    )
    return {name: result(folder / name) for name in ("unbroken", "resumed", "spread")}


def test_five_and_five_steps_of_shared_experts_are_ten_bit_for_bit(runs: dict[str, Steps]) -> None:
    unbroken, resumed = runs["unbroken"], runs["resumed"]
    assert sorted(resumed.metrics) == [6, 7, 8, 9, 10]
    for iteration, lines in resumed.metrics.items():
        assert list(map(differing, lines, unbroken.metrics[iteration])) == [{}] * len(lines)
    assert resumed.common == unbroken.common
    assert resumed.tensors.keys() == unbroken.tensors.keys()
    for key, tensor in resumed.tensors.items():
        assert torch.equal(tensor, unbroken.tensors[key]), key


def test_a_run_that_shared_experts_goes_on_with_experts_spread_over_ranks(
    runs: dict[str, Steps],
) -> None:
    unbroken, spread = runs["unbroken"], runs["spread"]
    for iteration, lines in spread.metrics.items():
        for name in ("lm_loss", "grad_norm"):
            want = unbroken.metrics[iteration][0][name]
            assert lines[0][name] == pytest.approx(want, rel=1e-4), (iteration, name)
    for key, tensor in spread.tensors.items():
        assert tensor.shape == unbroken.tensors[key].shape, key
