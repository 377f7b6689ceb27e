"""Rotation of queries and keys by position, and their way from linear_qkv to the core.

Where nothing stands between the projection and the rotation, all of it is one pass each way.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class RotaryTables(NamedTuple):
    """Rotation of each position and channel: x * cos + swapped(x) * sin.

    ``swapped`` exchanges the two channels of each pair.
    """

    cos: Tensor
    """[s, d]; 1 in channels that are not rotated."""
    sin: Tensor
    """[s, d]; with a minus sign in the first channel of a pair, 0 in channels that are not
    rotated."""
    half: int
    """Pairs of channels."""
    interleaved: bool = False
    """A pair is channels 2 i and 2 i + 1; else i and i + half."""


def split_and_rotate(mixed: Tensor, tables: RotaryTables | None) -> tuple[Tensor, Tensor, Tensor]:
    """Take queries, keys and values out of ``mixed`` and rotate the first two.

    Args:
        mixed: [s, b, groups, heads / groups + 2, d]: a group's queries, its key, its value.
        tables: For these s positions; None rotates nothing.

    Returns:
        Contiguous queries [b, heads, s, d], keys and values [b, groups, s, d].
    """
    out: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(mixed, tables)
    return out


def rotate(x: Tensor, tables: RotaryTables | None) -> Tensor:
    """Rotate ``x`` [s, b, ..., d] and put its heads, the dimensions between, before positions.

    Args:
        x: Of these s positions.
        tables: None rotates nothing.

    Returns:
        Contiguous [b, heads, s, d].
    """
    out: Tensor = _Rotate.apply(x, tables)
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
        tables = _reversed(tables)
        d_mixed = d_key.new_empty(s, b, groups, slots, d)
        by_position = d_mixed.permute(1, 2, 3, 0, 4)
        d_query = d_query.unflatten(1, (groups, slots - 2))
        by_position[:, :, :-2] = d_query if tables is None else _rotated(d_query, tables)
        by_position[:, :, -2] = d_key if tables is None else _rotated(d_key, tables)
        by_position[:, :, -1] = d_value
        return d_mixed, None


class _Rotate(torch.autograd.Function):
    """One tensor of heads; its gradient is turned back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tables: RotaryTables | None) -> Tensor:
        ctx.tables, ctx.heads = tables, x.shape[2:-1]  # type: ignore[attr-defined]
        return _rotated(x.movedim(0, -2), tables).flatten(1, -3)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        tables, heads = ctx.tables, ctx.heads  # type: ignore[attr-defined]
        turned = grad if tables is None else _rotated(grad, _reversed(tables))
        return turned.unflatten(1, heads).movedim(-2, 0), None


def _reversed(tables: RotaryTables | None) -> RotaryTables | None:
    """Return the tables of the transposed map."""
    return None if tables is None else tables._replace(sin=-tables.sin)


def _rotated(x: Tensor, tables: RotaryTables | None) -> Tensor:
    """Return a contiguous copy of ``x`` [..., s, d], rotated."""
    out = x.clone(memory_format=torch.contiguous_format)
    if tables is None:
        return out
    end = 2 * tables.half
    first, second = slice(0, tables.half), slice(tables.half, end)
    if tables.interleaved:
        first, second = slice(0, end, 2), slice(1, end, 2)
    swapped = torch.empty_like(out)
    swapped[..., first] = x[..., second]
    swapped[..., second] = x[..., first]
    swapped[..., end:] = 0.0
    return out.mul_(tables.cos).addcmul_(swapped, tables.sin)
