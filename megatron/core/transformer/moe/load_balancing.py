"""Losses that keep experts evenly used, and how they enter backward.

Losses come unscaled by their coefficient, so that they can be reported as they are. They keep the
logits, which live anyway, and nothing else of size tokens x experts. No group, no global state.

``padding`` [num_tokens], bool, is True where a token is padding: such a row is in no sum and no
count and gets no gradient, whatever it holds; None for none. ``num_tokens`` is what a sum over
tokens is divided by: the tokens that are no padding when None.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.transformer.moe.routing import softmax_over_experts
from megatron.core.transformer.moe.token_share import TokenShare


def switch_load_balancing_loss(
    logits: Tensor,
    tokens_per_expert: Tensor,
    topk: int,
    padding: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    """Return E * sum_i(f_i * P_i): 1.0 when experts are used evenly, up to E / topk when not.

    f_i is the share of all (token, expert) pairs that went to expert i, P_i the mean over tokens
    of the scores over all experts, made to sum to 1. Only P has a gradient.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64; of scores that are no softmax, their
            ``log_scores``.
        tokens_per_expert: [num_experts], pairs routed to each expert, without padding; sums to
            num_tokens * topk.
        topk: Experts per token.
        padding: See the module.
        num_tokens: See the module; what ``tokens_per_expert`` counted.

    Returns:
        Scalar in the dtype of ``logits``; 0 for no tokens.

    Source: Fedus et al. 2021 (arXiv:2101.03961), eq. 4-6, with f counted over top-k.
    """
    num_tokens = count_valid(logits, padding) if num_tokens is None else num_tokens
    shares = tokens_per_expert.to(logits.dtype) * (1.0 / (num_tokens * topk))
    return balance_loss_of_shares(logits, shares, padding, num_tokens)


def count_valid(logits: Tensor, padding: Tensor | None) -> int | Tensor:
    """Return how many rows of ``logits`` are no padding, at least 1; on the device with a mask."""
    if padding is None:
        return max(logits.shape[0], 1)
    return (~padding).sum().clamp(min=1).to(logits.dtype)


def sequence_balance_loss(
    logits: Tensor,
    best: Tensor,
    topk: int,
    num_samples: int,
    padding: Tensor | None = None,
    share: TokenShare | None = None,
) -> Tensor:
    """Return the mean over samples of ``switch_load_balancing_loss`` of each sample's tokens.

    A sample of padding alone has loss 0, and counts in the mean.

    Args:
        logits: [s * num_samples, num_experts], the samples of a position side by side.
        best: Bool of the same shape, the experts that each token would choose; none of padding.
        topk: Experts per token.
        num_samples: In the microbatch.
        padding: See the module.
        share: Where other ranks have other positions of these samples; None when none does. The
            losses of all shares add up to that of the whole samples.

    Source: DeepSeek-V3 (arXiv:2412.19437), eq. 17-20.
    """
    num_tokens, num_experts = logits.shape
    length = num_tokens // num_samples
    counts = best.view(length, num_samples, num_experts).sum(dim=0)
    if share is not None:
        counts = share.total(counts)
        num_tokens *= share.ranks
    counts = counts.to(logits.dtype)
    if padding is None:
        scale = num_samples / (max(num_tokens, 1) * topk)
        return balance_loss_of_shares(logits, counts * scale, num_tokens=max(num_tokens, 1))
    valid = (~padding).view(length, num_samples, 1).sum(dim=0)
    valid = (valid if share is None else share.total(valid)).clamp(min=1).to(logits.dtype)
    shares = counts / (valid * topk)  # [num_samples, E]
    return balance_loss_of_shares(logits, shares, padding, valid * num_samples)


def balance_loss_of_shares(
    logits: Tensor,
    shares: Tensor,
    padding: Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    """Return E * sum_i(f_i * P_i) for given f; with f of each sample, the mean over samples.

    Args:
        logits: [num_tokens, num_experts]; see ``switch_load_balancing_loss``.
        shares: f, [num_experts] or [num_samples, num_experts] in the dtype of ``logits``; each row
            sums to 1.
        padding: See the module.
        num_tokens: See the module; or [num_samples, 1], for each row of ``shares`` its own.
    """
    num_tokens = count_valid(logits, padding) if num_tokens is None else num_tokens
    num_experts = logits.shape[1]
    # E * sum_i f_i P_i = sum over tokens of (weight . softmax(logits))
    weight = shares.view(-1, num_experts) * (num_experts / num_tokens)
    loss: Tensor = _WeightedSoftmaxSum.apply(logits, weight, padding)
    return loss


def router_z_loss(
    logits: Tensor, padding: Tensor | None = None, num_tokens: int | Tensor | None = None
) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2, which keeps logits small.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64.
        padding: See the module.
        num_tokens: See the module.

    Returns:
        Scalar in the dtype of ``logits``; 0 for no tokens.

    Source: Zoph et al. 2022 (arXiv:2202.08906), eq. 5.
    """
    num_tokens = count_valid(logits, padding) if num_tokens is None else num_tokens
    loss: Tensor = _SumSquareLogSumExp.apply(logits, padding) / num_tokens
    return loss


def router_entropy(
    logits: Tensor, padding: Tensor | None = None, num_tokens: int | Tensor | None = None
) -> Tensor:
    """Return the mean over tokens of the entropy of softmax(logits), in nats; no gradient.

    Of scores that are no softmax, give their ``log_scores``.

    ln(num_experts) for a router that knows no preference, 0 for one that is certain. ``logits``
    is [num_tokens, num_experts]; 0 for no tokens.
    """
    logits = logits.detach()
    scores = softmax_over_experts(logits)
    entropy = logits.logsumexp(dim=1) - torch.linalg.vecdot(scores, logits)
    num_tokens = count_valid(logits, padding) if num_tokens is None else num_tokens
    return _without(entropy, padding).sum() / num_tokens


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
    def forward(ctx: Any, logits: Tensor, weight: Tensor, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, weight, padding)
        scores = _without(softmax_over_experts(logits), padding)
        samples = len(weight)
        by_sample = scores.view(len(scores) // samples, samples, scores.shape[1]).sum(dim=0)
        return by_sample.flatten().dot(weight.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, weight, padding = ctx.saved_tensors
        scores = softmax_over_experts(logits)
        if len(weight) == 1:
            centred = weight - scores @ weight.t()
            return _without(centred.mul_(scores).mul_(grad), padding), None, None
        scores = scores.view(-1, *weight.shape)  # [s, b, E]
        centred = weight - torch.linalg.vecdot(scores, weight).unsqueeze(2)
        return _without(centred.mul_(scores).mul_(grad).view_as(logits), padding), None, None


class _SumSquareLogSumExp(torch.autograd.Function):
    """sum over rows of logsumexp(row)^2; the softmax is made in backward only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, padding)
        return _without(logits.logsumexp(dim=1), padding).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, padding = ctx.saved_tensors
        slope = logits.logsumexp(dim=1, keepdim=True) * (2.0 * grad)
        return _without(softmax_over_experts(logits) * slope, padding), None


def _without(rows: Tensor, padding: Tensor | None) -> Tensor:
    """Return ``rows`` [num_tokens, ...] with 0 for padding, also where that is not finite."""
    if padding is None:
        return rows
    return rows.masked_fill(padding.view(-1, *(1,) * (rows.dim() - 1)), 0.0)
