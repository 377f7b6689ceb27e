"""How the slices of a sequence that ranks hold go together; see ``sequence_slices``."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.mappings import all_gather_rows


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
