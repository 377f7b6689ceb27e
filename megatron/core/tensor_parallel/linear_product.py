"""The product of a linear layer, whose weight gradient goes to its sum: at once, or in a W step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.core.cpu_kernels.weight_gradient import add_weight_gradient
from megatron.core.grad_sink import grad_sink_of
from megatron.core.tensor_parallel.region_entry import GatheredAgain, RegionEntry, landed
from megatron.core.weight_grad_queue import LateOperand, is_put_off, weight_gradient

_ALONE = RegionEntry()


def linear(
    input_: Tensor, weight: Tensor, bias: Tensor | None = None, entry: RegionEntry = _ALONE
) -> Tensor:
    """Return ``input_ @ weight.T + bias``, bit for bit as torch's ``F.linear`` with its gradients.

    Args:
        input_: [..., in], whole or as ``entry`` says.
        weight: [out, in]; its gradient goes to its sink, if it has one.
        bias: [out], or None.
        entry: Ranks whose slices of one matrix multiply the same input; its gradient is then the
            sum of theirs.

    Returns:
        [..., out], for all of the sequence.
    """
    out: Tensor = _Linear.apply(input_, weight, bias, entry)
    return out


def linear_weight_grad(grad: Tensor, input_: Tensor | GatheredAgain) -> Tensor:
    """Return grad.T @ input_, [out, in], of rows [n, out] and of input [..., in] of n rows."""
    whole = landed(input_)
    return grad.t() @ whole.reshape(-1, whole.shape[-1])


def add_linear_weight_grad(total: Tensor, grad: Tensor, input_: Tensor | GatheredAgain) -> None:
    """Add what ``linear_weight_grad`` returns to ``total`` [out, in], which may be wider."""
    whole = landed(input_)
    add_transposed_product(total, grad, whole.reshape(-1, whole.shape[-1]))


def add_transposed_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right, of [n, a] and [n, b], to ``total`` [a, b], which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif not add_weight_gradient(left, right, total):
        total.add_(left.t() @ right)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_: Tensor, weight: Tensor, bias: Tensor | None, entry: RegionEntry
    ) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.sink, ctx.entry = grad_sink_of(weight), entry
        return nn.functional.linear(entry.whole(input_), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        operand = ctx.entry.operand(input_) if need_weight else None
        if isinstance(operand, LateOperand) and not is_put_off(ctx.sink):
            operand.launch()
        on_its_way = None
        if need_input:
            whole = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
            on_its_way = ctx.entry.start_sum(whole)
        grad_weight = grad_bias = None
        try:
            if need_weight:
                grad_weight = weight_gradient(
                    ctx.sink, linear_weight_grad, rows, operand, add=add_linear_weight_grad
                )
            if need_bias:
                grad_bias = rows.sum(0)
        finally:  # nobody may write to freed memory if a product fails
            grad_input = None if on_its_way is None else on_its_way.land()
        return grad_input, grad_weight, grad_bias, None
