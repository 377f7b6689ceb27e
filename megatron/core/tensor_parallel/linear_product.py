"""The product of a linear layer, whose weight gradient goes to its sum: at once, or in a W step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.core.grad_sink import grad_sink_of
from megatron.core.weight_grad_queue import weight_gradient


def linear(input_: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``input_ @ weight.T + bias``, bit for bit as torch's ``F.linear`` with its gradients.

    Args:
        input_: [..., in].
        weight: [out, in]; its gradient goes to its sink, if it has one.
        bias: [out], or None.

    Returns:
        [..., out].
    """
    out: Tensor = _Linear.apply(input_, weight, bias)
    return out


def linear_weight_grad(grad: Tensor, input_: Tensor) -> Tensor:
    """Return grad.T @ input_, [out, in], of rows [n, out] and of input [..., in] of n rows."""
    return grad.t() @ input_.reshape(-1, input_.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.sink = grad_sink_of(weight)
        return nn.functional.linear(input_, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input_, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need_input, need_weight, need_bias = ctx.needs_input_grad
        grad_input = (rows @ weight).view(input_.shape) if need_input else None
        grad_weight = None
        if need_weight:
            grad_weight = weight_gradient(ctx.sink, linear_weight_grad, rows, input_)
        return grad_input, grad_weight, rows.sum(0) if need_bias else None
