"""Sinkhorn normalisation: prices of experts under which tokens spread evenly. Pure, no group.

All of it in logarithms, so that logits of any size give numbers. The number of rounds is bounded
and rounds after the last needed one change nothing, so the device is never waited for.
"""

import math

import torch
from torch import Tensor

ROUNDS = 32
"""Rounds at most. Logits of a few units settle in five to ten; those of hundreds may not, and are
spread less evenly then."""


def sinkhorn_ranking(logits: Tensor, padding: Tensor | None = None, *, tol: float = 1e-4) -> Tensor:
    """Return what a balanced choice ranks the experts of each token by; no gradient.

    It is the logarithm of the doubly normalised ``exp(logits)`` up to a constant of each row. One
    token alone, or alone among padding, is no crowd: all its experts would tie, so its logits rank
    them.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64.
        padding: See ``expert_prices``.
        tol: See ``expert_prices``.

    Source: Sinkhorn 1964, in logarithms as in Peyre and Cuturi 2019 (arXiv:1803.00567), 4.4; for
    experts: Clark et al. 2022 (arXiv:2202.01169), section 3.1.
    """
    logits = logits.detach()
    if len(logits) <= 1:
        return logits
    prices = expert_prices(logits, padding, tol=tol)
    if padding is not None:
        prices = prices.where((~padding).sum() > 1, 0.0)
    return logits + prices


def expert_prices(
    logits: Tensor,
    padding: Tensor | None = None,
    *,
    tol: float = 1e-4,
    rounds: int = ROUNDS,
    early_exit: bool | None = None,
) -> Tensor:
    """Return the logarithm of what column scaling ends at, [num_experts]; low where crowded.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64.
        padding: [num_tokens] bool, True for tokens that crowd no expert; None for none.
        tol: Rounds end when no price moves by more (natural logarithm).
        rounds: At most.
        early_exit: Look after each round whether it was the last. That waits for the device, so
            None does it on the CPU only; without it later rounds are made in vain, and the result
            is the same.
    """
    num_tokens, num_experts = logits.shape
    columns = logits.detach().t().contiguous()  # [num_experts, num_tokens]: sums along memory
    prices = columns.new_zeros(num_experts, 1)
    if num_tokens == 0:
        return prices.flatten()
    if early_exit is None:
        early_exit = logits.device.type == "cpu"
    settled = torch.zeros((), dtype=torch.bool, device=logits.device)
    for _ in range(rounds):
        scaled = columns + _row_scale(columns + prices)
        if padding is not None:
            scaled = scaled.masked_fill(padding, float("-inf"))
        new = -scaled.logsumexp(dim=1, keepdim=True) - math.log(num_experts)
        new = new.where(new < float("inf"), 0.0)  # nothing but padding
        moved = (new - prices).abs().amax()
        prices = torch.where(settled, prices, new)
        settled = settled | (moved <= tol)
        if early_exit and settled:
            break
    return prices.flatten()


def _row_scale(columns: Tensor) -> Tensor:
    """Return the logarithm that makes each token's sum 1 / num_tokens, [1, num_tokens]."""
    return -columns.logsumexp(dim=0, keepdim=True) - math.log(max(columns.shape[1], 1))
