"""Rows by expert and back: pure tensor functions, no module and no group.

Rows are expert-major, and in the order of their tokens within an expert; every function keeps
that order, so that a weight gradient adds up the same tokens in the same order in any layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowMover(NamedTuple):
    """A way to copy and to sum rows; without autograd."""

    gather: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """(rows [n, h], index [m], dtype) -> [m, h]: row ``index[i]`` at place i."""
    add_up: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """(rows [n, h], slots [k, m], dtype) -> [m, h]: sums in fp32 or wider, slots ascending; a slot
    of n stands for no row."""


def gather_in_torch(rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``RowMover.gather``."""
    return rows.to(dtype).index_select(0, index)


def add_up_in_torch(rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``RowMover.add_up``."""
    return _sum_slots(rows, slots, dtype)


IN_TORCH = RowMover(gather_in_torch, add_up_in_torch)


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Where each row of the permuted order comes from."""

    token_of_row: Tensor
    """[num_rows], int64."""
    pair_of_row: Tensor
    """[num_rows], int64: index into the flattened [num_tokens, num_experts]."""
    routing_map: Tensor
    """[num_tokens, num_experts], bool."""
    max_rows_per_token: int
    """No token has more rows than this."""
    mover: RowMover = field(default=IN_TORCH, compare=False)
    """What copies and sums the rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the rows come from."""
        return self.routing_map.shape[0]

    @cached_property
    def slots(self) -> Tensor:
        """[max_rows_per_token, num_tokens]: rows of each token; num_rows where it has fewer."""
        num_rows = self.token_of_row.shape[0]
        ordinal = self.routing_map.cumsum(dim=1).view(-1).index_select(0, self.pair_of_row) - 1
        place = ordinal * self.num_tokens + self.token_of_row
        slots = place.new_full((self.max_rows_per_token * self.num_tokens,), num_rows)
        slots[place] = torch.arange(num_rows, device=place.device)
        return slots.view(self.max_rows_per_token, self.num_tokens)


def plan_rows(
    routing_map: Tensor,
    *,
    num_rows: int | None = None,
    max_rows_per_token: int | None = None,
    mover: RowMover = IN_TORCH,
) -> RowPlan:
    """Order the (token, expert) pairs of ``routing_map``: experts first, tokens within.

    Args:
        routing_map: [num_tokens, num_experts], bool.
        num_rows: Number of True entries where the host knows it; otherwise a CUDA device is
            waited for.
        max_rows_per_token: Upper bound; num_experts when None.
        mover: What copies and sums the rows.
    """
    num_experts = routing_map.shape[1]
    by_expert = routing_map.t().contiguous()
    if num_rows is None or by_expert.device.type == "cpu":
        expert_of_row, token_of_row = by_expert.nonzero(as_tuple=True)
    else:
        expert_of_row, token_of_row = torch.nonzero_static(by_expert, size=num_rows).unbind(1)
    return RowPlan(
        token_of_row=token_of_row,
        pair_of_row=token_of_row * num_experts + expert_of_row,
        routing_map=routing_map,
        max_rows_per_token=num_experts if max_rows_per_token is None else max_rows_per_token,
        mover=mover,
    )


def permute(tokens: Tensor, plan: RowPlan) -> Tensor:
    """Copy each token to its rows: [num_tokens, h] -> [num_rows, h]."""
    rows: Tensor = _Permute.apply(tokens, plan)
    return rows


def permute_probs(probs: Tensor, plan: RowPlan) -> Tensor:
    """Pick the weight of each row: [num_tokens, num_experts] -> [num_rows]."""
    return probs.reshape(-1).index_select(0, plan.pair_of_row)


def unpermute(rows: Tensor, plan: RowPlan, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum the rows of each token, experts ascending: [num_rows, h] -> [num_tokens, h].

    Summed in fp32 or wider, in a fixed order on every device. A token without rows gives zeros.

    Args:
        rows: Rows in the order of ``plan``.
        plan: The plan that ``permute`` had.
        dtype: Of the result; that of ``rows`` when None.
    """
    out: Tensor = _Unpermute.apply(rows, plan, dtype or rows.dtype)
    return out


class ChunkOrder(NamedTuple):
    """A permutation of rows that keeps chunks together."""

    old_place: Tensor
    """[num_rows], where each row of the new order was."""
    new_place: Tensor
    """[num_rows], where each row of the old order went."""


def rank_major_to_expert_major(counts: Tensor, num_rows: int) -> ChunkOrder | None:
    """Order rows that came source by source so that they lie expert by expert.

    Within an expert the sources ascend, and each keeps its own order.

    Args:
        counts: [sources, experts], int64, rows in each chunk of the arrival order. With more axes
            the order of all of them is turned around: [slices, sources, experts] gives
            expert-major rows, by source within an expert, by slice within a source.
        num_rows: Sum of ``counts``, known to the host.

    Returns:
        The order, or None where the rows lie right already.
    """
    if sum(extent != 1 for extent in counts.shape) < 2:
        return None
    turned = tuple(reversed(range(counts.dim())))
    old_start = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).permute(turned)
    old_start, sizes = old_start.flatten(), counts.permute(turned).flatten()
    shift = old_start - (sizes.cumsum(0) - sizes)  # of each chunk, in the new order
    place = torch.arange(num_rows, device=counts.device)
    index = place + shift.repeat_interleave(sizes, output_size=num_rows)
    return ChunkOrder(index, torch.empty_like(index).scatter_(0, index, place))


def reorder(rows: Tensor, order: ChunkOrder | None, *, back: bool = False) -> Tensor:
    """Apply ``order`` to ``rows`` [num_rows, ...], or undo it; None changes nothing."""
    if order is None:
        return rows
    there, home = (order.new_place, order.old_place) if back else order
    out: Tensor = _Reorder.apply(rows, there, home)
    return out


class _Permute(torch.autograd.Function):
    """Keeps tensors by autograd's own means, so that they are not kept where recomputed."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: RowPlan) -> Tensor:
        slots = None if _adds_in_order(tokens, plan, tokens.dtype) else plan.slots
        ctx.save_for_backward(plan.token_of_row, slots)
        ctx.num_tokens, ctx.mover = plan.num_tokens, plan.mover
        return plan.mover.gather(tokens, plan.token_of_row, tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        token_of_row, slots = ctx.saved_tensors
        if slots is None:
            return _add_in_order(grad, token_of_row, ctx.num_tokens), None
        return ctx.mover.add_up(grad, slots, grad.dtype), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
        # Kept by itself: saved, it would make a recomputation bring the rows home once more.
        ctx.token_of_row, ctx.dtype, ctx.mover = plan.token_of_row, rows.dtype, plan.mover
        if _adds_in_order(rows, plan, dtype):
            return _add_in_order(rows, plan.token_of_row, plan.num_tokens)
        return plan.mover.add_up(rows, plan.slots, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.mover.gather(grad, ctx.token_of_row, ctx.dtype), None, None


class _Reorder(torch.autograd.Function):
    """A gather both ways; index_select's own backward would add into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _adds_in_order(rows: Tensor, plan: RowPlan, dtype: torch.dtype) -> bool:
    """Whether rows may be added where they lie; CUDA adds atomically, in any order."""
    few = plan.max_rows_per_token <= 2  # one addition rounds once, whatever it is done in
    wide = rows.dtype in (torch.float32, torch.float64)
    return rows.device.type == "cpu" and rows.dtype == dtype and (few or wide)


def _add_in_order(rows: Tensor, token_of_row: Tensor, num_tokens: int) -> Tensor:
    """Sum the rows of each token, in the order of the experts."""
    return rows.new_zeros(num_tokens, *rows.shape[1:]).index_add_(0, token_of_row, rows)


_CPU_TOKENS = 128
"""Whose rows are summed at a time, in the cache of a CPU."""


def _sum_slots(rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each token in fp32 or wider, in the order of the experts."""
    num_rows, num_tokens = rows.shape[0], slots.shape[1]
    shape = (num_tokens, *rows.shape[1:])
    if num_rows == 0:
        return rows.new_zeros(shape, dtype=dtype)
    out = rows.new_empty(shape, dtype=dtype)
    wide = torch.promote_types(rows.dtype, torch.float32)
    full = num_rows == slots.numel()
    # On a CPU the sums of some tokens at a time, which stay in the cache.
    step = _CPU_TOKENS if rows.device.type == "cpu" else max(num_tokens, 1)
    for start in range(0, num_tokens, step):
        some = slots[:, start : start + step]
        total = rows.new_zeros((some.shape[1], *shape[1:]), dtype=wide)
        for row_of_token in some:
            picked = rows.index_select(0, row_of_token.clamp(max=num_rows - 1))
            if not full:
                picked.masked_fill_((row_of_token == num_rows).unsqueeze(1), 0.0)
            total.add_(picked)
        out[start : start + step] = total
    return out
