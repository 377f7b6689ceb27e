"""Losses that keep experts evenly used, and how they enter backward.

Losses come unscaled by their coefficient, so that they can be reported as they are. They keep the
logits, which live anyway, and nothing else of size tokens x experts. No group, no global state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.transformer.moe.routing import softmax_over_experts


def switch_load_balancing_loss(logits: Tensor, tokens_per_expert: Tensor, topk: int) -> Tensor:
    """Return E * sum_i(f_i * P_i): 1.0 when experts are used evenly, up to E / topk when not.

    f_i is the share of all (token, expert) pairs that went to expert i, P_i the mean over tokens
    of the scores over all experts, made to sum to 1. Only P has a gradient.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64; of scores that are no softmax, their
            ``log_scores``.
        tokens_per_expert: [num_experts], pairs routed to each expert; sums to num_tokens * topk.
        topk: Experts per token.

    Returns:
        Scalar in the dtype of ``logits``; 0 for no tokens.

    Source: Fedus et al. 2021 (arXiv:2101.03961), eq. 4-6, with f counted over top-k.
    """
    num_tokens, num_experts = logits.shape
    # E * sum_i f_i P_i = sum over tokens of (weight . softmax(logits))
    scale = num_experts / max(num_tokens, 1) ** 2 / topk
    loss: Tensor = _WeightedSoftmaxSum.apply(logits, tokens_per_expert.to(logits.dtype) * scale)
    return loss


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2, which keeps logits small.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64.

    Returns:
        Scalar in the dtype of ``logits``; 0 for no tokens.

    Source: Zoph et al. 2022 (arXiv:2202.08906), eq. 5.
    """
    loss: Tensor = _MeanSquareLogSumExp.apply(logits)
    return loss


def router_entropy(logits: Tensor) -> Tensor:
    """Return the mean over tokens of the entropy of softmax(logits), in nats; no gradient.

    Of scores that are no softmax, give their ``log_scores``.

    ln(num_experts) for a router that knows no preference, 0 for one that is certain. ``logits``
    is [num_tokens, num_experts]; 0 for no tokens.
    """
    logits = logits.detach()
    scores = softmax_over_experts(logits)
    entropy = logits.logsumexp(dim=1) - torch.linalg.vecdot(scores, logits)
    return entropy.sum() / max(logits.shape[0], 1)


def updated_expert_bias(expert_bias: Tensor, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """Return the bias moved by ``rate``: up where tokens are fewer than the mean, down where more.

    Args:
        expert_bias: [..., num_experts], fp32.
        tokens_per_expert: The same shape, int64, over all tokens of a step.
        rate: Of one step.

    Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1.
    """
    total = tokens_per_expert.sum(dim=-1, keepdim=True)
    missing = total - tokens_per_expert * tokens_per_expert.shape[-1]  # exact, in integers
    return expert_bias + rate * missing.sign()


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Tie a scalar loss to a tensor: whoever differentiates the tensor differentiates the loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor, scale: float | Tensor) -> Tensor:
        """Return ``output`` as it is.

        Args:
            ctx: Of autograd.
            output: Any tensor on the way to the main loss.
            aux_loss: Scalar.
            scale: Gradient of ``aux_loss`` in backward, whatever the gradient of ``output``.
        """
        ctx.scale, ctx.dtype, ctx.device = scale, aux_loss.dtype, aux_loss.device
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Pass the gradient of ``output`` on, and ``scale`` to ``aux_loss``."""
        one = torch.ones((), dtype=ctx.dtype, device=ctx.device)
        return grad_output, one * ctx.scale, None


class _WeightedSoftmaxSum(torch.autograd.Function):
    """sum over rows of (weight . softmax(row)); the softmax is made again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(logits, weight)
        return softmax_over_experts(logits).sum(dim=0).dot(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, weight = ctx.saved_tensors
        scores = softmax_over_experts(logits)
        centred = weight - (scores @ weight).unsqueeze(1)
        return centred.mul_(scores).mul_(grad), None


class _MeanSquareLogSumExp(torch.autograd.Function):
    """mean over rows of logsumexp(row)^2; the softmax is made in backward only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.logsumexp(dim=1).square().sum() / max(logits.shape[0], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        slope = logits.logsumexp(dim=1, keepdim=True) * (2.0 / max(logits.shape[0], 1))
        return softmax_over_experts(logits) * slope * grad
