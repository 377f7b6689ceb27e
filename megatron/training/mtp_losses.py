"""The losses of multi-token prediction in one step: their weights before, their means after it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.transformer.tokens_ahead import AheadOfStep, look_ahead
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World


def with_ahead(batch: Batch, depths: int) -> Batch:
    """Return ``batch``, of whole sequences, with what ``depths`` modules read of it."""
    if not depths:
        return batch
    ids, mask = look_ahead(
        batch.tokens,
        batch.position_ids,
        batch.labels,
        batch.loss_mask,
        batch.attention_mask,
        depths=depths,
    )
    return replace(batch, ahead_ids=ids, ahead_mask=mask)


def labels_ahead(batches: Sequence[Batch], depths: int) -> list[float]:
    """Count the labels ahead that count in ``batches``, of each depth."""
    masks = [batch.ahead_mask for batch in batches if batch.ahead_mask is not None]
    return [float(sum(int(mask[:, :, depth].sum()) for mask in masks)) for depth in range(depths)]


@dataclass(frozen=True, kw_only=True)
class MTPLosses:
    """Of the depths of one step."""

    counts: Tensor
    """[D] fp64: labels that count in the global batch, at least 1."""
    weights: Tensor
    """[D] fp64: of the sum of the losses of a depth, in the scaled loss of the step."""
    sums: Tensor
    """[microbatches, D] fp64, of this rank; zeros where another stage has the loss."""

    @classmethod
    def of_step(
        cls, config: TransformerConfig, counts: Tensor, *, num_microbatches: int, loss_scale: float
    ) -> "MTPLosses":
        """Weigh each depth by its mean loss, and the mean of those by its factor."""
        depths = config.mtp_depths
        share = config.mtp_loss_scaling_factor / max(depths, 1)
        sums = torch.zeros(num_microbatches, depths, dtype=torch.float64, device=counts.device)
        return cls(counts=counts, weights=loss_scale * share / counts, sums=sums)

    def of_microbatch(self, index: int, batch: Batch) -> AheadOfStep | None:
        """Return what the model needs for microbatch ``index``; None without depths."""
        if batch.ahead_ids is None or batch.ahead_mask is None:
            return None
        return AheadOfStep(
            ids=batch.ahead_ids,
            mask=batch.ahead_mask,
            weights=self.weights,
            sums=self.sums[index],
        )

    def means(self, world: World) -> tuple[float, ...]:
        """Return the mean loss of each depth over the global batch, on all ranks; collective."""
        if not len(self.counts):
            return ()
        totals = self.sums.sum(dim=0)
        if world.pg_collection.tp.rank() > 0:  # tensor-parallel ranks have the same losses
            totals = torch.zeros_like(totals)
        dist.all_reduce(totals, group=world.pg_collection.world)
        found: list[float] = (totals / self.counts).tolist()
        return tuple(found)
