"""Causal attention by a compiled kernel: of queries, keys and values, or of their projection.

From the projection it is one pass: rotation on the way in, and gradients straight into the
gradient of the projection. For backward it keeps its inputs, its output and one number a query.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.cpu_kernels.attention import (
    AttentionKernel,
    Found,
    Heads,
    attention_kernel,
)
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.rotary import RotaryTables


def can_be_compiled(weighting: Weighting) -> bool:
    """Whether a kernel computes these weights, sizes and dtype apart: no cap, sink or dropout."""
    plain = weighting._replace(scale=None, window=None)
    return plain == Weighting() and (weighting.scale is None or weighting.scale > 0.0)


def compiled_attention(
    query: Tensor, key: Tensor, value: Tensor, weighting: Weighting
) -> Tensor | None:
    """Attend: weights(q k) v over each position's past, or the window of it.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, s, d]; the heads of a group follow each other.
        value: [b, groups, s, e].
        weighting: One that ``can_be_compiled``.

    Returns:
        [b, heads, s, e], which lies as [s, b, heads, e]; None where there is no kernel.
    """
    kernel = attention_kernel(query, value)
    if kernel is None or query.shape[2] == 0:
        return None
    task = _Task(kernel, None, weighting.scale_of(query), weighting.window)
    out: Tensor = _Attention.apply(query, key, value, task)
    return out


def compiled_attention_of_projection(
    mixed: Tensor, tables: RotaryTables | None, weighting: Weighting
) -> Tensor | None:
    """Take queries, keys and values out of ``mixed``, rotate the first two, and attend.

    Args:
        mixed: [s, b, groups, heads / groups + 2, d]: a group's queries, its key, its value.
        tables: For these s positions; None rotates nothing.
        weighting: One that ``can_be_compiled``.

    Returns:
        [s, b, heads * d]; None where there is no kernel.
    """
    kernel = attention_kernel(mixed, mixed)
    if kernel is None or mixed.shape[0] == 0:
        return None
    task = _Task(kernel, tables, weighting.scale_of(mixed), weighting.window)
    out: Tensor = _AttentionOfProjection.apply(mixed, task)
    return out


class _Task(NamedTuple):
    """What is to be done, but for the tensors that have a gradient."""

    kernel: AttentionKernel
    tables: RotaryTables | None
    scale: float
    window: int | None

    def forward(self, heads: Heads) -> Found:
        """Return the output, [b, groups, heads, s, e] that lies as [s, b, groups, heads, e]."""
        b, groups, count, s, _ = heads.query.shape
        value = heads.value
        out = value.new_empty(s, b, groups, count, value.shape[-1]).permute(1, 2, 3, 0, 4)
        lse = value.new_empty(b, groups, count, s, dtype=torch.float32)
        found = Found(out, lse)
        self.kernel.forward(heads, found, self.tables, scale=self.scale, window=self.window)
        return found

    def backward(self, heads: Heads, found: Found, d_out: Tensor, grads: Heads) -> None:
        """Write ``grads``."""
        self.kernel.backward(
            heads, found, _readable(d_out), grads, self.tables, scale=self.scale, window=self.window
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, task: _Task) -> Tensor:
        query, key, value = (_readable(x) for x in (query, key, value))
        found = task.forward(_by_group(query, key, value))
        ctx.task = task  # type: ignore[attr-defined]
        ctx.save_for_backward(query, key, value, *found)
        return found.out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        task: _Task = ctx.task  # type: ignore[attr-defined]
        grads = [torch.empty_like(x) for x in (query, key, value)]
        d_out = d_out.unflatten(1, (key.shape[1], -1))
        task.backward(_by_group(query, key, value), Found(out, lse), d_out, _by_group(*grads))
        return (*grads, None)


class _AttentionOfProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, mixed: Tensor, task: _Task) -> Tensor:
        mixed = _readable(mixed)
        found = task.forward(_of_projection(mixed))
        ctx.task = task  # type: ignore[attr-defined]
        ctx.save_for_backward(mixed, *found)
        return found.out.permute(3, 0, 1, 2, 4).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor, None]:
        mixed, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        task: _Task = ctx.task  # type: ignore[attr-defined]
        d_mixed = torch.empty_like(mixed, memory_format=torch.contiguous_format)
        d_out = d_out.unflatten(2, out.shape[1:3] + out.shape[4:]).permute(1, 2, 3, 0, 4)
        task.backward(_of_projection(mixed), Found(out, lse), d_out, _of_projection(d_mixed))
        return d_mixed, None


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> Heads:
    groups = key.shape[1]
    return Heads(query.unflatten(1, (groups, -1)), key.unsqueeze(2), value.unsqueeze(2))


def _of_projection(mixed: Tensor) -> Heads:
    by_position = mixed.permute(1, 2, 3, 0, 4)  # [b, groups, slots, s, d]
    return Heads(by_position[:, :, :-2], by_position[:, :, -2:-1], by_position[:, :, -1:])


def _readable(x: Tensor) -> Tensor:
    """Return ``x`` with channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
