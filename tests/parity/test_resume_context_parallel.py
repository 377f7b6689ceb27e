"""R11, R12 where ranks share sequences: 5 + 5 steps are 10, and other layouts go on with them.

Experts over the ranks of a sequence, documents that do not see each other, evaluation in between.
"""

import pytest
import torch

from tests.parity.test_resume import Steps, differing, result, start, wait, write_text

pytestmark = pytest.mark.slow

FLAGS = {
    "moe_router_load_balancing_type": "none",
    "num_workers": 0,
}
SHARED = {"context_parallel_size": 2, "cp_comm_type": "all_gather"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
    folder = tmp_path_factory.mktemp("resume_context")
    data = ("--data-path", write_text(folder), "--reset-attention-mask", "--fp64")
    half, whole = folder / "half", folder / "whole"
    wait(
        start(half, *data, "--exit-interval", 5, **FLAGS, **SHARED),
        start(whole, *data, "--exit-interval", 5, **FLAGS),
    )
    wait(
        start(folder / "unbroken", *data, **FLAGS, **SHARED),
        start(folder / "resumed", *data, "--load", half, **FLAGS, **SHARED),
        start(folder / "apart", *data, "--load", half, **FLAGS),
        start(folder / "joined", *data, "--load", whole, **FLAGS, context_parallel_size=2),
    )
    return {name: result(folder / name) for name in ("unbroken", "resumed", "apart", "joined")}


def test_five_and_five_steps_of_shared_sequences_are_ten_bit_for_bit(
    runs: dict[str, Steps],
) -> None:
    unbroken, resumed = runs["unbroken"], runs["resumed"]
    assert sorted(resumed.metrics) == [6, 7, 8, 9, 10]
    for iteration, lines in resumed.metrics.items():
        assert list(map(differing, lines, unbroken.metrics[iteration])) == [{}] * len(lines)
    assert resumed.common == unbroken.common
    assert resumed.tensors.keys() == unbroken.tensors.keys()
    for key, tensor in resumed.tensors.items():
        assert torch.equal(tensor, unbroken.tensors[key]), key


@pytest.mark.parametrize("name", ["apart", "joined"])
def test_a_run_goes_on_with_its_sequences_whole_or_shared(
    runs: dict[str, Steps], name: str
) -> None:
    unbroken, other = runs["unbroken"], runs[name]
    assert sorted(other.metrics) == [6, 7, 8, 9, 10]
    for iteration, lines in other.metrics.items():
        for mine, theirs in zip(lines, unbroken.metrics[iteration], strict=True):
            for key in {"lm_loss", "grad_norm"} & mine.keys():  # of training and evaluation
                assert mine[key] == pytest.approx(theirs[key], rel=1e-9), (iteration, key)
    for key, tensor in other.tensors.items():
        torch.testing.assert_close(tensor, unbroken.tensors[key], rtol=1e-8, atol=1e-10)
