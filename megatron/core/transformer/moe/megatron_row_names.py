"""Megatron's functions that bring rows to experts and back, by its names and signatures.

For users' scripts: ours call ``permutation.py``, which these stand on. Sums are taken in a fixed
order on every device, experts ascending.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe import permutation
from megatron.core.transformer.moe.permutation import ChunkOrder, RowPlan, plan_rows, reorder


class Permuted(NamedTuple):
    """What ``permute`` returns: Megatron's five."""

    permuted: Tensor
    """[num_rows, h], expert-major."""
    permuted_probs: Tensor | None
    """[num_rows]; None without probs."""
    sorted_indices: Tensor
    """[num_rows], int64: the token of each row."""
    pad_offsets: None
    """Of Megatron's padding kernel, which is not here."""
    tokens_per_expert: Tensor
    """[num_experts], int64, rows of each expert."""


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    tokens_per_expert: Tensor | None = None,
    align_size: int = 0,
) -> Permuted:
    """Copy each token to its rows: experts first, tokens in order within.

    Args:
        tokens: [num_tokens, h].
        routing_map: [num_tokens, num_experts], bool or 0 and 1.
        probs: [num_tokens, num_experts], to bring along.
        num_out_tokens: Rows, where the host knows them: a CUDA device is not waited for then. With
            ``drop_and_pad`` the capacity times num_experts.
        fused: Changes nothing: no result depends on a kernel.
        drop_and_pad: Each expert takes exactly the capacity: its first tokens, then, to fill it
            up, tokens that were not routed to it. A capacity above num_tokens is num_tokens.
        tokens_per_expert: Handed back as it is.
        align_size: Must be 0: rows are not padded here, see ``pad_routing_map``.

    Raises:
        ConfigError: ``align_size``, or ``drop_and_pad`` without ``num_out_tokens``.
    """
    if align_size:
        raise ConfigError(f"align_size {align_size} is not offered; pad_routing_map pads the map")
    routing_map = routing_map.bool()
    plan = (
        _plan_of_capacity(routing_map, num_out_tokens)
        if drop_and_pad
        else plan_rows(routing_map, num_rows=num_out_tokens)
    )
    if num_out_tokens not in (None, len(plan.token_of_row)) and not drop_and_pad:
        raise ConfigError(f"num_out_tokens {num_out_tokens}: there are {len(plan.token_of_row)}")
    if tokens_per_expert is None:
        tokens_per_expert = plan.routing_map.sum(dim=0)
    return Permuted(
        permutation.permute(tokens, plan),
        None if probs is None else permutation.permute_probs(probs, plan),
        plan.token_of_row,
        None,
        tokens_per_expert,
    )


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Sum the rows of each token, weighted by ``probs`` if given, in fp32 or wider.

    Args:
        permuted_tokens: [num_rows, h], in the order of ``permute``.
        sorted_indices: [num_rows], the token of each row.
        restore_shape: (num_tokens, h).
        probs: [num_tokens, num_experts], the weight of each pair.
        routing_map: [num_tokens, num_experts] that ``permute`` had; needed with ``probs``, unless
            ``drop_and_pad``.
        fused: Changes nothing.
        drop_and_pad: What ``permute`` had: each expert has equally many rows.
        pad_offsets: Must be None, as ``permute`` returned it.

    Returns:
        [num_tokens, h] in the dtype of ``permuted_tokens``; zeros for a token without rows.

    Raises:
        ConfigError: ``pad_offsets``, or ``probs`` without what says whose they are.
    """
    if pad_offsets is not None:
        raise ConfigError("pad_offsets is not offered: permute returns None")
    rows = permuted_tokens
    if probs is not None:
        expert_of_row = _expert_of_row(probs, sorted_indices, routing_map, drop_and_pad)
        pair = sorted_indices * probs.shape[1] + expert_of_row
        rows = rows * probs.reshape(-1).index_select(0, pair).unsqueeze(1)
    out: Tensor = _SumRows.apply(rows, sorted_indices, restore_shape[0], permuted_tokens.dtype)
    return out


def sort_chunks_by_idxs(
    input: Tensor,
    split_sizes: Tensor | Sequence[int],
    sorted_idxs: Tensor | Sequence[int],
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cut the rows into chunks and put these in another order, without waiting for the device.

    Args:
        input: [num_rows, h].
        split_sizes: Rows of each chunk; sums to num_rows.
        sorted_idxs: Chunk that comes first, second, ...; each of them once.
        probs: [num_rows], to be put in the same order.
        fused: Changes nothing.

    Returns:
        Rows and probs in the new order.
    """
    sizes = torch.as_tensor(split_sizes, device=input.device).long()
    idxs = torch.as_tensor(sorted_idxs, device=input.device).long()
    num_rows, moved = input.shape[0], sizes[idxs]
    shift = (sizes.cumsum(0) - sizes)[idxs] - (moved.cumsum(0) - moved)
    place = torch.arange(num_rows, device=input.device)
    index = place + shift.repeat_interleave(moved, output_size=num_rows)
    order = ChunkOrder(index, torch.empty_like(index).scatter_(0, index, place))
    return reorder(input, order), None if probs is None else reorder(probs, order)


def pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
    """Send further tokens, the first that are not, to each expert until its count is a multiple.

    Args:
        routing_map: [num_tokens, num_experts], bool or 0 and 1.
        pad_multiple: Such as 16.

    Returns:
        Of the shape and dtype of ``routing_map``. What is added has no prob, so weighs nothing.

    Raises:
        ConfigError: There are too few tokens to fill an expert up.
    """
    routed = routing_map.bool()
    num_tokens = routed.shape[0]
    counts = routed.sum(dim=0)
    missing = -counts % pad_multiple
    if num_tokens % pad_multiple and bool((counts + missing > num_tokens).any()):
        raise ConfigError(
            f"{num_tokens} tokens cannot fill every expert up to a multiple of {pad_multiple}"
        )
    spare = ~routed
    return (routed | (spare & (spare.cumsum(dim=0) <= missing))).to(routing_map.dtype)


def _plan_of_capacity(routing_map: Tensor, num_out_tokens: int | None) -> RowPlan:
    """Order the rows of experts that all take the same number of tokens."""
    if num_out_tokens is None:
        raise ConfigError("drop_and_pad needs num_out_tokens: capacity x experts")
    num_experts = routing_map.shape[1]
    capacity = num_out_tokens // num_experts  # above the number of tokens: all of them
    by_expert = routing_map.t().to(torch.uint8)
    token = by_expert.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    taken = torch.zeros_like(by_expert, dtype=torch.bool).scatter_(1, token, True)
    expert = torch.arange(num_experts, device=token.device).unsqueeze(1)
    return RowPlan(
        token_of_row=token.flatten(),
        pair_of_row=(token * num_experts + expert).flatten(),
        routing_map=taken.t().contiguous(),
        max_rows_per_token=num_experts,
    )


def _expert_of_row(
    probs: Tensor, sorted_indices: Tensor, routing_map: Tensor | None, drop_and_pad: bool
) -> Tensor:
    num_rows, num_experts = len(sorted_indices), probs.shape[1]
    experts = torch.arange(num_experts, device=sorted_indices.device)
    if drop_and_pad:
        return experts.repeat_interleave(num_rows // num_experts)
    if routing_map is None:
        raise ConfigError("unpermute with probs needs routing_map, or drop_and_pad")
    counts = routing_map.bool().sum(dim=0)
    return experts.repeat_interleave(counts, output_size=num_rows)


class _SumRows(torch.autograd.Function):
    """Sums without atomics: rows are brought together token by token, stably, and added up."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, token_of_row: Tensor, num_tokens: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(token_of_row)
        ctx.dtype = rows.dtype
        wide = torch.promote_types(rows.dtype, torch.float32)
        ones = torch.ones_like(token_of_row)
        lengths = ones.new_zeros(num_tokens).scatter_add_(0, token_of_row, ones)
        if num_tokens == 0 or len(token_of_row) == 0:
            return rows.new_zeros(num_tokens, *rows.shape[1:], dtype=dtype)
        together = rows.index_select(0, token_of_row.argsort(stable=True)).to(wide)
        summed = torch.segment_reduce(together, "sum", lengths=lengths, unsafe=True, initial=0)
        return summed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return grad.index_select(0, token_of_row).to(ctx.dtype), None, None, None
