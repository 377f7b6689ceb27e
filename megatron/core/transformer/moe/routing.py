"""From router logits to a routing decision: pure tensor functions, no module and no group.

Equal logits are broken by the lower expert index, on every device, so that a recomputed, resumed
or re-partitioned run routes alike.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
_SMALL = -20.0


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    probs: Tensor
    """[num_tokens, num_experts], fp32 (fp64 from fp64 logits); 0 where a token is not routed."""
    routing_map: Tensor
    """[num_tokens, num_experts], bool; each row holds topk True, unless experts choose tokens."""


def topk_routing(  # noqa: PLR0913 (the options of a router)
    logits: Tensor,
    topk: int,
    *,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = False,
    norm_topk_prob: bool = True,
    scaling_factor: float | None = None,
    num_groups: int | None = None,
    group_topk: int | None = None,
    group_score_topk: int | None = None,
    expert_bias: Tensor | None = None,
) -> Routing:
    """Send each token to its ``topk`` best experts.

    Args:
        logits: [num_tokens, num_experts]; scored in fp32, or fp64 when they are.
        topk: Experts per token.
        score_function: How logits become scores, see ``log_scores``. The weights of a token are
            its scores over their sum over the chosen experts; under sigmoid and sqrtsoftplus the
            score itself with topk 1.
        pre_softmax: Take the softmax over all experts, not over the selected ones; the probs of
            a token then sum to at most 1.
        norm_topk_prob: Divide scores by their sum over the chosen experts; False weighs by the
            score itself, where that is of the expert alone (not softmax).
        scaling_factor: What probs are multiplied by at the end; None for 1.
        num_groups: Equal groups of neighbouring experts; None for no groups.
        group_topk: Groups that a token may use.
        group_score_topk: How many of its best experts are a group's worth, their sum;
            ``topk / group_topk`` when None.
        expert_bias: [num_experts], added to scores to choose experts, never to their weights; not
            with softmax.

    Returns:
        The routing; gradients reach ``logits`` through its probs.

    Source: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3-5; sigmoid and groups: DeepSeek-V3
    (arXiv:2412.19437), eq. 13-15 and section 2.1.2.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    routing_map = best_experts(
        logits,
        topk,
        score_function=score_function,
        pre_softmax=pre_softmax,
        num_groups=num_groups,
        group_topk=group_topk,
        group_score_topk=group_score_topk,
        expert_bias=expert_bias,
    )
    probs = combine_weights(
        logits,
        routing_map,
        topk,
        score_function=score_function,
        pre_softmax=pre_softmax,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=scaling_factor,
    )
    return Routing(probs, routing_map)


def best_experts(
    logits: Tensor,
    topk: int,
    *,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    group_score_topk: int | None = None,
    expert_bias: Tensor | None = None,
) -> Tensor:
    """Return a bool map [num_tokens, num_experts], True at the ``topk`` experts of each token.

    The arguments are those of ``topk_routing``; ``logits`` are fp32 or fp64.
    """
    ranking = logits = logits.detach()
    if (num_groups or expert_bias is not None) and score_function != "softmax":
        # else logits choose: they order alike, and never tie
        ranking = log_scores(logits, score_function).exp()
    if expert_bias is not None:
        assert score_function != "softmax", "an expert bias needs scores of each expert alone"
        ranking = ranking + expert_bias
    if num_groups is not None:
        assert group_topk is not None, f"{num_groups=} without group_topk"
        ranking = softmax_over_experts(ranking) if pre_softmax else ranking
        ranking = group_limited(ranking, topk, num_groups, group_topk, group_score_topk)
    return map_of_largest(ranking, topk)


def combine_weights(
    logits: Tensor,
    routing_map: Tensor,
    topk: int,
    *,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = False,
    norm_topk_prob: bool = True,
    scaling_factor: float | None = None,
) -> Tensor:
    """Return the weight of each chosen expert, [num_tokens, num_experts], 0 elsewhere.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64; the weights have their gradient.
        routing_map: The chosen experts, whatever chose them; each row holds ``topk`` True.
        topk: Experts per token.
        score_function: See ``topk_routing``.
        pre_softmax: See ``topk_routing``.
        norm_topk_prob: See ``topk_routing``.
        scaling_factor: See ``topk_routing``.
    """
    scores = log_scores(logits, score_function)
    own = score_function != "softmax" and (topk == 1 or not norm_topk_prob)
    probs = chosen_probs(scores, routing_map, pre_softmax=pre_softmax, own_score=own)
    return probs if scaling_factor is None else probs * scaling_factor


