"""From the output of linear_qkv to rotated queries and keys, and values, in one pass each way."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class RotaryTables(NamedTuple):
    """Rotation of each position and channel pair."""

    cos: Tensor
    """[s, rotary_dim / 2]."""
    sin: Tensor
    """[s, rotary_dim / 2]."""


def split_and_rotate(mixed: Tensor, tables: RotaryTables | None) -> tuple[Tensor, Tensor, Tensor]:
    """Take queries, keys and values out of ``mixed`` and rotate the first two.

    Channel i is paired with channel i + rotary_dim / 2; channels from rotary_dim on stay.

    Args:
        mixed: [s, b, groups, heads / groups + 2, d]: a group's queries, its key, its value.
        tables: For these s positions; None rotates nothing.

    Returns:
        Contiguous queries [b, heads, s, d], keys and values [b, groups, s, d].
    """
    cos, sin = (None, None) if tables is None else tables
    out: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(mixed, cos, sin)
    return out


class _SplitAndRotate(torch.autograd.Function):
    """Writes each result where it belongs: no concatenation, no transpose of its own."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mixed: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)  # type: ignore[arg-type]
        s, b, groups, slots, d = ctx.shape = mixed.shape  # type: ignore[attr-defined]
        query = mixed.new_empty(b, groups, slots - 2, s, d)
        key, value = mixed.new_empty(b, groups, s, d), mixed.new_empty(b, groups, s, d)
        by_position = mixed.permute(1, 2, 3, 0, 4)  # [b, groups, slots, s, d]
        _rotate(by_position[:, :, :-2], cos, sin, query)
        _rotate(by_position[:, :, -2], cos, sin, key)
        value.copy_(by_position[:, :, -1])
        return query.view(b, -1, s, d), key, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        s, b, groups, slots, d = ctx.shape  # type: ignore[attr-defined]
        d_mixed = d_key.new_empty(s, b, groups, slots, d)
        by_position = d_mixed.permute(1, 2, 3, 0, 4)
        back = None if sin is None else -sin
        d_query = d_query.unflatten(1, (groups, slots - 2))
        _rotate(d_query, cos, back, by_position[:, :, :-2])
        _rotate(d_key, cos, back, by_position[:, :, -2])
        by_position[:, :, -1] = d_value
        return d_mixed, None, None


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor) -> None:
    """Write ``x`` [..., s, d], rotated, to ``out`` (no overlap with ``x``)."""
    if cos is None or sin is None:
        out.copy_(x)
        return
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = rest
