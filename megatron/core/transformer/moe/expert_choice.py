"""Experts choose tokens: each takes the best of a microbatch, as many as its capacity, no more.

Pure tensor functions. What an expert takes depends on all tokens of the microbatch on this rank,
later ones included, so it is a rule for training only: elsewhere tokens choose.
"""

import torch
from torch import Tensor

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.capacity import get_capacity
from megatron.core.transformer.moe.routing import (
    Routing,
    ScoreFunction,
    chosen_probs,
    log_scores,
    map_of_largest,
)
from megatron.core.transformer.moe.token_share import TokenShare


def expert_choice_routing(
    logits: Tensor,
    topk: int,
    *,
    capacity_factor: float | None = None,
    score_function: ScoreFunction = "softmax",
    scaling_factor: float | None = None,
    padding: Tensor | None = None,
    share: TokenShare | None = None,
) -> Routing:
    """Let each expert take the tokens that score it best; a token has 0 to num_experts experts.

    Every expert takes exactly ``expert_capacity`` tokens, the earlier one among equals. A token is
    weighted by its scores as they are: the softmax over all experts, or the sigmoid or
    sqrtsoftplus of the logit. They are not divided by their sum over the experts that took it.

    Args:
        logits: [num_tokens, num_experts]; scored in fp32, or fp64 when they are.
        topk: Experts that a token has in the mean, at a capacity factor of 1.
        capacity_factor: Multiplies the capacity; None for 1.
        score_function: See ``log_scores``.
        scaling_factor: What probs are multiplied by at the end; None for 1.
        padding: [num_tokens] bool, True for tokens that are taken after all others; None for none.
        share: Where the rows are a share of the microbatch; None when they are all of it.

    Source: Zhou et al. 2022 (arXiv:2202.09368), section 3.2.
    """
    scores = _wide_scores(logits, score_function)
    merit = scores.detach()
    if score_function == "softmax":
        merit = merit.log_softmax(dim=1)  # unlike the softmax, never a tie of zeros
    if padding is not None:
        merit = merit.masked_fill(padding.unsqueeze(1), float("-inf"))
    if share is not None:
        merit = share.gather(merit)
    capacity = expert_capacity(len(merit), merit.shape[1], topk, capacity_factor)
    routing_map = map_of_largest(merit.t().contiguous(), capacity).t().contiguous()
    if share is not None:
        routing_map = share.own(routing_map)
    return Routing(_own_scores(scores, routing_map, score_function, scaling_factor), routing_map)


def token_choice_routing(
    logits: Tensor,
    topk: int,
    *,
    score_function: ScoreFunction = "softmax",
    scaling_factor: float | None = None,
) -> Routing:
    """Send each token to its ``topk`` best experts, weighted as ``expert_choice_routing`` does.

    What evaluation and generation do with a router that was trained by expert choice: no token
    looks at another one. The arguments are those of ``expert_choice_routing``.
    """
    scores = _wide_scores(logits, score_function)
    routing_map = map_of_largest(scores, topk)
    return Routing(_own_scores(scores, routing_map, score_function, scaling_factor), routing_map)


def takes_by_expert(training: bool, context: ForwardContext) -> bool:
    """Return whether experts choose in this forward: in training, never beside a cache."""
    return training and context.kv_cache is None


def expert_capacity(
    num_tokens: int, num_experts: int, topk: int, capacity_factor: float | None = None
) -> int:
    """Return how many tokens each expert takes: min(T, ceil(T * topk / E * factor))."""
    factor = 1.0 if capacity_factor is None else capacity_factor
    return min(num_tokens, get_capacity(num_tokens * topk, num_experts, factor))


def _wide_scores(logits: Tensor, score_function: ScoreFunction) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return log_scores(wide, score_function)


def _own_scores(
    scores: Tensor,
    routing_map: Tensor,
    score_function: ScoreFunction,
    scaling_factor: float | None,
) -> Tensor:
    softmax = score_function == "softmax"
    probs = chosen_probs(scores, routing_map, pre_softmax=softmax, own_score=not softmax)
    return probs if scaling_factor is None else probs * scaling_factor
