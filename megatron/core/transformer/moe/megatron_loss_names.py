"""Megatron's functions of balance losses and counts, by its names and signatures.

For users' scripts: nothing of ours calls them. ``padding_mask`` is True where a token is padding,
here and everywhere.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.moe.load_balancing import router_z_loss
from megatron.core.transformer.moe.routing import (
    ScoreFunction,
    log_scores,
    map_of_largest,
    softmax_over_experts,
)


def switch_load_balancing_loss_func(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    topk: int,
    num_experts: int,
    moe_aux_loss_coeff: float,
    fused: bool = False,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Return coeff * E / (topk * T^2) * sum_i(tokens_i * sum over tokens of probs_i).

    That is coeff * E * sum_i f_i P_i. With counts and T summed over ranks and ``probs`` of one
    rank, the sum over ranks is the loss of all their tokens.

    Args:
        probs: [num_tokens, num_experts], scores over all experts, each row summing to 1.
        tokens_per_expert: [num_experts], no gradient.
        total_num_tokens: T, of the tokens that were counted, padding not among them.
        topk: Experts per token.
        num_experts: E.
        moe_aux_loss_coeff: The coefficient.
        fused: Changes nothing: no result depends on a kernel.
        padding_mask: [num_tokens], True for padding, whose probs do not count.

    Returns:
        Scalar; 0 for no tokens.

    Source: Fedus et al. 2021 (arXiv:2101.03961), eq. 4-6, with f counted over top-k.
    """
    if padding_mask is not None:
        probs = probs.masked_fill(padding_mask.reshape(-1, 1), 0.0)
    if isinstance(total_num_tokens, Tensor):
        total = total_num_tokens.to(probs.dtype).clamp(min=1.0)
    else:
        total = torch.full((), max(total_num_tokens, 1), dtype=probs.dtype, device=probs.device)
    share = tokens_per_expert.detach().to(probs.dtype) / (total * topk)
    return (share * probs.sum(dim=0)).sum() * (num_experts * moe_aux_loss_coeff) / total


def z_loss_func(logits: Tensor, z_loss_coeff: float, padding_mask: Tensor | None = None) -> Tensor:
    """Return coeff * mean over tokens of logsumexp(logits)^2; 0 for no tokens.

    Args:
        logits: [..., num_experts]; computed in fp32, or fp64 when they are.
        z_loss_coeff: The coefficient.
        padding_mask: Of the shape of the tokens, or flat; True for padding, which does not count.

    Source: Zoph et al. 2022 (arXiv:2202.08906), eq. 5.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    if padding_mask is None:
        return router_z_loss(flat) * z_loss_coeff
    padding = padding_mask.reshape(-1)
    # filled before the exponential, so that not even a NaN of padding reaches a gradient
    squares = flat.masked_fill(padding[:, None], 0.0).logsumexp(dim=1).square()
    valid = (~padding).sum().clamp(min=1)
    return squares.masked_fill(padding, 0.0).sum() * z_loss_coeff / valid


def compute_routing_scores_for_aux_loss(
    logits: Tensor,
    topk: int,
    score_function: ScoreFunction,
    fused: bool = False,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what a balance loss counts and weighs: without groups, bias or capacity.

    Args:
        logits: [num_tokens, num_experts].
        topk: Experts per token.
        score_function: softmax, sigmoid or sqrtsoftplus.
        fused: Changes nothing.
        padding_mask: [num_tokens], True for padding: no expert, and scores of 0.

    Returns:
        The bool map of the ``topk`` best experts, and the scores over all, summing to 1 in each
        row, in fp32 (fp64); both [num_tokens, num_experts].
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    padding = None if padding_mask is None else padding_mask.reshape(-1, 1)
    if padding is not None:
        logits = logits.masked_fill(padding, 0.0)
    routing_map = map_of_largest(logits, topk)
    scores = softmax_over_experts(log_scores(logits, score_function))
    if padding is not None:
        routing_map, scores = routing_map & ~padding, scores.masked_fill(padding, 0.0)
    return routing_map, scores


def get_tokens_per_expert_and_token_count(
    routing_map: Tensor,
    reduce_group: ProcessGroup | None,
    topk: int | None = None,
    with_padding_mask: bool = False,
) -> tuple[Tensor, int | Tensor, int | Tensor]:
    """Count the tokens of each expert over a group, and the tokens.

    Args:
        routing_map: [num_tokens, num_experts], bool; rows of padding hold nothing.
        reduce_group: Ranks to sum over, all of which call this; None for this rank alone.
        topk: Experts per token; needed with a padding mask.
        with_padding_mask: Count tokens by what they were routed to, for rows may be padding; the
            counts are then tensors.

    Returns:
        Tokens per expert over the group [num_experts] int64, tokens of this rank, and tokens of
        the group. Without a padding mask the ranks must hold equally many.
    """
    own = routing_map.sum(dim=0)
    total = own if reduce_group is None else all_reduce_sum(reduce_group, own)
    if with_padding_mask:
        assert topk is not None, "tokens are counted by what they were routed to: give topk"
        return total, own.sum() / topk, total.sum() / topk
    ranks = 1 if reduce_group is None else reduce_group.size()
    return total, routing_map.shape[0], routing_map.shape[0] * ranks


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Tie a scalar loss to a tensor; Megatron's form, whose scale is set for all at once.

    ``apply(output, aux_loss)`` uses the scale that ``set_loss_scale`` set last, as it is in
    backward; ``apply(output, aux_loss, scale)`` is
    ``load_balancing.MoEAuxLossAutoScaler``.
    """

    main_loss_backward_scale: ClassVar[float | Tensor] = 1.0

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, aux_loss: Tensor, scale: float | Tensor | None = None
    ) -> Tensor:
        """Return ``output`` as it is."""
        ctx.scale, ctx.dtype, ctx.device = scale, aux_loss.dtype, aux_loss.device
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Pass the gradient of ``output`` on, and the scale to ``aux_loss``."""
        scale = ctx.scale
        if scale is None:
            scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        return grad_output, torch.ones((), dtype=ctx.dtype, device=ctx.device) * scale, None

    @staticmethod
    def set_loss_scale(scale: float | Tensor) -> None:
        """Set the gradient with which all losses attached without a scale enter backward."""
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale
