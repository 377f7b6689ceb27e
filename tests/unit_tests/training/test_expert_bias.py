"""R6: an expert bias moves once in every step that is made, from all its tokens; else never."""

import pytest
import torch
from torch import Tensor

from megatron.training.evaluate import evaluate
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import skipped_step, tiny_batches, tiny_run

FLAGS = (
    "--micro-batch-size 1 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.25"
)


def _biases(run: Run) -> Tensor:
    found = [b for name, b in run.model.named_buffers() if name.endswith("router.expert_bias")]
    assert len(found) == 2
    return torch.stack(found)


def _one_update_a_step(ep: int) -> None:
    run = tiny_run(f"{FLAGS} --expert-model-parallel-size {ep}")
    want = torch.zeros_like(_biases(run))
    data = tiny_batches(run)
    for iteration in range(3):  # after two a bias may have come back to 0
        train_step(run, TrainState(iteration=iteration), data)
        counts = run.moe_metrics.report(run.world.pg_collection).tokens_per_expert.double()
        want += 0.25 * (counts.mean(dim=1, keepdim=True) - counts).sign()
        assert torch.equal(_biases(run), want)
    assert want.any()
    evaluate(run, tiny_batches(run), num_batches=2)
    assert torch.equal(_biases(run), want)


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_a_step_moves_the_bias_once_by_the_counts_of_all_ranks_and_microbatches(world_size, ep):
    run_ranks(_one_update_a_step, world_size, ep)


def _skipped(spoil: float) -> None:
    run = skipped_step(FLAGS, spoil)
    assert not _biases(run).any()


def test_a_skipped_step_leaves_the_bias() -> None:
    run_ranks(_skipped, 2, float("inf"))
