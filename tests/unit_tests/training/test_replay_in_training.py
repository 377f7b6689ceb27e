"""--moe-enable-routing-replay in the real train step: all microbatches of all ranks come back."""

import pytest
import torch
from torch import Tensor

from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_batches, tiny_run


def _counts(run: Run, iteration: int) -> Tensor:
    assert train_step(run, TrainState(iteration=iteration), tiny_batches(run)).updated
    return run.moe_metrics.report(run.world.pg_collection).tokens_per_expert


def _record_and_replay(ep: int) -> None:
    flags = "--micro-batch-size 2 --moe-enable-routing-replay --lr 0.3"
    run = tiny_run(f"{flags} --expert-model-parallel-size {ep}")
    replays = RouterReplay.instances(run.model)
    assert len(replays) == 2
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD, run.model)
    recorded = _counts(run, 0)
    for replay in replays:
        assert list(replay.recorded) == list(range(run.num_microbatches))
        for microbatch, indices in replay.recorded.items():
            assert indices.shape == (32, 2)
            replay.set_target_indices(indices, microbatch)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD, run.model)
    assert torch.equal(_counts(run, 1), recorded), "though the router has moved"
    RouterReplay.clear_global_router_replay_action(run.model)
    assert not torch.equal(_counts(run, 2), recorded)


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_a_step_is_recorded_and_replayed(world_size, ep):
    run_ranks(_record_and_replay, world_size, ep)
