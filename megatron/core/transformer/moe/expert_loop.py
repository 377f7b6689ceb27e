"""All experts of a rank in one autograd function, one after another: the fastest way on a CPU.

What an expert needs at a time stays in the cache, no tensor is so large that the system maps it
anew in each step, and the numbers of rows are rounded up (``padded_size``): a kernel is compiled
for every new number, and 5 rows alone may differ in the last bit from the same rows among others.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.cpu_kernels.weight_gradient import add_weight_gradient
from megatron.core.grad_sink import GradSink, grad_sink_of
from megatron.core.transformer.config.activation import ActivationKind
from megatron.core.transformer.moe.expert_activation import (
    IN_TORCH,
    Activation,
    ActivationGradient,
)
from megatron.core.weight_grad_queue import WeightGradQueue, collecting_queue

ROW_MULTIPLE = 16
_SUMMED_AT_ONCE = 512


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
    kind: ActivationKind,
    adds_bias2: bool = True,
    activation: Activation = IN_TORCH,
) -> Tensor:
    """Return ``prob * expert(row)`` for each row.

    Args:
        rows: [num_rows, h], grouped by expert.
        tokens_per_expert: [num_experts], int64; sums to num_rows. Copied to the host.
        probs: [num_rows], fp32 or fp64.
        weights: Of the experts; each gets a gradient, zeros where it had no rows. One that has
            a ``grad_sink_of`` gets it there, which saves a pass over memory as large as it.
        kind: What is computed between the matrices.
        adds_bias2: False when another rank adds ``bias2``; it gets its gradient all the same.
        activation: What computes it.

    Returns:
        [num_rows, h].
    """
    sizes = tokens_per_expert.tolist()
    out: Tensor = _LoopedExperts.apply(rows, probs, sizes, kind, adds_bias2, activation, *weights)
    return out


class _LoopedExperts(torch.autograd.Function):
    """Keeps rows, and the output of the first matrix; the activation is made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probs: Tensor,
        sizes: list[int],
        kind: ActivationKind,
        adds_bias2: bool,
        activation: Activation,
        *weights: Tensor,
    ) -> Tensor:
        places = _places(sizes, rows.dtype)
        out = _room_for(rows, places)
        inners = []
        actives = _scratch(places, weights[1].shape[2], rows)
        for place, (w1, w2, b1, b2) in zip(places, _each(weights), strict=True):
            x, active = place.padded_rows(rows), actives[: place.padded_size]
            inner = x @ w1.t() if b1 is None else torch.addmm(b1, x, w1.t())
            own = slice(place.size)
            activation.activate(inner[own], probs[place.own], kind=kind, out=active[own])
            active[place.size :].zero_()
            torch.mm(active, w2.t(), out=out[place.padded])
            if b2 is not None and adds_bias2:
                weight = probs[place.own].to(out.dtype).unsqueeze(1)
                out[place.own].add_(weight * b2)
            inners.append(inner)
        ctx.sizes, ctx.kind, ctx.adds_bias2 = sizes, kind, adds_bias2
        ctx.activation = activation
        ctx.sinks = [grad_sink_of(weight) for weight in weights]
        ctx.save_for_backward(rows, probs, *weights, *inners)
        return out.resize_(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, *rest = ctx.saved_tensors
        weights, inners = rest[:4], rest[4:]
        places = _places(ctx.sizes, rows.dtype)
        grad_rows, grad_probs = _room_for(rows, places), torch.empty_like(probs)
        scratch = _BackwardScratch(places, rows, weights[1].shape[2], inners[0].shape[1])
        later = queue_of(*ctx.sinks[:2])
        dw1, dw2 = (
            None if later is not None else _GradientStack(weight, sink)
            for weight, sink in zip(weights[:2], ctx.sinks[:2], strict=True)
        )
        db1, db2 = (
            None if bias is None else _GradientStack(bias, sink)
            for bias, sink in zip(weights[2:], ctx.sinks[2:], strict=True)
        )
        kept: list[_Found] = []
        for expert, (place, (w1, w2, _, b2), inner) in enumerate(
            zip(places, _each(weights), inners, strict=True)
        ):
            own = slice(place.size)
            x, g = scratch.padded(place, rows, 0), scratch.padded(place, grad, 1)
            found, grad_active = scratch.of_activation(place, grad_probs, keep=later is not None)
            torch.mm(g, w2, out=grad_active)
            ctx.activation.differentiate(
                inner[own],
                probs[place.own],
                grad_active[own],
                kind=ctx.kind,
                out=ActivationGradient(found.inner[own], found.probs, found.activated[own]),
            )
            if dw1 is not None and dw2 is not None:
                _put_weights(expert, place, x, g, found, dw1, dw2)
            else:
                kept.append(_Found(found.inner, found.activated))
            torch.mm(found.inner, w1, out=grad_rows[place.padded])
            if db1 is not None and db2 is not None:
                weight = probs[place.own].to(g.dtype)
                if ctx.adds_bias2:
                    grad_probs[place.own].add_(g[own] @ b2)
                db1.put(expert, found.inner[own].sum(dim=0))
                db2.put(expert, torch.mv(g[own].t(), weight))
        if later is not None:
            sinks = ctx.sinks[:2]
            later.put(sinks, _weight_step, places, rows, grad, kept, sinks)
        return (
            grad_rows.resize_(rows.shape),
            grad_probs,
            *(None,) * 4,
            *map(_GradientStack.returned, (dw1, dw2, db1, db2)),
        )


class _Found(NamedTuple):
    """What the weight gradients of one expert need, beside its rows and their gradient."""

    inner: Tensor
    """[padded rows, ffn or 2 * ffn], gradient of the output of the first matrix."""
    activated: Tensor
    """[padded rows, ffn], input of the second matrix."""


def queue_of(*sinks: GradSink | None) -> WeightGradQueue | None:
    """Return where gradients of weights with these sinks are put off to; None if they are not."""
    return None if None in sinks else collecting_queue()


def _weight_step(
    places: "list[_Place]",
    rows: Tensor,
    grad: Tensor,
    kept: list[_Found],
    sinks: Sequence[GradSink],
) -> None:
    """Add the gradients of both matrices of all experts, as backward would have done."""
    filled = _FilledRows(places, rows)
    dw1, dw2 = (_GradientStack(None, sink) for sink in sinks)
    for expert, (place, found) in enumerate(zip(places, kept, strict=True)):
        x, g = filled.padded(place, rows, 0), filled.padded(place, grad, 1)
        _put_weights(expert, place, x, g, found, dw1, dw2)


def _put_weights(
    expert: int,
    place: "_Place",
    x: Tensor,
    g: Tensor,
    found: _Found | ActivationGradient,
    dw1: "_GradientStack",
    dw2: "_GradientStack",
) -> None:
    """Put the gradients of both matrices of one expert; ``x`` and ``g`` [padded rows, h]."""
    summed = slice(place.summed_size)
    dw2.put_product(expert, g[summed].t(), found.activated[summed])
    dw1.put_product(expert, found.inner[summed].t(), x[summed])


class _FilledRows:
    """Room for the rows of one expert and zeros behind them, for one expert after the other."""

    def __init__(self, places: "list[_Place]", rows: Tensor) -> None:
        self._padded = {n: _scratch(places, rows.shape[1], rows) for n in (0, 1)}

    def padded(self, place: "_Place", rows: Tensor, number: int) -> Tensor:
        """Return ``rows`` [padded]; a copy with zeros where filling rows are summed over."""
        if place.summed_size == place.size:
            return place.padded_rows(rows)
        room = self._padded[number][: place.padded_size]
        room[: place.size].copy_(rows[place.own])
        room[place.size :].zero_()
        return room


class _BackwardScratch(_FilledRows):
    """Room for what backward makes of one expert, for one expert after the other."""

    def __init__(self, places: "list[_Place]", rows: Tensor, ffn: int, inner: int) -> None:
        super().__init__(places, rows)
        self._actives = _scratch(places, ffn, rows)
        self._grad_actives = _scratch(places, ffn, rows)
        self._inners = _scratch(places, inner, rows)

    def of_activation(
        self, place: "_Place", grad_probs: Tensor, *, keep: bool
    ) -> tuple[ActivationGradient, Tensor]:
        """Return where the gradients of the activation go, and where that of its output does.

        Both have ``place.padded_size`` rows but the probs; the filling ones are zeros in the first.
        What the first returns is its caller's to ``keep``, or good until the next call.
        """
        padded, size = place.padded_size, place.size
        inner, active = self._inners[:padded], self._actives[:padded]
        if keep:
            inner, active = torch.empty_like(inner), torch.empty_like(active)
        inner[size:].zero_()
        active[size:].zero_()
        found = ActivationGradient(inner, grad_probs[place.own], active)
        return found, self._grad_actives[:padded]


class _GradientStack:
    """The gradient of one stacked parameter, made expert by expert.

    Added to its sink, where there is one; else a fresh tensor, of which each expert is put once.
    """

    def __init__(self, weight: Tensor | None, sink: GradSink | None) -> None:
        self._adds = sink is not None
        if sink is not None:
            self._stack = sink()
        else:
            assert weight is not None, "a gradient without a sink is shaped like its weight"
            self._stack = torch.empty_like(weight)

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
        elif left.shape[1] and not add_weight_gradient(left.t(), right, place):
            # Some rows at a time: what is to be added is still in the cache then.
            some = left.new_empty(min(_SUMMED_AT_ONCE, len(left)), right.shape[1])
            for start in range(0, len(left), _SUMMED_AT_ONCE):
                part = left[start : start + _SUMMED_AT_ONCE]
                product = torch.mm(part, right, out=some[: len(part)])
                place[start : start + _SUMMED_AT_ONCE].add_(product)

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
    """Where the rows of one expert lie, and how many fill them up.

    The filling rows are those of the next experts. No row's result depends on another row, and what
    is written for them is written over by the next experts, so nothing is copied to be padded.
    Sums over rows are another matter: 0 times the infinity of a neighbour is not 0. So they take
    own rows only, or zeros.
    """

    start: int
    size: int
    padded_size: int
    """Rows in products of which each row is one of the result."""
    summed_size: int
    """Rows in products that sum over them."""

    @property
    def own(self) -> slice:
        """Rows of the expert."""
        return slice(self.start, self.start + self.size)

    @property
    def padded(self) -> slice:
        """Rows of the expert and rows that fill up; they may reach behind the last row of all."""
        return slice(self.start, self.start + self.padded_size)

    def padded_rows(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [padded]; zeros behind the last row."""
        block = rows[self.padded]
        missing = self.padded_size - len(block)
        return torch.cat((block, block.new_zeros(missing, rows.shape[1]))) if missing else block


def padded_size(size: int, dtype: torch.dtype) -> int:
    """Return the number of rows with which the products of an expert of ``size`` rows are made.

    bf16 kernels are compiled for every number of rows, which takes as long as their work on 500
    to 1000 rows. So these numbers are few, 16 to each power of two, at 3 % more work on average.
    """
    multiple = ROW_MULTIPLE
    if dtype.itemsize < 4:
        multiple = max(multiple, (1 << size.bit_length()) >> 5)
    return size + -size % multiple


def _places(sizes: Sequence[int], dtype: torch.dtype) -> list[_Place]:
    """Return the place of each expert; one behind the other."""
    padded = [padded_size(size, dtype) for size in sizes]
    summed = padded if dtype.itemsize < 4 else sizes
    return list(map(_Place, accumulate(sizes, initial=0), sizes, padded, summed))


def _room_for(rows: Tensor, places: Sequence[_Place]) -> Tensor:
    """Return an empty tensor like ``rows`` with room for padding behind the last row."""
    return rows.new_empty(max(place.padded.stop for place in places), rows.shape[1])


def _scratch(places: Sequence[_Place], width: int, like: Tensor) -> Tensor:
    """Return an empty tensor with room for the rows of any one expert, padded."""
    return like.new_empty(max(place.padded_size for place in places), width)
