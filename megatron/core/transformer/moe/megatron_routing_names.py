"""Megatron's functions of routing, by its names and signatures; thin, over our pure functions.

For users' scripts: nothing of ours calls them. Where Megatron's would be wrong in silence, these
refuse: ``ConfigError`` names the argument.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.quantile_balancing import expert_quantiles
from megatron.core.transformer.moe.routing import (
    ScoreFunction,
    best_experts,
    combine_weights,
    group_limited,
    log_scores,
    softmax_over_experts,
    topk_indices,
)

TopK = Callable[..., tuple[Tensor, Tensor]]
MAX_SINKHORN_STEPS = 1000


class RouterReplay(Protocol):
    """What ``topk_routing_with_score_function`` asks of a replay of earlier choices."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[Tensor, Tensor]:
        """Return (scores [num_tokens, topk], indices [num_tokens, topk]) to route by."""


def topk_routing_with_score_function(  # noqa: PLR0913 (Megatron's signature)
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: ScoreFunction = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: RouterReplay | None = None,
    dense_output: bool = False,
    precomputed_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Send each token to its ``topk`` best experts; see ``routing.topk_routing``.

    Args:
        logits: [num_tokens, num_experts]; scored in fp32, or fp64 when they are.
        topk: Experts per token.
        use_pre_softmax: Softmax over all experts, not over the selected ones.
        num_groups: Equal groups of neighbouring experts; None for no groups.
        group_topk: Groups that a token may use; divides ``topk``.
        scaling_factor: What probs are multiplied by; None for 1.
        score_function: softmax, sigmoid or sqrtsoftplus.
        expert_bias: [num_experts], chooses experts and never weights them; not with softmax.
        fused: Changes nothing: no result depends on a kernel.
        router_replay: Chooses the experts, when it has a recorded choice.
        dense_output: Return [num_tokens, topk] tensors.
        precomputed_indices: [num_tokens, topk], experts to take instead of the best ones.

    Returns:
        Probs in the dtype of ``logits`` and the bool map, both [num_tokens, num_experts]; with
        ``dense_output`` probs and indices [num_tokens, topk], the best expert first.

    Raises:
        ConfigError: Groups do not fit, or an expert bias with softmax.
    """
    _check_groups(logits.shape[-1], topk, num_groups, group_topk)
    if expert_bias is not None and score_function == "softmax":
        raise ConfigError("expert_bias needs score_function sigmoid or sqrtsoftplus")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scores = log_scores(wide, score_function)
    ranking = _ranking(wide, scores, score_function, use_pre_softmax, expert_bias)
    indices = precomputed_indices
    if indices is None and router_replay is not None:
        replay = router_replay.get_replay_topk
        _, indices = replay(ranking, topk, num_groups, group_topk, compute_topk)
    if indices is None:
        routing_map = best_experts(
            wide.detach(),
            topk,
            score_function=score_function,
            pre_softmax=use_pre_softmax,
            num_groups=num_groups,
            group_topk=group_topk,
            expert_bias=expert_bias,
        )
    else:
        routing_map = torch.zeros_like(wide, dtype=torch.bool).scatter_(1, indices, True)
    probs = combine_weights(
        wide,
        routing_map,
        topk,
        score_function=score_function,
        pre_softmax=use_pre_softmax and score_function == "softmax",
        scaling_factor=scaling_factor,
    ).to(logits.dtype)
    if not dense_output:
        return probs, routing_map
    if indices is None:
        indices = _best_first(ranking.masked_fill(~routing_map, float("-inf")), topk)
    return probs.gather(1, indices), indices


def group_limited_topk(
    scores: Tensor,
    topk: int,
    num_tokens: int,
    num_experts: int,
    num_groups: int,
    group_topk: int,
) -> tuple[Tensor, Tensor]:
    """Take the ``topk`` best experts within the ``group_topk`` best groups of each token.

    Args:
        scores: [num_tokens, num_experts].
        topk: Experts per token, a multiple of ``group_topk``.
        num_tokens: Rows of ``scores``.
        num_experts: Columns of ``scores``.
        num_groups: Equal groups of neighbouring experts, each as good as the sum of its best
            topk / group_topk.
        group_topk: Groups that a token may use.

    Returns:
        The scores, differentiable, and the indices of the experts, [num_tokens, topk], best first.

    Raises:
        ConfigError: The numbers do not fit each other.
    """
    _check_groups(num_experts, topk, num_groups, group_topk)
    if tuple(scores.shape) != (num_tokens, num_experts):
        raise ConfigError(f"scores are {tuple(scores.shape)}, not {(num_tokens, num_experts)}")
    indices = _best_first(group_limited(scores.detach(), topk, num_groups, group_topk), topk)
    return scores.gather(1, indices), indices


def compute_topk(
    scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the ``topk`` largest scores of each row and their indices, the lower on a tie."""
    if num_groups is not None and group_topk is not None:
        num_tokens, num_experts = scores.shape
        return group_limited_topk(scores, topk, num_tokens, num_experts, num_groups, group_topk)
    indices = _best_first(scores, topk)
    return scores.gather(1, indices), indices


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """Scale rows and columns of exp(cost) until rows sum to 1 / rows, columns to 1 / columns.

    In logarithms and fp64, so that a cost of thousands gives finite numbers. Columns sum exactly,
    rows up to ``tol``.

    Args:
        cost: [num_tokens, num_experts], such as logits.
        tol: Mean relative change of the columns' factors in one step at which to stop; at most
            1000 steps are made.

    Returns:
        Of the shape and dtype of ``cost``, summing to 1.

    Source: Sinkhorn 1967; for routing, Clark et al. 2022 (arXiv:2202.01169), appendix B.
    """
    if cost.numel() == 0:
        return torch.zeros_like(cost)
    log_cost = cost.double()
    rows, columns = cost.shape
    column_factors = log_cost.new_zeros(columns)
    row_factors = log_cost.new_zeros(rows)
    for _ in range(MAX_SINKHORN_STEPS):
        before = column_factors
        row_factors = -math.log(rows) - (log_cost + column_factors).logsumexp(dim=1)
        column_factors = -math.log(columns) - (log_cost + row_factors[:, None]).logsumexp(dim=0)
        if bool((column_factors - before).abs().mean() < tol):
            break
    return (log_cost + row_factors[:, None] + column_factors).exp().to(cost.dtype)


def qb_dual_update(
    scores: Tensor, k: int, beta: Tensor, update_beta: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose the ``k`` experts of largest ``scores - beta``, and move beta to even out the load.

    With alpha a token's (k+1)-th largest ``scores - beta``, the new beta of an expert is the
    (target + 1)-th largest ``scores - alpha`` of its column: so ``target`` tokens prefer it to
    their next best. target is T k / E; where that is not whole, which Megatron demands, the two
    neighbours are interpolated.

    Args:
        scores: [num_tokens, num_experts].
        k: Experts per token.
        beta: [num_experts].
        update_beta: False to leave ``beta`` as it is.

    Returns:
        Indices [num_tokens, k], best first, and the new beta (``beta`` itself without an update,
        without tokens, or when each token takes all experts). No gradient.
    """
    scores = scores.detach()
    num_tokens, num_experts = scores.shape
    indices = _best_first(scores - beta, k)
    if not update_beta or num_tokens == 0 or k >= num_experts:
        return indices, beta
    return indices, expert_quantiles(scores, k, beta).to(beta.dtype)


def apply_random_logits(logits: Tensor) -> Tensor:
    """Return standard normal logits whose gradient goes to ``logits``; for benchmarks.

    Drawn from torch's global generator of the device, so each rank draws its own.
    """
    return torch.randn_like(logits) + (logits - logits.detach())


class _SharedBias:
    """Biases that all ranks draw alike, without a word between them: they count the draws."""

    def __init__(self) -> None:
        self.draws = 0
        self.kept: dict[tuple[int | None, float, int], Tensor] = {}

    def draw(self, num_experts: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.draws)
        self.draws += 1
        return torch.randn(num_experts, generator=generator)


_shared = _SharedBias()


def apply_biased_logits(logits: Tensor, std: float, layer_number: int | None = None) -> Tensor:
    """Return random logits with a bias for each expert, so that some get most; for benchmarks.

    Args:
        logits: [num_tokens, num_experts]; they get the gradient, straight through.
        std: Of the bias, which all ranks draw alike as long as they make the same calls. Negative:
            drawn once for each layer and used again.
        layer_number: Of the layer, for a negative ``std``.
    """
    num_experts = logits.shape[-1]
    if std >= 0:
        bias = _shared.draw(num_experts) * std
    else:
        key = (layer_number, std, num_experts)
        if key not in _shared.kept:
            _shared.kept[key] = _shared.draw(num_experts) * -std
        bias = _shared.kept[key]
    return apply_random_logits(logits) + bias.to(logits)


def router_gating_linear(
    inp: Tensor, weight: Tensor, bias: Tensor | None, router_dtype: torch.dtype
) -> Tensor:
    """Return ``inp @ weight.T + bias`` computed in ``router_dtype``, and in that dtype.

    Args:
        inp: [..., h].
        weight: [num_experts, h].
        bias: [num_experts], or None.
        router_dtype: Such as torch.float32 for bf16 operands, which get bf16 gradients.
    """
    wide_bias = None if bias is None else bias.to(router_dtype)
    return torch.nn.functional.linear(inp.to(router_dtype), weight.to(router_dtype), wide_bias)


def _check_groups(
    num_experts: int, topk: int, num_groups: int | None, group_topk: int | None
) -> None:
    """Refuse what would choose other experts than those meant."""
    if num_groups is None and group_topk is None:
        return
    if not num_groups or not group_topk:
        raise ConfigError(f"num_groups {num_groups} and group_topk {group_topk} need each other")
    if num_experts % num_groups or group_topk > num_groups:
        raise ConfigError(
            f"num_groups {num_groups} must divide the {num_experts} experts and be at least "
            f"group_topk {group_topk}"
        )
    each = topk // group_topk
    if topk % group_topk or each > num_experts // num_groups:
        raise ConfigError(
            f"topk {topk} must be a multiple of group_topk {group_topk}, and at most "
            f"{num_experts // num_groups} experts of a group: a group is judged by its best "
            "topk / group_topk"
        )


def _ranking(
    logits: Tensor,
    scores: Tensor,
    score_function: ScoreFunction,
    pre_softmax: bool,
    expert_bias: Tensor | None,
) -> Tensor:
    """Return by what experts are chosen; no gradient."""
    if score_function == "softmax":
        logits = logits.detach()
        return softmax_over_experts(logits) if pre_softmax else logits
    ranking = scores.detach().exp()
    return ranking if expert_bias is None else ranking + expert_bias


def _best_first(ranking: Tensor, topk: int) -> Tensor:
    """Return the indices of the ``topk`` largest of each row, largest first, [rows, topk]."""
    ranking = ranking.detach()
    found = topk_indices(ranking.float() if ranking.dtype != torch.float64 else ranking, topk)
    found = found.sort(dim=1).values  # the lower index first, then stably by value
    order = ranking.gather(1, found).sort(dim=1, descending=True, stable=True).indices
    return found.gather(1, order)
