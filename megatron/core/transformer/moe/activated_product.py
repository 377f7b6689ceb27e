"""Activation and second product of grouped experts in one autograd function.

Kept is the input of the activation only: its gradient needs that anyway, and gives the activation
once more on the way, for the gradient of the weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.extensions.torch_native import grouped_product, grouped_weight_grad
from megatron.core.grad_sink import grad_sink_of
from megatron.core.transformer.config.activation import ActivationKind
from megatron.core.transformer.moe.expert_activation import IN_TORCH, Activation
from megatron.core.weight_grad_queue import weight_gradient


def activated_product(
    inner: Tensor,
    probs: Tensor,
    weight: Tensor,
    tokens_per_expert: Tensor,
    *,
    kind: ActivationKind,
    activation: Activation = IN_TORCH,
) -> Tensor:
    """Return ``grouped_mm(weighted_activation(inner, probs), weight, tokens_per_expert)``.

    Args:
        inner: [num_rows, ffn or 2 * ffn], grouped by expert; see ``weighted_activation``.
        probs: [num_rows], fp32 or fp64.
        weight: [num_experts, h, ffn]; gets zeros where an expert has no rows.
        tokens_per_expert: [num_experts], int64; sums to num_rows.
        kind: See ``weighted_activation``.
        activation: What computes it.

    Returns:
        [num_rows, h].
    """
    out: Tensor = _ActivatedProduct.apply(inner, probs, weight, tokens_per_expert, kind, activation)
    return out


class _ActivatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inner: Tensor,
        probs: Tensor,
        weight: Tensor,
        tokens_per_expert: Tensor,
        kind: ActivationKind,
        activation: Activation,
    ) -> Tensor:
        ctx.save_for_backward(inner, probs, weight, tokens_per_expert)
        ctx.kind, ctx.activation, ctx.sink = kind, activation, grad_sink_of(weight)
        active = activation.activate(inner, probs, kind=kind)
        return grouped_product(active, weight.transpose(1, 2), tokens_per_expert)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, probs, weight, tokens_per_expert = ctx.saved_tensors
        grad = grad.contiguous()
        grad_active = grouped_product(grad, weight, tokens_per_expert)
        found = ctx.activation.differentiate(inner, probs, grad_active, kind=ctx.kind)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            operands = grad, found.activated, tokens_per_expert
            grad_weight = weight_gradient(ctx.sink, grouped_weight_grad, *operands)
        return found.inner, found.probs, grad_weight, None, None, None
