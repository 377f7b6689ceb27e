"""Collectives with a gradient. A group of one rank is an identity, and only this file knows it.

Rows are dim 0; sizes and splits are host integers, one for each rank of the group. Every rank of a
group must make the same calls in the same order, also with zero rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_single
from megatron.core.tensor_parallel.flight import all_to_all_during


class RowSplits(NamedTuple):
    """How many rows go to, and come from, each rank of a group."""

    send: list[int]
    """Rows for rank 0, 1, ... of the group."""
    recv: list[int]
    """Rows from rank 0, 1, ... of the group."""

    def reversed(self) -> "RowSplits":
        """Return the splits of the way back."""
        return RowSplits(send=self.recv, recv=self.send)


def all_to_all(
    group: ProcessGroup,
    x: Tensor,
    splits: RowSplits,
    *,
    during: Callable[[], None] | None = None,
) -> Tensor:
    """Send blocks of rows to the ranks of ``group``; the gradient takes the way back.

    Args:
        group: In a group of one rank ``x`` itself is returned.
        x: [sum(splits.send), ...], the rows for rank 0 first.
        splits: Rows to and from each rank; ignored in a group of one.
        during: Called once while the rows are under way, and must not change ``x``. What it
            computes is differentiated while the gradient is under way, too.

    Returns:
        [sum(splits.recv), ...], the rows of rank 0 first.
    """
    if group.size() == 1:
        if during is not None:
            during()
        return x
    if during is not None:
        return all_to_all_during(group, x, splits, during)
    out: Tensor = _AllToAll.apply(group, x, splits)
    return out


def all_gather_rows(group: ProcessGroup, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate the rows of all ranks; the gradient is summed back by ``reduce_scatter_rows``.

    Args:
        group: In a group of one rank ``x`` itself is returned.
        x: [sizes[own rank], ...].
        sizes: Rows of each rank, known to all of them.

    Returns:
        [sum(sizes), ...], the same on every rank.
    """
    if group.size() == 1:
        return x
    out: Tensor = _AllGatherRows.apply(group, x, tuple(sizes))
    return out


def reduce_scatter_rows(group: ProcessGroup, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum ``x`` over the ranks and keep own rows; the gradient is gathered back.

    The sum is taken in rank order on the rank that keeps it, so it repeats bit for bit.

    Args:
        group: In a group of one rank ``x`` itself is returned.
        x: [sum(sizes), ...].
        sizes: Rows that each rank keeps, known to all of them.

    Returns:
        [sizes[own rank], ...].
    """
    if group.size() == 1:
        return x
    out: Tensor = _ReduceScatterRows.apply(group, x, tuple(sizes))
    return out


def all_reduce_sum(group: ProcessGroup, x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the ranks of ``group``; no gradient, ``x`` is left alone."""
    if group.size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def largest_over_ranks(group: ProcessGroup, number: int, device: torch.device) -> int:
    """Return the largest ``number`` of all ranks; one all-reduce, none in a group of one."""
    if group.size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)


class CountExchange(NamedTuple):
    """What all ranks of a group are about to send this one."""

    received: Tensor
    """[ranks, num_local], int64: rows for each local expert from each rank."""
    splits: RowSplits
    """Sums of the counts for ``all_to_all``; empty lists in a group of one, which needs none."""


