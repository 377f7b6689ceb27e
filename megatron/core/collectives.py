"""Collectives of torch.distributed whose names differ between torch releases: one name here.

Over gloo two of them go another way: torch's own pass through fresh copies of everything, which at
16 MiB takes 5 to 10 times as long (docs/log.md). Which way is decided by the group and by sizes,
which all ranks share, and by a rule on addresses, which all ranks keep.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

# torch 2.13 renamed all_gather_into_tensor and warns, on every rank, when the old name is called.
_torch_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_torch_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# As they are: whoever watches or replaces those of dist sees one collective, not its steps.
_broadcast, _all_reduce = dist.broadcast, dist.all_reduce
_LEAST_BYTES = 1 << 16
"""Of one rank: below, a broadcast from each costs more calls than it saves."""


class _Together:
    """Several works in flight, as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> bool:
        """Return when all are done."""
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        """Say whether all are done."""
        return all(work.is_completed() for work in self._works)


def _all_gather(
    output: Tensor, x: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """See ``torch.distributed.all_gather_into_tensor``."""
    if not _is_large_over_gloo(x, output, group):
        return _torch_all_gather(output, x, group=group, async_op=async_op)
    parts = output.view(-1).view(torch.uint8).view(dist.get_world_size(group), -1)
    mine = parts[dist.get_rank(group)]
    if mine.data_ptr() != x.data_ptr():
        mine.copy_(x.view(-1).view(torch.uint8))
    works = [
        _broadcast(part, group_src=place, group=group, async_op=True)
        for place, part in enumerate(parts)
    ]
    return _started(works, async_op)


def _reduce_scatter(
    own: Tensor, whole: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """See ``torch.distributed.reduce_scatter_tensor``; the sum.

    Where ``own`` is this rank's part of ``whole``, all ranks' parts may be summed in place: gloo
    sums everything anyway, in a copy, so nothing more is sent and the bits are the same.
    """
    place = dist.get_rank(group) * own.numel() * own.element_size()
    is_inside = own.data_ptr() == whole.data_ptr() + place
    if not (is_inside and _is_large_over_gloo(own, whole, group)):
        return _torch_reduce_scatter(own, whole, group=group, async_op=async_op)
    return _started([_all_reduce(whole, group=group, async_op=True)], async_op)


def _is_large_over_gloo(own: Tensor, whole: Tensor, group: ProcessGroup | None) -> bool:
    is_large = own.numel() * own.element_size() >= _LEAST_BYTES
    is_flat = own.is_contiguous() and whole.is_contiguous()
    return is_large and is_flat and dist.get_backend(group) == "gloo"


def _started(works: Sequence[Any], async_op: bool) -> Any:
    together = _Together(works)
    if async_op:
        return together
    together.wait()
    return None


def all_gather_single(output: Tensor, x: Tensor, *, group: ProcessGroup) -> None:
    """Fill ``output`` [ranks * n, ...] with the ``x`` [n, ...] of every rank, in rank order."""
    _all_gather(output, x, group=group)


def start_all_gather(whole: Tensor, own: Tensor, *, group: ProcessGroup) -> Work:
    """Start to fill ``whole`` with all ranks' parts; ``own`` may be this rank's part of it."""
    work: Work = _all_gather(whole, own, group=group, async_op=True)
    return work


def start_reduce_scatter(own: Tensor, whole: Tensor, *, group: ProcessGroup) -> Work:
    """Start to sum ``whole`` over the ranks, of which each gets the part of its place in ``own``.

    ``own`` may be this rank's part of ``whole``; the other parts are undefined afterwards. Every
    rank does alike.
    """
    work: Work = _reduce_scatter(own, whole, group=group, async_op=True)
    return work
