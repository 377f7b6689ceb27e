"""All experts of a rank in one autograd function, one after another: the fastest way on a CPU.

What an expert needs at a time stays in the cache, no tensor is so large that the system maps it
anew in each step, and rows come in multiples of 16: a kernel is compiled for every new number of
rows, and 5 rows alone may differ in the last bit from the same rows among others.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.grad_sink import GradSink, grad_sink_of
from megatron.core.transformer.moe.expert_activation import activate, differentiate

ROW_MULTIPLE = 16


class ExpertWeights(NamedTuple):
    """The stacked parameters of a bank; see ``GroupedMLP``."""

    weight1: Tensor
    weight2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None


def looped_experts(
    rows: Tensor,
    tokens_per_expert: Tensor,
    probs: Tensor,
    weights: ExpertWeights,
    *,
    gated: bool,
    adds_bias2: bool = True,
) -> Tensor:
    """Return ``prob * expert(row)`` for each row.

    Args:
        rows: [num_rows, h], grouped by expert.
        tokens_per_expert: [num_experts], int64; sums to num_rows. Copied to the host.
        probs: [num_rows], fp32 or fp64.
        weights: Of the experts; each gets a gradient, zeros where it had no rows. One that has
            a ``grad_sink_of`` gets it there, which saves a pass over memory as large as it.
        gated: SwiGLU instead of GELU.
        adds_bias2: False when another rank adds ``bias2``; it gets its gradient all the same.

    Returns:
        [num_rows, h].
    """
    sizes = tokens_per_expert.tolist()
    out: Tensor = _LoopedExperts.apply(rows, probs, sizes, gated, adds_bias2, *weights)
    return out


class _LoopedExperts(torch.autograd.Function):
    """Keeps rows, and the output of the first matrix; the activation is made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probs: Tensor,
        sizes: list[int],
        gated: bool,
        adds_bias2: bool,
        *weights: Tensor,
    ) -> Tensor:
        out = _room_for(rows)
        inners = []
        for place, (w1, w2, b1, b2) in zip(_places(sizes), _each(weights), strict=True):
            x, p = place.padded_rows(rows), place.padded_probs(probs)
            inner = x @ w1.t() if b1 is None else torch.addmm(b1, x, w1.t())
            active = activate(inner, p, gated=gated)
            y = out[place.padded]
            torch.mm(active, w2.t(), out=y)
            if b2 is not None and adds_bias2:
                y.add_(p.to(y.dtype).unsqueeze(1) * b2)
            inners.append(inner)
        ctx.sizes, ctx.gated, ctx.adds_bias2 = sizes, gated, adds_bias2
        ctx.sinks = [grad_sink_of(weight) for weight in weights]
        ctx.save_for_backward(rows, probs, *weights, *inners)
        return out.resize_(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, *rest = ctx.saved_tensors
        weights, inners = rest[:4], rest[4:]
        grad_rows, grad_probs = _room_for(rows), torch.empty_like(probs)
        grads = [
            None if weight is None else _GradientStack(weight, sink)
            for weight, sink in zip(weights, ctx.sinks, strict=True)
        ]
        dw1, dw2, db1, db2 = grads
        assert dw1 is not None, "experts have a first matrix"
        assert dw2 is not None, "experts have a second matrix"
        for expert, (place, (w1, w2, _, b2), inner) in enumerate(
            zip(_places(ctx.sizes), _each(weights), inners, strict=True)
        ):
            x, p, g = (
                place.padded_rows(rows),
                place.padded_probs(probs),
                place.padded_rows(grad),
            )
            found = differentiate(inner, p, g @ w2, gated=ctx.gated)
            dw2.put_product(expert, g.t(), found.activated)
            dw1.put_product(expert, found.inner.t(), x)
            torch.mm(found.inner, w1, out=grad_rows[place.padded])
            grad_p = found.probs
            if db1 is not None and db2 is not None:
                if ctx.adds_bias2:
                    grad_p = grad_p + (g @ b2).to(p.dtype)
                db1.put(expert, found.inner.sum(dim=0))
                db2.put(expert, torch.mv(g.t(), p.to(g.dtype)))
            grad_probs[place.own] = grad_p[: place.size]
        return (
            grad_rows.resize_(rows.shape),
            grad_probs,
            None,
            None,
            None,
            *map(_GradientStack.returned, grads),
        )


class _GradientStack:
    """The gradient of one stacked parameter, made expert by expert.

    Added to its sink, where there is one; else a fresh tensor, of which each expert is put once.
    """

    def __init__(self, weight: Tensor, sink: GradSink | None) -> None:
        self._adds = sink is not None
        self._stack = torch.empty_like(weight) if sink is None else sink()

    @staticmethod
    def returned(stack: "_GradientStack | None") -> Tensor | None:
        """Return what autograd is to be given."""
        return None if stack is None or stack._adds else stack._stack

    def put_product(self, expert: int, left: Tensor, right: Tensor) -> None:
        """Put ``left @ right``; one pass over memory where the dtypes allow it."""
        place = self._stack[expert]
        if not self._adds:
            torch.mm(left, right, out=place)
        elif place.dtype == left.dtype:
            place.addmm_(left, right)
        elif left.shape[1]:
            place.add_(left @ right)

    def put(self, expert: int, gradient: Tensor) -> None:
        """Put ``gradient`` as it is."""
        place = self._stack[expert]
        if self._adds:
            place.add_(gradient)
        else:
            place.copy_(gradient)


def _each(weights: Sequence[Tensor | None]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield the parameters of each expert; views, None where there is no bias."""
    weight1, weight2, bias1, bias2 = weights
    assert weight1 is not None, "experts have a first matrix"
    assert weight2 is not None, "experts have a second matrix"
    none = [None] * len(weight1)
    yield from zip(
        weight1.unbind(),
        weight2.unbind(),
        none if bias1 is None else bias1.unbind(),
        none if bias2 is None else bias2.unbind(),
        strict=True,
    )


class _Place(NamedTuple):
    """Where the rows of one expert lie, and those that fill them up to a multiple of 16.

    The filling rows are those of the next expert, with prob 0: they add nothing to a gradient, and
    what is written for them is written over by the next expert. So nothing is copied to be padded.
    """

    start: int
    size: int

    @property
    def own(self) -> slice:
        """Rows of the expert."""
        return slice(self.start, self.start + self.size)

    @property
    def padded(self) -> slice:
        """Rows of the expert and rows that fill up; they may reach behind the last row of all."""
        return slice(self.start, self.start + self.size + -self.size % ROW_MULTIPLE)

    def padded_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [padded]; zeros behind the last row."""
        block = rows[self.padded]
        missing = self.padded.stop - self.start - len(block)
        return torch.cat((block, block.new_zeros(missing, rows.shape[1]))) if missing else block

    def padded_probs(self, probs: Tensor) -> Tensor:
        """Return the expert's ``probs`` and zeros."""
        padded = probs.new_zeros(self.padded.stop - self.start)
        padded[: self.size] = probs[self.own]
        return padded


def _places(sizes: Sequence[int]) -> Iterator[_Place]:
    """Yield the place of each expert; one behind the other."""
    return map(_Place, accumulate(sizes, initial=0), sizes)


def _room_for(rows: Tensor) -> Tensor:
    """Return an empty tensor like ``rows`` with room for padding behind the last row."""
    return rows.new_empty(len(rows) + ROW_MULTIPLE, rows.shape[1])
