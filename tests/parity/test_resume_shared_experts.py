"""R11, R12 where ranks share experts: 10 steps = 5 + 5 bit for bit, and other layouts go on too."""

from pathlib import Path

import pytest
import torch

from tests.parity.test_resume import Steps, differing, result, start, wait, write_text

SHARED = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume_shared")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Steps]:
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


pytestmark = pytest.mark.slow


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


@pytest.mark.slow
def test_the_log_counts_every_parameter_once(runs: dict[str, Steps], folder: Path) -> None:
    experts = 4 * 2 * (2 * 32 * 128 + 128 + 32)  # of 2 layers: two matrices, two biases
    total = sum(t.numel() for key, t in runs["unbroken"].tensors.items() if _is_weight(key))
    for name, ranks in (("half", "1 expert-parallel rank, each expert over 2"), ("spread", "2")):
        log = (folder / f"{name}.rank0.log").read_text()
        assert f"whole model: {total} ({experts} of them in experts, spread over {ranks}" in log


def _is_weight(key: str) -> bool:
    return key.startswith("model.") and not key.endswith("expert_bias")
