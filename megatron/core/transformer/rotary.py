"""From the output of linear_qkv to rotated queries and keys, and values, in one pass each way."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class RotaryTables(NamedTuple):
    """Rotation of each position and channel: x * cos + swapped(x) * sin.

    ``swapped`` exchanges channels [0, half) with [half, 2 * half).
    """

    cos: Tensor
    """[s, d]; 1 in channels that are not rotated."""
    sin: Tensor
    """[s, d]; with a minus sign in the first half, 0 in channels that are not rotated."""
    half: int
    """Pairs of channels."""


def split_and_rotate(mixed: Tensor, tables: RotaryTables | None) -> tuple[Tensor, Tensor, Tensor]:
    """Take queries, keys and values out of ``mixed`` and rotate the first two.

    Channel i is paired with channel i + rotary_dim / 2; channels from rotary_dim on stay.

    Args:
        mixed: [s, b, groups, heads / groups + 2, d]: a group's queries, its key, its value.
        tables: For these s positions; None rotates nothing.

    Returns:
        Contiguous queries [b, heads, s, d], keys and values [b, groups, s, d].
    """
    out: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(mixed, tables)
    return out


class _SplitAndRotate(torch.autograd.Function):
    """Writes each result where it belongs, and rotates in whole contiguous tensors."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mixed: Tensor, tables: RotaryTables | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, _, _, d = mixed.shape
        ctx.tables, ctx.shape = tables, mixed.shape  # type: ignore[attr-defined]
        by_position = mixed.permute(1, 2, 3, 0, 4)  # [b, groups, slots, s, d]
        query = _rotated(by_position[:, :, :-2], tables)
        key = _rotated(by_position[:, :, -2], tables)
        return query.view(b, -1, s, d), key, by_position[:, :, -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, None]:
        tables, (s, b, groups, slots, d) = ctx.tables, ctx.shape  # type: ignore[attr-defined]
        if tables is not None:
            tables = tables._replace(sin=-tables.sin)
        d_mixed = d_key.new_empty(s, b, groups, slots, d)
        by_position = d_mixed.permute(1, 2, 3, 0, 4)
        d_query = d_query.unflatten(1, (groups, slots - 2))
        by_position[:, :, :-2] = d_query if tables is None else _rotated(d_query, tables)
        by_position[:, :, -2] = d_key if tables is None else _rotated(d_key, tables)
        by_position[:, :, -1] = d_value
        return d_mixed, None


def _rotated(x: Tensor, tables: RotaryTables | None) -> Tensor:
    """Return a contiguous copy of ``x`` [..., s, d], rotated."""
    out = x.clone(memory_format=torch.contiguous_format)
    if tables is None:
        return out
    cos, sin, half = tables
    swapped = torch.empty_like(out)
    swapped[..., :half] = x[..., half : 2 * half]
    swapped[..., half : 2 * half] = x[..., :half]
    swapped[..., 2 * half :] = 0.0
    return out.mul_(cos).addcmul_(swapped, sin)
