"""The bias behind the second matrix, where several ranks hold slices of one expert.

Their parts of an output are summed, so one of them adds the bias. All see the same rows and the
same gradient of the sum, so all learn it, bit for bit alike and without asking each other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.process_groups_config import ProcessGroupCollection


def adds_output_bias(pg_collection: ProcessGroupCollection) -> bool:
    """Return whether this rank adds the bias: the first of those that share an expert does."""
    return pg_collection.expt_tp.rank() == 0


def add_output_bias(output: Tensor, weights: Tensor, biases: Tensor, *, adds: bool) -> Tensor:
    """Return ``output + weights @ biases``, or ``output`` itself if another rank adds it.

    Args:
        output: [num_rows, h].
        weights: [num_rows, n], how much of each bias a row gets. Its gradient comes from the rank
            that adds.
        biases: [n, h]; gets its whole gradient on every rank.
        adds: Whether this rank is the one.
    """
    if adds:
        return torch.addmm(output, weights, biases)
    out: Tensor = _LearnOnly.apply(output, weights, biases)
    return out


class _LearnOnly(torch.autograd.Function):
    """The gradient of an addition that happens elsewhere."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (weights,) = ctx.saved_tensors
        return grad, None, weights.t() @ grad
