"""How many tokens an expert takes at most, and which it leaves out: pure functions, no group.

A capacity counts the tokens of one microbatch on one rank, so it needs no other rank, and what is
dropped does not depend on expert parallelism. Ties go to the earlier token.
"""

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from megatron.core.transformer.moe.routing import Routing, topk_indices


def get_capacity(
    num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int | None = None
) -> int:
    """Return ``ceil(num_tokens / num_experts * capacity_factor)``, at least ``min_capacity``.

    The factor is taken as the decimal number that it is written as: 10 tokens times 1.1 are 11,
    where floating point would give 12. ``num_tokens`` counts a token once for each of its topk.
    """
    capacity = math.ceil(Fraction(num_tokens, num_experts) * Fraction(repr(float(capacity_factor))))
    return max(capacity, min_capacity or 0)


def apply_router_token_dropping(
    routing_probs: Tensor,
    routing_map: Tensor,
    router_topk: int,
    capacity_factor: float,
    drop_policy: Literal["probs", "position"] = "probs",
    pad_to_capacity: bool = False,
) -> Routing:
    """Leave each expert its first tokens, as many as its capacity.

    Args:
        routing_probs: [num_tokens, num_experts], differentiable; not made to sum to 1 again.
        routing_map: [num_tokens, num_experts], bool.
        router_topk: Experts of a token, from which the capacity follows.
        capacity_factor: 1.0 is room for the mean. The capacity never exceeds num_tokens.
        drop_policy: Which come first: the largest probs, or the earliest tokens.
        pad_to_capacity: Fill up each expert with tokens that were not routed to it, with prob 0,
            so that every column of the map holds exactly the capacity.

    Returns:
        What is left; a dropped pair has prob 0 and gets no gradient.
    """
    num_tokens, num_experts = routing_map.shape
    capacity = get_capacity(num_tokens * router_topk, num_experts, capacity_factor)
    if capacity >= num_tokens and not pad_to_capacity:
        return Routing(routing_probs, routing_map)
    if drop_policy == "probs":
        merit = routing_probs.detach().masked_fill(~routing_map, -1.0)
    else:
        merit = routing_map.float()
    by_expert = merit.t().contiguous()
    first = topk_indices(by_expert, min(capacity, num_tokens))
    chosen = torch.zeros_like(by_expert, dtype=torch.bool).scatter_(1, first, True).t()
    kept = (chosen & routing_map).contiguous()
    probs = routing_probs.masked_fill(~kept, 0.0)
    return Routing(probs, chosen.contiguous() if pad_to_capacity else kept)


def dropped_fraction(
    routing_map: Tensor, kept_map: Tensor, padding: Tensor | None = None
) -> Tensor:
    """Return the share of the pairs of ``routing_map`` that are not in ``kept_map``; a scalar.

    Both are [num_tokens, num_experts], bool; 0 for no tokens. ``padding`` [num_tokens], bool, says
    which rows are left out.
    """
    if padding is not None:
        routing_map = routing_map & ~padding.unsqueeze(1)
    return (routing_map & ~kept_map).sum() / routing_map.sum().clamp(min=1)
