"""Which query groups a tensor-parallel rank attends with, also where several ranks share one.

The rows of linear_qkv come group by group (queries, key, value) and each rank holds an equal slice
of them, always. With more ranks than groups that slice is a piece of one group: ranks of a group
(mates) then exchange what they computed, so that each has its own heads and the whole key and
value. No weight is held twice, so nothing is to be reduced, counted or saved in another way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.mappings import RowSplits, all_to_all


class QueryGroups:
    """The groups of one rank, and the way to them from this rank's output of linear_qkv."""

    def __init__(
        self, group: ProcessGroup, *, num_groups: int, num_heads: int, head_dim: int
    ) -> None:
        """Plan the exchange.

        Args:
            group: Tensor-parallel ranks; their number divides ``num_groups`` or is a multiple.
            num_groups: Of all ranks.
            num_heads: Of all ranks; a multiple of the ranks and of ``num_groups``.
            head_dim: Rows of one head.
        """
        self.group, self.head_dim = group, head_dim
        ranks = group.size()
        mates = max(ranks // num_groups, 1)
        self.groups = num_groups * mates // ranks
        """Groups that this rank attends with."""
        self.slots = num_heads // ranks // self.groups + 2
        """Heads of each of them that are this rank's, its key and its value."""
        self._exchange = None
        if mates > 1:
            heads = num_heads // num_groups
            self._exchange = plan_exchange(heads, head_dim, mates, group.rank(), ranks)

    def attended(self, mixed: Tensor) -> Tensor:
        """Return the queries, keys and values of this rank: [s, b, groups, slots, d].

        Args:
            mixed: [s, b, rows], this rank's slice of the output of linear_qkv.
        """
        if self._exchange is not None:
            rows: Tensor = _Copies.apply(mixed.movedim(-1, 0), self._exchange.blocks)
            mixed = all_to_all(self.group, rows, self._exchange.splits).movedim(0, -1)
        return mixed.unflatten(-1, (self.groups, self.slots, self.head_dim))


class GroupExchange(NamedTuple):
    """What one rank sends to its mates, itself among them."""

    blocks: list[tuple[int, int]]
    """Start and end of rows of this rank's slice, in the order in which they are sent."""
    splits: RowSplits
    """Rows to and from each rank of the tensor-parallel group; 0 for those of other groups."""


def plan_exchange(heads: int, head_dim: int, mates: int, rank: int, ranks: int) -> GroupExchange:
    """Plan what ``rank`` of ``ranks`` sends and gets, where ``mates`` share each group.

    What a rank gets, put together in the order of senders, is its heads, the key, the value.

    Args:
        heads: Of a group; a multiple of ``mates``.
        head_dim: Rows of a head; (heads + 2) * head_dim is a multiple of ``mates``.
        mates: Neighbours that share a group.
        rank: Which rank this is.
        ranks: Of all groups.
    """
    size, own = (heads + 2) * head_dim // mates, rank % mates
    first = rank - own
    blocks = []
    send, recv = [0] * ranks, [0] * ranks
    for mate in range(mates):
        mine = _overlaps(_wanted(heads, head_dim, mates, mate), own * size, (own + 1) * size)
        blocks += [(start - own * size, end - own * size) for start, end in mine]
        send[first + mate] = sum(end - start for start, end in mine)
        theirs = _overlaps(_wanted(heads, head_dim, mates, own), mate * size, (mate + 1) * size)
        recv[first + mate] = sum(end - start for start, end in theirs)
    return GroupExchange(blocks, RowSplits(send, recv))


def _wanted(heads: int, head_dim: int, mates: int, mate: int) -> list[tuple[int, int]]:
    """Return the rows of a group that ``mate`` attends with: its heads, then key and value."""
    share = heads // mates * head_dim
    return [(mate * share, (mate + 1) * share), (heads * head_dim, (heads + 2) * head_dim)]


def _overlaps(ranges: Sequence[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """Return the parts of ``ranges`` that lie in [low, high)."""
    cut = [(max(start, low), min(end, high)) for start, end in ranges]
    return [(start, end) for start, end in cut if start < end]


class _Copies(torch.autograd.Function):
    """Rows of ``x``, some several times; the gradients of all copies are summed in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
        ctx.blocks, ctx.shape = blocks, x.shape
        return torch.cat([x[start:end] for start, end in blocks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)  # bf16 adds up in fp32
        total = grad.new_zeros(ctx.shape, dtype=wide)
        sizes = [end - start for start, end in ctx.blocks]
        for (start, end), part in zip(ctx.blocks, grad.split(sizes), strict=True):
            total[start:end] += part
        return total.to(grad.dtype), None