def chosen_probs(
    scores: Tensor, routing_map: Tensor, *, pre_softmax: bool = False, own_score: bool = False
) -> Tensor:
    """Return the weights of the chosen experts, by default their scores over the sum of those.

    Args:
        scores: [num_tokens, num_experts], of ``log_scores``.
        routing_map: Bool of the same shape; True at least once in each row by default, any
            number of times with one of the two options.
        pre_softmax: Weigh by the softmax over all experts.
        own_score: Weigh by the score itself, which is the exponential of ``scores``.

    Returns:
        Of the shape and dtype of ``scores``, 0 where a token is not routed.
    """
    if pre_softmax:
        return softmax_over_experts(scores).masked_fill(~routing_map, 0.0)
    if own_score:
        return scores.exp().masked_fill(~routing_map, 0.0)
    return softmax_over_experts(scores.masked_fill(~routing_map, float("-inf")))


def log_scores(logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """Return the logarithm of the scores, up to a constant of the row under softmax.

    So scores over their sum are a softmax of this, which sums to 1 also where the scores
    themselves underflow.

    Args:
        logits: [num_tokens, num_experts], fp32 or fp64.
        score_function: softmax; sigmoid; or sqrtsoftplus, sqrt(log(1 + exp(logit))).

    Returns:
        Of the shape and dtype of ``logits``; under softmax the logits themselves.
    """
    if score_function == "softmax":
        return logits
    if score_function == "sigmoid":
        return torch.nn.functional.logsigmoid(logits)
    # log(log(1 + e^x)) = x - e^x / 2 + O(e^2x) for small x, where the inner log underflows
    floor = logits.clamp(min=_SMALL)
    exact = torch.logaddexp(floor, torch.zeros_like(floor)).log()
    small = logits.clamp(max=_SMALL)
    return 0.5 * torch.where(logits > _SMALL, exact, small - 0.5 * small.exp())


def group_limited(
    ranking: Tensor,
    topk: int,
    num_groups: int,
    group_topk: int,
    group_score_topk: int | None = None,
) -> Tensor:
    """Return ``ranking`` with -inf for all experts outside the best groups of each token.

    Args:
        ranking: [num_tokens, num_experts]; the higher, the sooner chosen.
        topk: Experts per token.
        num_groups: Of equal size; a group's worth is the sum of its ``group_score_topk`` largest.
        group_topk: Groups that stay.
        group_score_topk: ``topk / group_topk`` when None, which must be a whole number then.
    """
    if group_score_topk is None:
        assert topk % group_topk == 0, f"{topk=} is no multiple of {group_topk=}"
        group_score_topk = topk // group_topk
    groups = ranking.unflatten(1, (num_groups, -1))  # [num_tokens, num_groups, group size]
    worth = groups.topk(group_score_topk, dim=2).values.sum(dim=2)
    stays = map_of_largest(worth, group_topk)
    return groups.masked_fill(~stays.unsqueeze(2), float("-inf")).flatten(1)


def map_of_largest(ranking: Tensor, topk: int) -> Tensor:
    """Return a bool map, True at the ``topk`` largest of each row; see ``topk_indices``."""
    indices = topk_indices(ranking, topk)
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, indices, True)


def topk_indices(logits: Tensor, topk: int) -> Tensor:
    """Return the indices of the ``topk`` largest logits of each row, the lower index on a tie.

    ``torch.topk`` promises no order among equals. In fp32 each logit and its index become one
    integer, which has no equals and costs no more; other dtypes are sorted stably.

    Args:
        logits: [num_tokens, num_experts].
        topk: At most num_experts.

    Returns:
        [num_tokens, topk], int64, in no particular order.
    """
    logits = logits.detach()
    num_experts = logits.shape[1]
    if logits.dtype != torch.float32:
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    # -0.0 equals 0.0 but has other bits; adding 0.0 makes them one.
    bits = (logits + 0.0).view(torch.int32).long()
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    place = torch.arange(num_experts - 1, -1, -1, device=logits.device)
    return (ordered * num_experts + place).topk(topk, dim=1, sorted=False).indices


def softmax_over_experts(logits: Tensor) -> Tensor:
    """Return the softmax over the last dimension of ``logits`` [num_tokens, num_experts].

    On the CPU a softmax over a few columns is several times slower than one over as many rows.
    """
    if logits.device.type == "cpu" and logits.shape[1] <= 32:
        return logits.t().softmax(dim=0).t().contiguous()
    return logits.softmax(dim=1)