def exchange_counts(
    group: ProcessGroup, counts: Tensor, *, each: int | None = None
) -> CountExchange:
    """Tell each rank how many rows it gets: one all-to-all and one device-to-host copy.

    In a group of one rank there is neither, nor where ``each`` says it all.

    Args:
        group: Rank r owns the r-th of ``group.size()`` equal blocks of experts.
        counts: [num_experts], int64, rows that this rank has for each expert.
        each: What all counts of all ranks are, where all of them know it. ``splits`` are then
            filled in also in a group of one.
    """
    ranks = group.size()
    if each is not None:
        rows = [each * (counts.shape[0] // ranks)] * ranks
        return CountExchange(torch.full_like(counts, each).view(ranks, -1), RowSplits(rows, rows))
    if ranks == 1:
        return CountExchange(counts.view(1, -1), RowSplits([], []))
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    both = torch.stack([counts, received]).view(2, ranks, -1).sum(dim=2)
    send, recv = both.tolist()
    return CountExchange(received.view(ranks, -1), RowSplits(send, recv))


class RowsAndPairs(NamedTuple):
    """What all ranks of a group are about to send this one, a row for each token."""

    splits: RowSplits
    """Rows to and from each rank; empty lists in a group of one, which needs none."""
    pairs: int | None
    """(row, local expert) pairs that this rank will get; None in a group of one, which asks
    nobody."""


def exchange_rows_and_pairs(group: ProcessGroup, rows: Tensor, pairs: Tensor) -> RowsAndPairs:
    """Tell each rank how many rows and pairs it gets: one all-to-all, one device-to-host copy.

    In a group of one rank there is neither.

    Args:
        group: Of the ranks.
        rows: [ranks], int64, rows that this rank has for each rank.
        pairs: [ranks], int64, (row, expert) pairs in those rows.
    """
    if group.size() == 1:
        return RowsAndPairs(RowSplits([], []), None)
    counts = torch.stack([rows, pairs], dim=1).flatten()
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    send, _, recv, got = torch.cat([counts.view(-1, 2).t(), received.view(-1, 2).t()]).tolist()
    return RowsAndPairs(RowSplits(send, recv), sum(got))


class HopCounts(NamedTuple):
    """What goes through each hop of a two-hop exchange; splits are empty in a group of one."""

    sent: Tensor
    """[nodes, places], int64: rows of this rank for each rank."""
    passed: Tensor
    """[places, nodes], int64: rows that this rank gets from each place and hands on to a node."""
    received: Tensor
    """[nodes * places, num_local], int64: rows for each local expert from each rank."""
    within: RowSplits
    """Of the first hop, over the places of a node."""
    across: RowSplits
    """Of the second hop, over the nodes."""


def exchange_counts_in_hops(
    node_group: ProcessGroup,
    across_group: ProcessGroup,
    counts: Tensor,
    *,
    each: int | None = None,
) -> HopCounts:
    """Do ``exchange_counts`` in two hops: two small all-to-alls, one device-to-host copy.

    A hop over a group of one rank is none; with two such groups there is no copy either.

    Args:
        node_group: Ranks of this node; its rank is the place.
        across_group: Ranks at this place of all nodes.
        counts: [num_experts], int64, in the order of nodes, then of places.
        each: See ``exchange_counts``.
    """
    places, nodes = node_group.size(), across_group.size()
    table = counts.view(nodes, places, -1)
    if each is not None:
        handed = torch.full_like(table.transpose(0, 1), each)
        block = each * table.shape[2]
        return HopCounts(
            sent=torch.full_like(table[..., 0], block),
            passed=torch.full_like(handed[..., 0], block),
            received=torch.full_like(table, each).flatten(0, 1),
            within=RowSplits([block * nodes] * places, [block * nodes] * places),
            across=RowSplits([block * places] * nodes, [block * places] * nodes),
        )
    handed = _swap_counts(node_group, table.transpose(0, 1))  # [places, nodes, num_local]
    received = _swap_counts(across_group, handed.transpose(0, 1))  # [nodes, places, num_local]
    sent, passed = table.sum(dim=2), handed.sum(dim=2)
    within = across = RowSplits([], [])
    if places * nodes > 1:
        ends = [sent.sum(0), passed.sum(1), passed.sum(0), received.sum((1, 2))]
        host = torch.cat(ends).tolist()
        first, second = host[: 2 * places], host[2 * places :]
        within = RowSplits(first[:places], first[places:])
        across = RowSplits(second[:nodes], second[nodes:])
    return HopCounts(sent, passed, received.flatten(0, 1), within, across)


class GatheredSizes(NamedTuple):
    """Rows that each rank of a group brings to an all-gather."""

    sizes: list[int]
    """[ranks], rows of each rank."""
    wanted: int | None
    """How many (row, local expert) pairs belong to this rank; None in a group of one, which
    asks nobody."""


def gather_sizes(
    group: ProcessGroup, num_rows: int, counts: Tensor, *, each: int | None = None
) -> GatheredSizes:
    """Learn the rows of all ranks: one all-gather and one device-to-host copy.

    In a group of one rank there is neither, nor where ``each`` says it all.

    Args:
        group: Rank r owns the r-th of ``group.size()`` equal blocks of experts.
        num_rows: Rows of this rank.
        counts: [num_experts], int64, (row, expert) pairs of this rank for each expert.
        each: What all counts of all ranks are, where all of them know it, and that all have
            ``num_rows``.
    """
    ranks = group.size()
    if each is not None:
        return GatheredSizes([num_rows] * ranks, each * counts.shape[0])
    if ranks == 1:
        return GatheredSizes([num_rows], None)
    own = torch.cat([counts.view(ranks, -1).sum(dim=1), counts.new_full((1,), num_rows)])
    table = counts.new_empty(ranks * (ranks + 1))
    all_gather_single(table, own, group=group)
    host = table.view(ranks, ranks + 1).tolist()
    return GatheredSizes([row[-1] for row in host], sum(row[group.rank()] for row in host))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, splits: RowSplits) -> Tensor:
        ctx.group, ctx.splits = group, splits
        return _exchange(group, x, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _exchange(ctx.group, grad, ctx.splits.reversed()), None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _gather(group, x, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _sum_own_rows(ctx.group, grad, ctx.sizes), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return _sum_own_rows(group, x, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _gather(ctx.group, grad, ctx.sizes), None


def _swap_counts(group: ProcessGroup, counts: Tensor) -> Tensor:
    """Send ``counts[i]`` to rank i: [ranks, ...], without a gradient."""
    if group.size() == 1:
        return counts
    received = torch.empty_like(counts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received.view(-1), counts.flatten(), group=group)
    return received


def _exchange(group: ProcessGroup, x: Tensor, splits: RowSplits) -> Tensor:
    out = x.new_empty(sum(splits.recv), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), splits.recv, splits.send, group=group)
    return out


def _gather(group: ProcessGroup, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    if len(set(sizes)) > 1:  # gloo gathers equal sizes only
        copies = torch.cat([x] * len(sizes))
        return _exchange(group, copies, RowSplits([x.shape[0]] * len(sizes), list(sizes)))
    out = x.new_empty(sum(sizes), *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=group)
    return out


def _sum_own_rows(group: ProcessGroup, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    own = sizes[group.rank()]
    parts = _exchange(group, x, RowSplits(list(sizes), [own] * len(sizes)))
    return parts.view(len(sizes), own, *x.shape[1:]).sum(dim=0)  # narrow dtypes add up in fp32
