"""What makes weights of attention scores: scale, soft cap, window, sink, dropout.

One object of all of them goes to whichever way attention is computed (one kernel, blocks, a ring
of ranks), so that each way must mean the same by it.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.blocked_attention import WeightDropout


class Weighting(NamedTuple):
    """weights = dropout(softmax(cap(scale * q k))), over a window of each position's past."""

    scale: float | None = None
    """Of the products of queries and keys; None for 1 / sqrt(size of a query)."""
    window: int | None = None
    """Positions that a query sees before its own; None for all of them."""
    softcap: float | None = None
    """c: scores become c * tanh(score / c). None leaves them.

    Source: Bello et al. 2016 (arXiv:1611.09940), eq. 16."""
    sink: Tensor | None = None
    """[heads], of the query heads that are here: one more logit in the denominator of each softmax,
    which no value belongs to, so that weights may sum to less than 1. None for no such logit.

    Source: Miller 2023, "Attention is off by one" (a logit of 0); Xiao et al. 2023
    (arXiv:2309.17453); OpenAI 2025 (arXiv:2508.10925), learnt."""
    dropout: "WeightDropout | None" = None
    """Of weights, the sink's share left alone; None drops nothing."""

    def scale_of(self, query: Tensor) -> float:
        """Return what products of ``query`` [..., d] and keys are multiplied by."""
        return float(query.shape[-1] ** -0.5) if self.scale is None else self.scale

    def first_seen(self, position: int) -> int:
        """Return the first position that a query at ``position`` sees."""
        return 0 if self.window is None else max(0, position - self.window)

    def cap_(self, scores: Tensor) -> Tensor:
        """Cap scores in place."""
        if self.softcap is None:
            return scores
        return scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, capped: Tensor) -> Tensor | None:
        """Return d capped / d score, 1 - (capped / c)^2, of finite scores; None means 1."""
        if self.softcap is None:
            return None
        return (capped / self.softcap).square_().neg_().add_(1.0)

    def hide_passed_(self, scores: Tensor, row: int, column: int) -> Tensor:
        """Put -inf, in place, where a key lies before the window of a query.

        Args:
            scores: [..., rows, columns].
            row: Position of the first query.
            column: Position of the first key.
        """
        rows, columns = scores.shape[-2:]
        if self.window is None or column >= self.first_seen(row + rows - 1):
            return scores
        shape, before = (rows, columns), row - column - self.window
        passed = torch.ones(shape, dtype=torch.bool, device=scores.device).tril_(before - 1)
        return scores.masked_fill_(passed, float("-inf"))


PLAIN = Weighting()
"""Softmax of q k / sqrt(d) over the whole past, nothing dropped."""
