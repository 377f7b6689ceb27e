"""Which positions of a sequence each context-parallel rank holds, and how the pieces go together.

A sequence is cut in 2 * ranks equal chunks; rank r holds chunk r and chunk 2 * ranks - 1 - r. So
causal attention, which looks at more keys the later a query is, costs every rank the same.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.mappings import all_gather_rows


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """Return the numbers of the two chunks that ``rank`` of ``ranks`` holds, ascending."""
    return rank, 2 * ranks - 1 - rank


def own_ranges(length: int, rank: int, ranks: int) -> tuple[range, ...]:
    """Return the positions of ``rank``, in the order in which it holds them.

    Args:
        length: Of the whole sequence, a multiple of 2 * ranks; any when there is one rank.
        rank: Of the context-parallel group.
        ranks: Of the group.
    """
    if ranks == 1:
        return (range(length),)
    assert length % (2 * ranks) == 0, f"{length=} is no multiple of 2 * {ranks=}"
    size = length // (2 * ranks)
    return tuple(range(c * size, (c + 1) * size) for c in chunks_of(rank, ranks))


def take_own(x: Tensor, rank: int, ranks: int, *, dim: int) -> Tensor:
    """Return the slice of ``x`` along ``dim``, the positions of a whole sequence, of ``rank``."""
    ranges = own_ranges(x.shape[dim], rank, ranks)
    if len(ranges) == 1:
        return x
    return torch.cat([x.narrow(dim, r.start, len(r)) for r in ranges], dim=dim)


def in_order(by_rank: Tensor) -> Tensor:
    """Put what each rank holds in the order of positions.

    Args:
        by_rank: [ranks, length / ranks, ...], each rank's positions as it holds them.

    Returns:
        [length, ...].
    """
    ranks, own = by_rank.shape[:2]
    if ranks == 1:
        return by_rank[0]
    first, second = by_rank.split(own // 2, dim=1)
    return torch.cat([first, second.flip(0)]).flatten(0, 1)


def by_owner(x: Tensor, ranks: int) -> Tensor:
    """Undo ``in_order``: [length, ...] -> [ranks, length / ranks, ...]."""
    if ranks == 1:
        return x.unsqueeze(0)
    first, second = x.unflatten(0, (2, ranks, -1))
    return torch.cat([first, second.flip(0)], dim=1)


def gather_sequence(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Return the whole sequence, in order, from the slices of all ranks.

    Its gradient is summed over the ranks, in rank order.

    Args:
        x: This rank's positions along ``dim``.
        group: Context-parallel ranks; with one ``x`` itself is returned.
        dim: Dimension of positions.
    """
    ranks = group.size()
    if ranks == 1:
        return x
    rows = x.movedim(dim, 0).contiguous()
    gathered = all_gather_rows(group, rows, [len(rows)] * ranks)
    return in_order(gathered.unflatten(0, (ranks, -1))).movedim(0, dim)
