"""Causal attention over a sequence whose positions are spread over ranks, three ways.

Each gives what one process gives, dropped weights included. Shapes: s positions of this rank
(see ``slices``), total = s * ranks, n heads, g groups.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.sequence_slices import own_ranges
from megatron.core.tensor_parallel.mappings import RowSplits, all_to_all
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.context_parallel.ring import ring_attention
from megatron.core.transformer.context_parallel.slices import (
    by_owner,
    gather_sequence,
    in_order,
)

CommType = Literal["p2p", "all_gather", "a2a"]


class AttentionCore(Protocol):
    """Causal attention of consecutive queries on one rank."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        weighting: Weighting,
        *,
        offset: int = 0,
    ) -> Tensor:
        """Attend; see ``blocked_causal_attention``."""


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    weighting: Weighting,
    *,
    group: ProcessGroup,
    comm_type: CommType,
    core: AttentionCore,
) -> Tensor:
    """Attend: weights(q k) v over each position's past, or window, wherever that lies.

    Args:
        query: [b, n, s, d], of this rank's positions.
        key: [b, g, s, d], of the same.
        value: [b, g, s, dv], of the same.
        attention_mask: bool [b, 1, s, total], True where a query of this rank may *not* look at
            a position of the whole sequence, on top of causality.
        weighting: How scores become weights; a sink has the heads that are here.
        group: Context-parallel ranks.
        comm_type: ``all_gather``: every rank gets all keys and values. ``a2a``: every rank gets
            all positions of some heads (Jacobs et al. 2023, arXiv:2309.14509). ``p2p``: keys and
            values pass round in a ring (Liu et al. 2023, arXiv:2310.01889).
        core: Attention of one rank, for all but ``p2p``.

    Returns:
        [b, n, s, dv].
    """
    if comm_type == "p2p":
        return ring_attention(query, key, value, attention_mask, weighting, group)
    way: Callable[..., Tensor] = _by_gathering if comm_type == "all_gather" else _by_heads
    return way(query, key, value, attention_mask, weighting, group, core)


def _by_gathering(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    weighting: Weighting,
    group: ProcessGroup,
    core: AttentionCore,
) -> Tensor:
    key, value = _gathered([key, value], group)
    ranges = own_ranges(key.shape[2], group.rank(), group.size())
    size = len(ranges[0])
    outputs = []
    for number, positions in enumerate(ranges):
        own = slice(number * size, (number + 1) * size)
        hidden = None if attention_mask is None else attention_mask[:, :, own]
        got = core(query[:, :, own], key, value, hidden, weighting, offset=positions.start)
        outputs.append(got)
    return torch.cat(outputs, dim=2)


def _by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    weighting: Weighting,
    group: ProcessGroup,
    core: AttentionCore,
) -> Tensor:
    ranks, heads, groups = group.size(), query.shape[1], key.shape[1]
    assert heads % ranks == 0, f"{heads=} cannot be spread over {ranks=}"
    if groups % ranks:
        assert ranks % groups == 0, f"{groups=} cannot be spread over {ranks=}"
        key, value = (x.repeat_interleave(ranks // groups, dim=1) for x in (key, value))
    query, key, value = (_heads_of_all(x, group) for x in (query, key, value))
    if attention_mask is not None:
        attention_mask = gather_sequence(attention_mask, group, dim=2)
    first, count = group.rank() * (heads // ranks), heads // ranks
    if weighting.dropout is not None:
        dropout = weighting.dropout._replace(first_head=weighting.dropout.first_head + first)
        weighting = weighting._replace(dropout=dropout)
    if weighting.sink is not None:  # other heads get no gradient here: ranks' gradients are summed
        weighting = weighting._replace(sink=weighting.sink[first : first + count])
    return _positions_of_own(core(query, key, value, attention_mask, weighting), group)


def _gathered(tensors: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the whole sequence of several [b, g, s, any], in one exchange."""
    rows = torch.cat([x.movedim(2, 0).flatten(1) for x in tensors], dim=1)  # [s, b * g * all]
    sizes = [x[:, :, 0].numel() for x in tensors]
    parts = gather_sequence(rows, group, dim=0).split(sizes, dim=1)
    return [
        part.unflatten(1, (x.shape[0], x.shape[1], -1)).movedim(0, 2)
        for part, x in zip(parts, tensors, strict=True)
    ]


def _heads_of_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, n, s, d] of own positions and all heads -> [b, n / ranks, total, d]."""
    ranks = group.size()
    by_rank = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()  # [ranks, b, n/ranks, s, d]
    got = all_to_all(group, by_rank, _one_each(ranks))
    return in_order(got.movedim(3, 1)).movedim(0, 2)


def _positions_of_own(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, n / ranks, total, d] -> [b, n, s, d]."""
    ranks = group.size()
    by_rank = by_owner(x.movedim(2, 0), ranks).contiguous()  # [ranks, s, b, n/ranks, d]
    got = all_to_all(group, by_rank, _one_each(ranks))
    return got.movedim(1, 3).movedim(0, 1).flatten(1, 2)  # [b, ranks, n/ranks, s, d]


def _one_each(ranks: int) -> RowSplits:
    return RowSplits([1] * ranks, [1] * ranks)
