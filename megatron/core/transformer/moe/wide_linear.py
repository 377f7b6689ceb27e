"""The product of a gate, in a wider dtype than its operands."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide_linear(input_: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``input_ @ weight.T`` computed in ``dtype``; keeps only the operands for backward.

    Args:
        input_: [num_rows, in].
        weight: [out, in].
        dtype: At least as wide as both.

    Returns:
        [num_rows, out] in ``dtype``.
    """
    out: Tensor = _WideLinear.apply(input_, weight, dtype)
    return out


class _WideLinear(torch.autograd.Function):
    """On a CPU some rows at a time are widened, so that the wide copy never leaves the cache."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.dtype = dtype
        wide_weight = weight.to(dtype).t()
        out = input_.new_empty(len(input_), len(weight), dtype=dtype)
        for rows in _widened_at_once(input_, dtype):
            torch.mm(input_[rows].to(dtype), wide_weight, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        input_, weight = ctx.saved_tensors
        wide_weight = weight.to(ctx.dtype)
        grad_input = torch.empty_like(input_)
        grad_weight = torch.zeros_like(wide_weight)
        for rows in _widened_at_once(input_, ctx.dtype):
            grad_input[rows] = grad[rows] @ wide_weight
            grad_weight.addmm_(grad[rows].t(), input_[rows].to(ctx.dtype))
        return grad_input, grad_weight.to(weight.dtype), None


def _widened_at_once(input_: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yield blocks of rows of ``input_``; a single one where there is nothing to be gained."""
    num_rows = len(input_)
    is_blocked = input_.device.type == "cpu" and input_.dtype != dtype
    step = 256 if is_blocked else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
