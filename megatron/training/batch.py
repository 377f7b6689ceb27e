"""What a forward step reads: one microbatch of this rank. Order and sizes are the sampler's."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from megatron.training.datasets.batch import Batch


class MicrobatchTensors(NamedTuple):
    """One microbatch in the order that Megatron's ``get_batch`` has."""

    tokens: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[b, s] int64: the next token of each position."""
    loss_mask: Tensor
    """[b, s] float32: 0 where a token does not count."""
    attention_mask: Tensor | None
    """[b, 1, s, s] bool, True where a token may not attend; None for plain causal attention."""
    position_ids: Tensor
    """[b, s] int64."""


def get_batch(data_iterator: Iterator[Batch]) -> MicrobatchTensors:
    """Return the next microbatch of this rank, on the device of the model."""
    batch = next(data_iterator)
    return MicrobatchTensors(
        batch.tokens, batch.labels, batch.loss_mask, batch.attention_mask, batch.position_ids
    )
