"""Padding masks on their way from samples to MoE layers."""

import torch

from megatron.core.transformer.forward_context import ForwardContext
from megatron.training.datasets.batch import Batch
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import SEQ, tiny_batches, tiny_run


def _sample(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(4)
    plain = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(4), "position_ids": ids}
    return plain | more


def test_samples_with_and_without_a_mask_make_one_batch():
    mask = torch.tensor([False, False, True, True])
    assert Batch.of_samples([_sample(), _sample()], (0, 1)).padding_mask is None
    for samples in ([_sample(), _sample(padding_mask=mask)], [_sample(padding_mask=mask)] * 2):
        batch = Batch.of_samples(samples, (0, 1)).to("cpu")
        assert batch.padding_mask is not None
        assert batch.padding_mask.dtype == torch.bool
        assert batch.padding_mask[1].tolist() == mask.tolist()
    assert (
        not Batch.of_samples([_sample(), _sample(padding_mask=mask)], (0, 1)).padding_mask[0].any()
    )


def _through_the_model() -> None:
    run = tiny_run("--micro-batch-size 2")
    batch = next(tiny_batches(run))
    mask = torch.arange(SEQ).expand(2, SEQ) >= torch.tensor([[SEQ - 5], [3]])
    counted = []
    for by_argument in (True, False):
        context = ForwardContext(
            moe_metrics=run.moe_metrics, padding_mask=None if by_argument else mask
        )
        more = {"padding_mask": mask} if by_argument else {}
        losses = run.model(
            batch.tokens, batch.position_ids, labels=batch.labels, context=context, **more
        )
        assert losses.shape == (2, SEQ)
        run.moe_metrics.end_step()
        counted.append(run.moe_metrics.report(run.world.pg_collection).tokens_per_expert)
    assert torch.equal(*counted)
    assert counted[0].sum(dim=1).tolist() == [2 * (SEQ - 5 + 3)] * 2


def test_a_model_takes_the_mask_as_argument_or_in_its_context():
    run_ranks(_through_the_model, 1)
