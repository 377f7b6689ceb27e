"""All experts of a rank in one autograd function, one after another: the fastest way on a CPU.

What an expert needs at a time stays in the cache, no tensor is so large that the system maps it
anew in each step, and rows come in multiples of 16: a kernel is compiled for every new number of
rows, and 5 rows alone may differ in the last bit from the same rows among others.
"""

from collections.abc import Iterator, Sequence
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
    rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, weights: ExpertWeights, *, gated: bool
) -> Tensor:
    """Return ``prob * expert(row)`` for each row.

    Args:
        rows: [num_rows, h], grouped by expert.
        tokens_per_expert: [num_experts], int64; sums to num_rows. Copied to the host.
        probs: [num_rows], fp32 or fp64.
        weights: Of the experts; each gets a gradient, zeros where it had no rows. One that has
            a ``grad_sink_of`` gets it there, which saves a pass over memory as large as it.
        gated: SwiGLU instead of GELU.

    Returns:
        [num_rows, h].
    """
    out: Tensor = _LoopedExperts.apply(rows, probs, tokens_per_expert.tolist(), gated, *weights)
    return out


class _LoopedExperts(torch.autograd.Function):
    """Keeps rows, and the output of the first matrix; the activation is made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, probs: Tensor, sizes: list[int], gated: bool, *weights: Tensor
    ) -> Tensor:
        out = torch.empty_like(rows)
        inners = []
        for (x, p, y), (w1, w2, b1, b2) in zip(
            _groups(sizes, rows, probs, out), _each(weights), strict=True
        ):
            padded = _pad(x)
            inner = padded @ w1.t() if b1 is None else torch.addmm(b1, padded, w1.t())
            active = activate(inner, _pad(p), gated=gated)  # padding has prob 0
            y.copy_((active @ w2.t())[: len(y)])
            if b2 is not None:
                y.add_(p.to(y.dtype).unsqueeze(1) * b2)
            inners.append(inner)
        ctx.sizes, ctx.gated = sizes, gated
        ctx.sinks = [grad_sink_of(weight) for weight in weights]
        ctx.save_for_backward(rows, probs, *weights, *inners)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, *rest = ctx.saved_tensors
        weights, inners = rest[:4], rest[4:]
        grad_rows, grad_probs = torch.empty_like(rows), torch.empty_like(probs)
        grads = [
            None if weight is None else _GradientStack(weight, sink)
            for weight, sink in zip(weights, ctx.sinks, strict=True)
        ]
        dw1, dw2, db1, db2 = grads
        assert dw1 is not None, "experts have a first matrix"
        assert dw2 is not None, "experts have a second matrix"
        for expert, ((x, p, g, dx, dp), (w1, w2, _, b2), inner) in enumerate(
            zip(
                _groups(ctx.sizes, rows, probs, grad, grad_rows, grad_probs),
                _each(weights),
                inners,
                strict=True,
            )
        ):
            out_grad = _pad(g)
            found = differentiate(inner, _pad(p), out_grad @ w2, gated=ctx.gated)
            dw2.put_product(expert, out_grad.t(), found.activated)
            dw1.put_product(expert, found.inner.t(), _pad(x))
            dx.copy_((found.inner @ w1)[: len(x)])
            dp.copy_(found.probs[: len(p)])
            if db1 is not None and db2 is not None:
                dp.add_((g @ b2).to(dp.dtype))
                db1.put(expert, found.inner.sum(dim=0))
                db2.put(expert, torch.mv(g.t(), p.to(g.dtype)))
        return grad_rows, grad_probs, None, None, *map(_GradientStack.returned, grads)


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


def _groups(sizes: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of each expert, of all ``tensors``; views."""
    return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


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


def _pad(group: Tensor) -> Tensor:
    """Return ``group`` [rows, ...] with zero rows up to a multiple of ``ROW_MULTIPLE``."""
    num_rows = len(group)
    missing = -num_rows % ROW_MULTIPLE
    if not missing:
        return group
    padded = group.new_empty(num_rows + missing, *group.shape[1:])
    padded[:num_rows] = group
    padded[num_rows:] = 0
    return padded
