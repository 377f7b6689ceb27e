"""Which positions of a sequence each context-parallel rank holds.

A sequence is cut in 2 * ranks equal chunks; rank r holds chunk r and chunk 2 * ranks - 1 - r. So
causal attention, which looks at more keys the later a query is, costs every rank the same.

Source: Brandon et al. 2023 (arXiv:2311.09431), with whole chunks in place of single positions.
"""

import torch
from torch import Tensor


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
