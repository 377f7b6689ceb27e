"""R7: replicas stay bit-equal over ten steps, and --check-replica-hash finds one that drifts."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed.replica_check import ReplicaError
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from megatron.training.training import check_replicas_in_time
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_batches, tiny_run

FLAGS = (
    "--micro-batch-size 1 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--expert-model-parallel-size 2 --check-replica-hash 2"
)


def _ten_steps() -> None:
    run, state = tiny_run(FLAGS), TrainState()
    data = tiny_batches(run)
    for _ in range(10):
        assert train_step(run, state, data).updated
        state.iteration += 1
        check_replicas_in_time(run, state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_are_equal_over_ten_steps(world_size: int) -> None:
    run_ranks(_ten_steps, world_size)


def _planted(name: str) -> None:
    run, state = tiny_run(FLAGS), TrainState(iteration=3)
    if dist.get_rank() == 1:
        tensor = run.model.module.state_dict()[name]
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0).to(tensor))
    check_replicas_in_time(run, state)  # iteration 3 is none of them
    state.iteration = 4
    with pytest.raises(ReplicaError, match=f"after iteration 4 in 1 tensor, .*: {name} on rank 1"):
        check_replicas_in_time(run, state)


@pytest.mark.parametrize("tensor", ["router.weight", "router.expert_bias"])
def test_one_bit_of_a_router_that_drifted_ends_the_run_at_the_next_check(tensor: str) -> None:
    run_ranks(_planted, 2, f"decoder.layers.1.mlp.{tensor}")


def _not_asked() -> None:
    run = tiny_run(FLAGS.replace("--check-replica-hash 2", ""))
    if dist.get_rank() == 1:
        next(iter(run.model.parameters())).data.add_(1.0)
    check_replicas_in_time(run, TrainState(iteration=4))


def test_without_the_flag_nothing_is_compared() -> None:
    run_ranks(_not_asked, 2)
