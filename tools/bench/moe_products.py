"""The matrix products that a MoE layer cannot do without, and nothing else: its limit on a CPU.

Each expert's six products (two forward, four backward) with its own number of rows, rounded up as
the layer rounds it, into tensors that are there already, over weights as large as the layer's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.transformer.moe.expert_loop import padded_size


class Sums(NamedTuple):
    """Where weight gradients are added up, fp32; [E, 2 * ffn, h] and [E, h, ffn]."""

    weight1: Tensor
    weight2: Tensor


class ProductLimit:
    """Calling it does the products of one forward and backward.

    With ``sums`` weight gradients are added to them, as training does: by the product itself in
    fp32, by a second pass in bf16, whose products torch cannot add to fp32. Without, each
    overwrites one buffer.
    """

    def __init__(
        self, weight1: Tensor, weight2: Tensor, sizes: Sequence[int], sums: Sums | None
    ) -> None:
        """Make the operands.

        Args:
            weight1: [E, 2 * ffn, h].
            weight2: [E, h, ffn].
            sizes: Rows of each expert.
            sums: See the class.
        """
        self.weights = (weight1.detach(), weight2.detach())
        self.sizes = [padded_size(size, weight1.dtype) for size in sizes]
        self.sums = sums
        self.one = (torch.empty_like(self.weights[0][0]), torch.empty_like(self.weights[1][0]))
        width, hidden = weight1.shape[1:]
        most = max(self.sizes)
        self.rows, self.inner, self.active = (
            torch.randn(most, columns, dtype=weight1.dtype)
            for columns in (hidden, width, width // 2)
        )
        self.row_out, self.inner_out, self.active_out = map(
            torch.empty_like, (self.rows, self.inner, self.active)
        )

    def __call__(self) -> None:
        """Do the products, expert by expert, forward and then backward."""
        for w1, w2, size in zip(*self.weights, self.sizes, strict=True):
            torch.mm(self.rows[:size], w1.t(), out=self.inner_out[:size])
            torch.mm(self.active[:size], w2.t(), out=self.row_out[:size])
        for expert, (w1, w2, size) in enumerate(zip(*self.weights, self.sizes, strict=True)):
            rows, inner, active = self.rows[:size], self.inner[:size], self.active[:size]
            torch.mm(rows, w2, out=self.active_out[:size])
            self._weight_gradient(1, expert, rows, active)
            self._weight_gradient(0, expert, inner, rows)
            torch.mm(inner, w1, out=self.row_out[:size])

    def _weight_gradient(self, which: int, expert: int, left: Tensor, right: Tensor) -> None:
        if self.sums is None:
            torch.mm(left.t(), right, out=self.one[which])
        elif self.sums[which].dtype == left.dtype:
            self.sums[which][expert].addmm_(left.t(), right)
        else:
            torch.mm(left.t(), right, out=self.one[which])
            self.sums[which][expert].add_(self.one[which])
