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
    scale = 1.0 / (max(logits.shape[0], 1) * topk)
    return balance_loss_of_shares(logits, tokens_per_expert.to(logits.dtype) * scale)


def sequence_balance_loss(logits: Tensor, best: Tensor, topk: int, num_samples: int) -> Tensor:
    """Return the mean over samples of ``switch_load_balancing_loss`` of each sample's tokens.

    Args:
        logits: [s * num_samples, num_experts], the samples of a position side by side.
        best: Bool of the same shape, the experts that each token would choose.
        topk: Experts per token.
        num_samples: In the microbatch.

    Source: DeepSeek-V3 (arXiv:2412.19437), eq. 17-20.
    """
    num_tokens, num_experts = logits.shape
    counts = best.view(num_tokens // num_samples, num_samples, num_experts).sum(dim=0)
    scale = num_samples / (max(num_tokens, 1) * topk)
    return balance_loss_of_shares(logits, counts.to(logits.dtype) * scale)


def balance_loss_of_shares(logits: Tensor, shares: Tensor) -> Tensor:
    """Return E * sum_i(f_i * P_i) for given f; with f of each sample, the mean over samples.

    Args:
        logits: [num_tokens, num_experts]; see ``switch_load_balancing_loss``.
        shares: f, [num_experts] or [num_samples, num_experts] in the dtype of ``logits``; each row
            sums to 1.
    """
    num_tokens, num_experts = logits.shape
    # E * sum_i f_i P_i = sum over tokens of (weight . softmax(logits))
    weight = shares.view(-1, num_experts) * (num_experts / max(num_tokens, 1))
    loss: Tensor = _WeightedSoftmaxSum.apply(logits, weight)
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
    """sum over rows of (weight . softmax(row)); the softmax is made again in backward.

    ``weight`` is [num_samples, num_experts]; row i of the logits is of sample i % num_samples.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(logits, weight)
        scores = softmax_over_experts(logits)
        samples = len(weight)
        by_sample = scores.view(len(scores) // samples, samples, scores.shape[1]).sum(dim=0)
        return by_sample.flatten().dot(weight.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, weight = ctx.saved_tensors
        scores = softmax_over_experts(logits)
        if len(weight) == 1:
            centred = weight - scores @ weight.t()
            return centred.mul_(scores).mul_(grad), None
        scores = scores.view(-1, *weight.shape)  # [s, b, E]
        centred = weight - torch.linalg.vecdot(scores, weight).unsqueeze(2)
        return centred.mul_(scores).mul_(grad).view_as(logits), None


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
