"""Quantile balancing: a price of each expert, set where as many tokens as its share would pay it.

Choosing experts under a price is one linear program with equal loads; a step of training makes one
round of coordinate descent on its dual. Pure functions; who sums over ranks is moe_logging.py.
"""

import torch
from torch import Tensor

from megatron.core.transformer.moe.routing import map_of_largest


def quantile_choice(logits: Tensor, topk: int, beta: Tensor) -> Tensor:
    """Return a bool map, True at the ``topk`` largest of ``logits - beta`` of each token.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64.
        topk: Experts per token.
        beta: [num_experts], fp32; the price of each expert.
    """
    return map_of_largest(logits.detach() - beta, topk)


def expert_quantiles(
    logits: Tensor, topk: int, beta: Tensor, padding: Tensor | None = None
) -> Tensor:
    """Return the price at which each expert would get its even share of these tokens.

    A token pays for an expert what it gains over the best expert that it does not choose under
    ``beta``: ``logits - alpha``, alpha the (topk + 1)-th largest of ``logits - beta``. The price of
    an expert is what its num_tokens * topk / num_experts best tokens pay more than: the next
    largest. Where that number is not whole, the two neighbours are interpolated.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64; every row counts as one token.
        topk: Experts per token, less than num_experts.
        beta: [num_experts], the prices of now.
        padding: [num_tokens] bool, True for rows that do not count; None for none.

    Returns:
        [num_experts] in the dtype of ``logits``; zeros for no tokens.
    """
    num_tokens, num_experts = logits.shape
    assert topk < num_experts, f"{topk=} of {num_experts=}: there is nothing to choose"
    logits = logits.detach()
    if num_tokens == 0:
        return logits.new_zeros(num_experts)
    alpha = (logits - beta).topk(topk + 1, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    gains = (logits - alpha).t().contiguous()  # [num_experts, num_tokens]
    if padding is not None:
        return _quantiles_of(gains.masked_fill(padding, float("-inf")), topk, (~padding).sum())
    whole, part = divmod(num_tokens * topk, num_experts)
    price = _largest(gains, whole)
    if part:
        price = torch.lerp(price, _largest(gains, whole + 1), part / num_experts)
    return price


def _quantiles_of(gains: Tensor, topk: int, num_valid: Tensor) -> Tensor:
    """Find the prices where only the device knows how many of the ``gains`` are not -inf."""
    num_experts = len(gains)
    pairs = num_valid * topk
    ranked = gains.sort(dim=1, descending=True).values
    whole, part = pairs // num_experts, (pairs % num_experts).to(gains.dtype) / num_experts

    def ranked_at(rank: Tensor) -> Tensor:
        last = (num_valid - 1).clamp(min=0)
        return ranked.index_select(1, torch.minimum(rank, last).view(1)).squeeze(1)

    price = torch.lerp(ranked_at(whole), ranked_at(whole + 1), part)
    return torch.where(num_valid > 0, price, 0.0)


def updated_beta(beta: Tensor, quantiles: Tensor, ema: float) -> Tensor:
    """Return the prices after a step: ``ema * beta + (1 - ema) * quantiles``, of mean 0.

    A price common to all experts decides nothing, so the mean is taken out.

    Args:
        beta: [num_experts], fp32.
        quantiles: [num_experts], fp64; ``expert_quantiles``, the mean over the tokens of a step.
        ema: How much of the old price stays, at least 0 and below 1.
    """
    mixed = beta.double() * ema + quantiles * (1.0 - ema)
    return (mixed - mixed.mean()).to(beta.dtype)


def _largest(rows: Tensor, rank: int) -> Tensor:
    """Return the value of each row that ``rank`` others precede in descending order."""
    # not kthvalue, which torch refuses on CUDA where only deterministic kernels are allowed
    count = min(rank + 1, rows.shape[1])
    return rows.topk(count, dim=1, sorted=False).values.amin(dim=1)
