"""The product of a gate, in a wider dtype than its operands."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.grad_sink import grad_sink_of
from megatron.core.weight_grad_queue import weight_gradient


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
        ctx.dtype, ctx.sink = dtype, grad_sink_of(weight)
        wide_weight = weight.to(dtype).t()
        out = input_.new_empty(len(input_), len(weight), dtype=dtype)
        for rows in _widened_at_once(input_, dtype):
            torch.mm(input_[rows].to(dtype), wide_weight, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        input_, weight = ctx.saved_tensors
        wide_weight = weight.to(ctx.dtype)
        grad_input = torch.empty_like(input_)
        for rows in _widened_at_once(input_, ctx.dtype):
            grad_input[rows] = grad[rows] @ wide_weight
        operands = grad, input_, weight.dtype
        return grad_input, weight_gradient(ctx.sink, _weight_grad, *operands), None


def _weight_grad(grad: Tensor, input_: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad.T @ input_, [out, in], computed in the dtype of ``grad`` and rounded once."""
    product = grad.new_zeros(grad.shape[1], input_.shape[1])
    for rows in _widened_at_once(input_, grad.dtype):
        product.addmm_(grad[rows].t(), input_[rows].to(grad.dtype))
    return product.to(dtype)


def _widened_at_once(input_: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yield blocks of rows of ``input_``; a single one where there is nothing to be gained."""
    num_rows = len(input_)
    is_blocked = input_.device.type == "cpu" and input_.dtype != dtype
    step = 256 if is_blocked else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
