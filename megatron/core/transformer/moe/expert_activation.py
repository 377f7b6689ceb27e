"""The activation inside an expert, weighted by the probability of each row.

Weighting before the second matrix saves a tensor of rows x hidden. Computed in fp32 or wider, and
in backward from the input alone, block by block: each of its dozen passes finds the block in the
cache.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.transformer.activations import (
    POINTWISE,
    limited_gate,
    limited_up,
    stop_gradients,
)
from megatron.core.transformer.config.activation import ActivationKind
from megatron.core.transformer.precision import compute_dtype


def weighted_activation(inner: Tensor, probs: Tensor, *, kind: ActivationKind) -> Tensor:
    """Activate ``inner`` and multiply each row by its prob; keeps only ``inner`` for backward.

    Args:
        inner: [num_rows, ffn], or [num_rows, 2 * ffn] when gated: first gate, then up.
        probs: [num_rows], fp32 or fp64.
        kind: What is computed, before the prob.

    Returns:
        [num_rows, ffn] in the dtype of ``inner``.
    """
    out: Tensor = _WeightedActivation.apply(inner, probs, kind)
    return out


class ActivationGradient(NamedTuple):
    """What backward needs of a weighted activation."""

    inner: Tensor
    """Gradient of ``inner``, in its shape and dtype."""
    probs: Tensor
    """[num_rows], gradient of ``probs``."""
    activated: Tensor
    """[num_rows, ffn], what the forward returned."""


def activate(
    inner: Tensor, probs: Tensor, *, kind: ActivationKind, out: Tensor | None = None
) -> Tensor:
    """Compute ``weighted_activation`` without autograd, into ``out`` if given."""
    if out is None:
        out = inner.new_empty(len(inner), inner.shape[1] // (2 if kind.gated else 1))
    scratch, function = _Scratch(out), POINTWISE[kind.function]
    for rows in scratch.blocks(len(out)):
        active = scratch.wide_like(out[rows], 0)
        if kind.gated:
            gate, up = inner[rows].chunk(2, dim=1)
            gate, up = scratch.widened(gate, 0), scratch.widened(up, 1)
            gate, up = _limited(kind, gate, up, scratch)
            function.value(gate, active)
            active.mul_(up)
        else:
            function.value(scratch.widened(inner[rows], 0), active)
        active.mul_(probs[rows].unsqueeze(1))
        scratch.put(active, out[rows])
    return out


def differentiate(
    inner: Tensor,
    probs: Tensor,
    grad: Tensor,
    *,
    kind: ActivationKind,
    out: ActivationGradient | None = None,
) -> ActivationGradient:
    """Compute the gradients of ``weighted_activation``, and its output once more.

    Args:
        inner: Its argument, as ``probs`` and ``kind``.
        probs: See ``inner``.
        grad: [num_rows, ffn], gradient of its output.
        kind: See ``inner``.
        out: Where to, all of them; new tensors when None.
    """
    if out is None:
        out = ActivationGradient(
            torch.empty_like(inner), torch.empty_like(probs), torch.empty_like(grad)
        )
    scratch = _Scratch(out.activated)
    differentiate_block = _differentiate_gated if kind.gated else _differentiate_plain
    for rows in scratch.blocks(len(inner)):
        block = ActivationGradient(out.inner[rows], out.probs[rows], out.activated[rows])
        differentiate_block(kind, inner[rows], probs[rows], grad[rows], block, scratch)
    return out


class Activation(NamedTuple):
    """A way to compute the weighted activation; both functions are called with ``out``."""

    activate: Callable[..., Tensor]
    differentiate: Callable[..., ActivationGradient]


IN_TORCH = Activation(activate, differentiate)


def _limited(
    kind: ActivationKind, gate: Tensor, up: Tensor, scratch: "_Scratch"
) -> tuple[Tensor, Tensor]:
    """Return gate and up as they are used; in rooms of their own where they are changed."""
    if not kind.is_limited:
        return gate, up
    new_gate, new_up = scratch.like(gate, 6), scratch.like(up, 7)
    return limited_gate(kind, gate, new_gate), limited_up(kind, up, new_up)


def _differentiate_gated(
    kind: ActivationKind,
    inner: Tensor,
    probs: Tensor,
    grad: Tensor,
    out: ActivationGradient,
    scratch: "_Scratch",
) -> None:
    weight, function = probs.unsqueeze(1), POINTWISE[kind.function]
    gate, up = (scratch.widened(x, n) for n, x in enumerate(inner.chunk(2, dim=1)))
    used_gate, used_up = _limited(kind, gate, up, scratch)
    grad = scratch.widened(grad, 2)
    value = function.value(used_gate, scratch.like(gate, 3))
    active = torch.mul(value, used_up, out=scratch.wide_like(out.activated, 4))
    torch.linalg.vecdot(active, grad, out=out.probs)
    scratch.put(active.mul_(weight), out.activated)
    weighted = torch.mul(grad, weight, out=scratch.like(gate, 5))
    out_gate, out_up = out.inner.chunk(2, dim=1)
    grad_up = torch.mul(weighted, value, out=scratch.wide_like(out_up, 3))
    grad_gate = scratch.wide_like(out_gate, 5)
    function.gradient(weighted.mul_(used_up), used_gate, grad_gate)
    stop_gradients(kind, gate, up, grad_gate, grad_up)
    scratch.put(grad_up, out_up)
    scratch.put(grad_gate, out_gate)


def _differentiate_plain(
    kind: ActivationKind,
    inner: Tensor,
    probs: Tensor,
    grad: Tensor,
    out: ActivationGradient,
    scratch: "_Scratch",
) -> None:
    weight, function = probs.unsqueeze(1), POINTWISE[kind.function]
    wide, grad = scratch.widened(inner, 0), scratch.widened(grad, 1)
    active = function.value(wide, scratch.wide_like(out.activated, 2))
    torch.linalg.vecdot(active, grad, out=out.probs)
    scratch.put(active.mul_(weight), out.activated)
    weighted = torch.mul(grad, weight, out=scratch.like(wide, 3))
    grad_inner = function.gradient(weighted, wide, scratch.wide_like(out.inner, 3))
    scratch.put(grad_inner, out.inner)


class _Scratch:
    """Room for what is between input and output of a block of rows, in fp32 or wider.

    On a CPU a block is so small that all of it stays in the second-level cache; elsewhere there is
    one block. Views are numbered; one that was asked for twice is the same memory.
    """

    _BLOCK_NUMEL = 2**17

    def __init__(self, like: Tensor) -> None:
        num_rows, width = like.shape
        on_cpu = like.device.type == "cpu"
        self._num_rows = max(1, self._BLOCK_NUMEL // width) if on_cpu else max(1, num_rows)
        self._shape = (min(self._num_rows, num_rows), width)
        self._dtype, self._device = compute_dtype(like.dtype), like.device
        self._rooms: dict[int, Tensor] = {}

    def blocks(self, num_rows: int) -> Iterator[slice]:
        """Yield the rows of each block."""
        for start in range(0, num_rows, self._num_rows):
            yield slice(start, min(start + self._num_rows, num_rows))

    def like(self, block: Tensor, number: int) -> Tensor:
        """Return room ``number`` for as many rows as ``block`` has."""
        if number not in self._rooms:
            self._rooms[number] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._rooms[number][: len(block)]

    def wide_like(self, target: Tensor, number: int) -> Tensor:
        """Return ``target`` itself where it is wide, else room ``number``."""
        return target if target.dtype == self._dtype else self.like(target, number)

    def widened(self, source: Tensor, number: int) -> Tensor:
        """Return ``source`` itself where it is wide, else a wide copy in room ``number``."""
        return source if source.dtype == self._dtype else self.like(source, number).copy_(source)

    @staticmethod
    def put(wide: Tensor, target: Tensor) -> None:
        """Round ``wide`` into ``target``, unless it was computed there."""
        if wide.dtype != target.dtype:
            target.copy_(wide)


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, probs: Tensor, kind: ActivationKind) -> Tensor:
        ctx.save_for_backward(inner, probs)
        ctx.kind = kind
        return activate(inner, probs, kind=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        inner, probs = ctx.saved_tensors
        found = differentiate(inner, probs, grad, kind=ctx.kind)
        return found.inner, found.probs, None
