"""Rotation of queries and keys by position, and their way from linear_qkv to the core.

Where nothing stands between the projection and the rotation, all of it is one pass each way.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.cpu_kernels.heads import RotaryTables
from megatron.core.cpu_kernels.rotary import rotary_kernel

__all__ = ["RotaryTables", "rotate", "split_and_rotate"]


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
    """Writes each result where it belongs."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mixed: Tensor, tables: RotaryTables | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, groups, slots, d = mixed.shape
        ctx.tables, ctx.shape = tables, mixed.shape  # type: ignore[attr-defined]
        by_position = mixed.permute(1, 2, 3, 0, 4)  # [b, groups, slots, s, d]
        query = mixed.new_empty(b, groups, slots - 2, s, d)
        key, value = (mixed.new_empty(b, groups, 1, s, d) for _ in range(2))
        _rotate_into(query, by_position[:, :, :-2], tables)
        _rotate_into(key, by_position[:, :, -2:-1], tables)
        value.copy_(by_position[:, :, -1:])
        return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, None]:
        tables, (s, b, groups, slots, d) = ctx.tables, ctx.shape  # type: ignore[attr-defined]
        d_mixed = d_key.new_empty(s, b, groups, slots, d)
        by_position = d_mixed.permute(1, 2, 3, 0, 4)
        d_query = d_query.unflatten(1, (groups, slots - 2))
        _rotate_into(by_position[:, :, :-2], d_query, tables, back=True)
        _rotate_into(by_position[:, :, -2:-1], d_key.unsqueeze(2), tables, back=True)
        by_position[:, :, -1] = d_value
        return d_mixed, None


class _Rotate(torch.autograd.Function):
    """One tensor of heads; its gradient is turned back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tables: RotaryTables | None) -> Tensor:
        by_position = x.movedim(0, -2)  # [b, ..., s, d]
        ctx.tables, ctx.heads = tables, by_position.shape[1:-2]  # type: ignore[attr-defined]
        if by_position.dim() == 4:
            by_position = by_position.unsqueeze(2)
        out = x.new_empty(by_position.shape)
        _rotate_into(out, by_position, tables)
        return out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        tables, heads = ctx.tables, ctx.heads  # type: ignore[attr-defined]
        turned = grad
        if tables is not None:
            turned = torch.empty_like(grad, memory_format=torch.contiguous_format)
            _rotate_into(turned.unsqueeze(2), grad.unsqueeze(2), tables, back=True)
        return turned.unflatten(1, heads).movedim(-2, 0), None


def _rotate_into(
    out: Tensor, x: Tensor, tables: RotaryTables | None, *, back: bool = False
) -> None:
    """Write ``x`` [b, groups, heads, s, d], rotated or turned back, over ``out``."""
    kernel = rotary_kernel(x)
    if kernel is not None:
        kernel(x if x.stride(-1) == 1 else x.contiguous(), out, tables, back=back)
    elif tables is None:
        out.copy_(x)
    else:
        _rotate_by_torch(out, x, tables._replace(sin=-tables.sin) if back else tables)


def _rotate_by_torch(out: Tensor, x: Tensor, tables: RotaryTables) -> None:
    """Do as ``_rotate_into``, in whole contiguous tensors."""
    turned = out if out.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned.copy_(x)
    end = 2 * tables.half
    first, second = slice(0, tables.half), slice(tables.half, end)
    if tables.interleaved:
        first, second = slice(0, end, 2), slice(1, end, 2)
    swapped = torch.empty_like(turned)
    swapped[..., first] = x[..., second]
    swapped[..., second] = x[..., first]
    swapped[..., end:] = 0.0
    turned.mul_(tables.cos).addcmul_(swapped, tables.sin)
    if turned is not out:
        out.copy_(turned)
