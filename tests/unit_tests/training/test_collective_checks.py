"""R9, live: --check-collectives lets equal ranks train alike, and names where two part company."""

import pytest
import torch.distributed as dist

from megatron.core.distributed.collective_log import CollectiveChecks, CollectiveError
from megatron.training.initialize import collective_checks
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_batches, tiny_run

LAYOUTS = {
    "experts, sharded optimizer": "--micro-batch-size 1 --expert-model-parallel-size 2 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "tensor and sequence": "--tensor-model-parallel-size 2 --sequence-parallel",
    "context": "--context-parallel-size 2 --cp-comm-type a2a",
    "microbatches in turns": "--micro-batch-size 1 --expert-model-parallel-size 2 "
    "--overlap-moe-expert-parallel-comm",
}


def _losses(flags: str) -> tuple[list[float], int]:
    """Train two steps; return their losses, and how many collectives were compared."""
    compared = []
    original = CollectiveChecks.compare

    def counted(self, group, call):
        compared.append(call)
        original(self, group, call)

    CollectiveChecks.compare = counted
    try:
        run = tiny_run(flags)
        data, losses = tiny_batches(run), []
        with collective_checks(run.config):
            for iteration in range(2):
                state = TrainState(iteration=iteration)
                losses.append(train_step(run, state, data).lm_loss)
    finally:
        CollectiveChecks.compare = original
    return losses, len(compared)


def _same(flags: str) -> None:
    plain, none = _losses(flags)
    checked, compared = _losses(f"{flags} --check-collectives")
    assert none == 0
    assert compared > 10
    assert plain == checked


@pytest.mark.parametrize("name", LAYOUTS)
def test_checks_change_no_bit_of_a_run(name):
    run_ranks(_same, 2, LAYOUTS[name])


def _planted() -> None:
    run = tiny_run("--micro-batch-size 1 --check-collectives")
    if dist.get_rank() == 1:  # as if its last bucket were forgotten
        run.model._reducer._buckets = run.model._reducer._buckets[:-1]
    data = tiny_batches(run)
    with collective_checks(run.config), pytest.raises(CollectiveError) as error:
        train_step(run, TrainState(), data)
    text = str(error.value)
    assert "calls differ" in text
    assert "rank 0: all_reduce sum" in text
    assert "rank 1: all_reduce sum" in text
    assert "megatron/core/distributed/param_and_grad_buffer.py" in text
    assert "megatron/training/train_step.py" in text


def test_a_bucket_that_one_rank_forgets_is_found_in_its_first_step():
    run_ranks(_planted, 2)
