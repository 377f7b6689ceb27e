"""Mean loss of held-out samples. Changes nothing that training depends on.

No dropout, no auxiliary loss, no metrics, no draw from any generator, and the same samples at every
evaluation, so that losses compare along a run and over a resume.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.forward_context import ForwardContext
from megatron.training.datasets.batch import Batch
from megatron.training.run import Run
from megatron.training.train_step import checked_loss, next_batches


@torch.no_grad()
def evaluate(run: Run, data_iterator: Iterator[Batch], num_batches: int) -> float:
    """Return the sum of losses over the number of unmasked tokens. All ranks call this.

    Args:
        run: Model and groups; the model is left in training mode.
        data_iterator: Microbatches of this rank, whole sequences, from the first held-out sample.
        num_batches: Global batches to read.
    """
    run.model.eval()
    groups = run.world.pg_collection
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    for _ in range(num_batches):
        batches = next_batches(run, data_iterator)
        _add_losses(run, [batch.to(run.world.device) for batch in batches], sums)
    run.model.train()
    dist.all_reduce(sums, group=groups.dp_cp)
    sums = all_reduce_sum(groups.pp, sums)  # zeros where the stage has no loss
    loss_sum, num_tokens = sums.tolist()
    return loss_sum / max(num_tokens, 1.0)


def _add_losses(run: Run, batches: Sequence[Batch], sums: Tensor) -> None:
    """Add to ``sums`` [2] the losses of the tokens that count, and their number."""

    def forward(index: int, chunk: int, pipeline_input: Tensor | None) -> Tensor:
        batch = batches[index]
        context = ForwardContext(
            chunk=chunk,
            pipeline_input=pipeline_input,
            padding_mask=batch.padding_mask,
            same_num_tokens=True,
        )
        output, loss_func = run.forward_step(iter((batch,)), partial(run.model, context=context))
        if run.pipeline.has_loss(chunk):
            loss_sum, num_tokens = checked_loss(loss_func(output))
            sums.add_(torch.stack([loss_sum.double(), num_tokens.double()]))
        return output

    run.pipeline.forward_only(forward)
