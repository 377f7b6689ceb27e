"""Mean loss of held-out samples. Changes nothing that training depends on.

No dropout, no auxiliary loss, no metrics, no draw from any generator, and the same samples at every
evaluation, so that losses compare along a run and over a resume.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from megatron.core.transformer.forward_context import ForwardContext
from megatron.training.datasets.batch import Batch
from megatron.training.run import Run
from megatron.training.train_step import checked_loss


@torch.no_grad()
def evaluate(run: Run, data_iterator: Iterator[Batch], num_batches: int) -> float:
    """Return the sum of losses over the number of unmasked tokens. All ranks call this.

    Args:
        run: Model and groups; the model is left in training mode.
        data_iterator: Microbatches of this rank, whole sequences, from the first held-out sample.
        num_batches: Global batches to read.
    """
    run.model.eval()
    cp = run.world.pg_collection.cp
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    for _ in range(num_batches * run.num_microbatches):
        batch = next(data_iterator).of_positions(cp.rank(), cp.size()).to(run.world.device)
        context = ForwardContext(padding_mask=batch.padding_mask, same_num_tokens=True)
        model = partial(run.model, context=context)
        output, loss_func = run.forward_step(iter((batch,)), model)
        loss_sum, num_tokens = checked_loss(loss_func(output))
        sums += torch.stack([loss_sum.double(), num_tokens.double()])
    run.model.train()
    dist.all_reduce(sums, group=run.world.pg_collection.dp_cp)
    loss_sum, num_tokens = sums.tolist()
    return loss_sum / max(num_tokens, 1.0)
