"""Layers of one kind are run once, aside; each pass of a step repeats what they said and kept.

A step of a large model passes the same kind of layer hundreds of times, and each pass says the same
to the same groups. A pass is then one node of the graph: it notes the events of the forward or
backward that was run, and holds as many bytes as that kept.
Easy to break: gradients that are reduced while backward runs lie between the events of a layer, so
the last microbatch is always run for real.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.models.common.output_layer import OutputLayer
from megatron.core.transformer import multi_token_prediction, transformer_block
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.weight_grad_queue import WeightGradQueue, collecting_queue
from megatron.training.dry_run.events import Event, Post, Wait
from megatron.training.dry_run.known_values import LiveStorages
from megatron.training.dry_run.recorded_collectives import EventLog


@dataclass
class _Phase:
    """What was said and held in one direction of a pass."""

    events: list[Event] = field(default_factory=list)
    first_post: int = 0
    """Number of posts before; waits count from there."""
    peak: int = 0
    """Bytes at most above what was alive before."""


@dataclass
class _Pass:
    """One kind of layer: a forward, and once it came, a backward."""

    forward: _Phase = field(default_factory=_Phase)
    backward: _Phase | None = None
    """Whole, or of the gradients of inputs alone."""
    weights: _Phase | None = None
    """Of the gradients of weights, where they are a step of their own."""
    put_off: int = 0
    """Bytes that live from the one to the other."""
    kept: int = 0
    """Bytes that live from forward to backward, the output left out."""
    shape: tuple[int, ...] = ()
    """Of the output."""
    dtype: torch.dtype = torch.float32


class Replay:
    """Memory of what kinds of layers did. May be shared by ranks at the same places of groups."""

    def __init__(self, *, by_kind: bool) -> None:
        """Begin with nothing.

        Args:
            by_kind: Layers alike in their parameters count as one; else each layer is itself.
        """
        self._by_kind = by_kind
        self._known: dict[Hashable, _Pass] = {}
        self._kinds: dict[int, Hashable] = {}
        self._is_inside = self._was_real = False

    @contextmanager
    def active(
        self,
        log: EventLog,
        live: LiveStorages,
        is_real: Callable[[ForwardContext], bool],
        aside: Callable[[], AbstractContextManager[None]],
        splits: bool,
    ) -> Iterator[None]:
        """Replay inside the block.

        Args:
            log: Of the rank.
            live: Of the rank.
            is_real: Says of a forward that it must be run for real.
            aside: Entered while a layer is run aside.
            splits: Whether gradients of weights are a step of their own.
        """
        self._log, self._live, self._is_real = log, live, is_real
        self._apart, self._splits = aside, splits
        self._kinds = {}
        whole = TransformerLayer.forward

        def layer_forward(layer: TransformerLayer, x: Tensor, *rest: Any) -> Tensor:
            context = rest[-1]
            key = ("layer", self._kind(layer), *self._shape(x))
            return self._do(key, context, lambda y: whole(layer, y, *rest), x)

        def span_forward(function: Any, when: bool, span: range, x: Tensor, *rest: Any) -> Tensor:
            if not when:
                return function(span, x, *rest)
            block, context = function.__self__, rest[-1]
            kinds = tuple(self._kind(block.layers[str(number)]) for number in span)
            key = ("span", kinds, *self._shape(x))
            return self._do(key, context, lambda y: recomputed(function, when, span, y, *rest), x)

        def depth_forward(layer: Any, when: bool, x: Tensor, *rest: Any) -> Tensor:
            if not when:
                return layer(x, *rest)
            key = ("depth", self._kind(layer), *self._shape(x))
            return self._do(key, rest[-1], lambda y: recomputed(layer, when, y, *rest), x)

        loss = OutputLayer.loss

        def head_loss(head: OutputLayer, x: Tensor, *rest: Any) -> Tensor:
            return self._do(("head", *self._shape(x)), None, lambda y: loss(head, y, *rest), x)

        with (
            mock.patch.object(OutputLayer, "loss", head_loss),
            mock.patch.object(TransformerLayer, "forward", layer_forward),
            mock.patch.object(transformer_block, "recomputed", span_forward),
            mock.patch.object(multi_token_prediction, "recomputed", depth_forward),
        ):
            yield

    def _kind(self, layer: TransformerLayer) -> Hashable:
        found = self._kinds.get(id(layer))
        if found is None:
            shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters())
            found = (shapes, None if self._by_kind else layer.layer_number)
            self._kinds[id(layer)] = found
        return found

    @staticmethod
    def _shape(x: Tensor) -> tuple[Hashable, ...]:
        return tuple(x.shape), x.dtype, x.requires_grad, torch.is_grad_enabled()

    def _do(
        self,
        key: Hashable,
        context: ForwardContext | None,
        forward: Callable[[Tensor], Tensor],
        x: Tensor,
    ) -> Tensor:
        """Repeat what ``forward`` does on ``x``; run it aside where that is not known yet.

        Without a ``context``, for the head, where the layer before it was.
        """
        if self._is_inside:
            return forward(x)
        if context is not None:
            self._was_real = self._is_real(context)
        if self._was_real:
            return forward(x)
        known = self._known.get(key)
        if known is None:
            self._is_inside = True
            try:
                with self._apart():
                    known = self._known[key] = self._aside(forward, x)
            finally:
                self._is_inside = False
        out: Tensor = _Repeat.apply(x, self, known)
        return out

    def _aside(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> _Pass:
        """Run forward and backward on a copy, and take back what that left in log and memory."""
        log, live = self._log, self._live
        posts, start, peak = log.num_posts, len(log.events), live.peak
        copy = x.detach().requires_grad_(x.requires_grad)
        before = live.peak = live.now
        out = forward(copy)
        known = _Pass(_Phase(log.events[start:], posts, live.peak - before))
        known.kept = live.now - before - out.untyped_storage().nbytes()
        known.shape, known.dtype = tuple(out.shape), out.dtype
        if out.requires_grad:
            first, middle = log.num_posts, len(log.events)
            grad = torch.empty_like(out)
            held = live.peak = live.now
            queue = WeightGradQueue() if self._splits else None
            with nullcontext() if queue is None else queue.collecting():
                out.backward(grad)
            known.backward = _Phase(log.events[middle:], first, live.peak - held)
            if queue is not None:
                del out, grad
                copy.grad = None
                self._weights_aside(known, queue, before)
        del log.events[start:]
        log.num_posts, live.peak = posts, peak
        return known

    def _weights_aside(self, known: _Pass, queue: WeightGradQueue, before: int) -> None:
        log, live = self._log, self._live
        held = live.peak = live.now
        known.put_off = held - before
        posts, start = log.num_posts, len(log.events)
        queue.run()
        known.weights = _Phase(log.events[start:], posts, live.peak - held)

    def repeat(self, phase: _Phase) -> None:
        """Note what was said in ``phase`` once more, and that its memory was held for a moment."""
        shift = self._log.num_posts - phase.first_post
        for event in phase.events:
            if isinstance(event, Post):
                self._log.post(event)
            else:
                self._log.events.append(Wait(event.post + shift, event.site))
        self._live.peak = max(self._live.peak, self._live.now + phase.peak)


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, replay: Replay, known: _Pass) -> Tensor:
        replay.repeat(known.forward)
        ctx.replay, ctx.known = replay, known
        if x.requires_grad and known.kept > 0:
            ctx.kept = x.new_empty(known.kept, dtype=torch.uint8)
        ctx.like = (tuple(x.shape), x.dtype)
        return x.new_empty(known.shape, dtype=known.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        assert ctx.known.backward is not None, "what has a gradient was run backward, too"
        ctx.replay.repeat(ctx.known.backward)
        ctx.kept = None
        queue = collecting_queue()
        if ctx.known.weights is not None and queue is None:
            ctx.replay.repeat(ctx.known.weights)
        elif ctx.known.weights is not None and queue is not None:
            held = grad.new_empty(max(ctx.known.put_off, 0), dtype=torch.uint8)
            queue.put((), partial(_repeat_weights, ctx.replay, ctx.known.weights), held)
        shape, dtype = ctx.like
        return grad.new_empty(shape, dtype=dtype), None, None


def _repeat_weights(replay: Replay, phase: _Phase, held: Tensor) -> None:
    del held
    replay.repeat(phase)
