"""R6 for quantile balancing: prices move once in every step that is made; else never."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.training.evaluate import evaluate
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import skipped_step, tiny_batches, tiny_run

FLAGS = (
    "--micro-batch-size 1 --moe-router-load-balancing-type quantile_balancing "
    "--moe-router-quantile-balancing-ema 0.25"
)


def _prices(run: Run) -> Tensor:
    saved = model_tensors(run.model.module)
    found = [tensor for key, tensor in saved.items() if key.endswith("router.qb_beta")]
    assert len(found) == 2
    return torch.stack(found).clone()


def _one_update_a_step(ep: int) -> None:
    run = tiny_run(f"{FLAGS} --expert-model-parallel-size {ep}")
    asked: dict[tuple[int, int], Tensor] = {}
    record = MoEMetricsTracker.record_quantiles

    def kept(tracker, layer, microbatch, quantiles, num_tokens):
        assert num_tokens == 16
        asked[layer, microbatch] = quantiles.detach().clone()
        record(tracker, layer, microbatch, quantiles, num_tokens)

    want, data = _prices(run), tiny_batches(run)
    assert not want.any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoEMetricsTracker, "record_quantiles", kept)
        for iteration in range(2):
            asked.clear()
            train_step(run, TrainState(iteration=iteration), data)
            assert len(asked) == 2 * run.num_microbatches
            for layer in range(2):
                mine = torch.stack([asked[layer, m] for m in range(run.num_microbatches)])
                total = mine.sum(dim=0)
                dist.all_reduce(total)
                mixed = 0.25 * want[layer].double() + 0.75 * total / 8
                want[layer] = mixed - mixed.mean()
            torch.testing.assert_close(_prices(run), want, rtol=1e-6, atol=1e-7)
    assert want.abs().max() > 1e-3
    before = _prices(run)
    evaluate(run, tiny_batches(run), num_batches=2)
    assert torch.equal(_prices(run), before)


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_a_step_moves_prices_once_by_the_quantiles_of_all_ranks(world_size, ep):
    run_ranks(_one_update_a_step, world_size, ep)


def _skipped(spoil: float) -> None:
    run = skipped_step(FLAGS, spoil)
    assert not _prices(run).any()


def test_a_skipped_step_leaves_the_prices() -> None:
    run_ranks(_skipped, 2, float("inf"))
