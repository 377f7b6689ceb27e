"""Collectives of torch.distributed whose names differ between torch releases: one name here."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

# torch 2.13 renamed all_gather_into_tensor and warns, on every rank, when the old name is called.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_single(output: Tensor, x: Tensor, *, group: ProcessGroup) -> None:
    """Fill ``output`` [ranks * n, ...] with the ``x`` [n, ...] of every rank, in rank order."""
    _all_gather(output, x, group=group)


def start_all_gather(whole: Tensor, own: Tensor, *, group: ProcessGroup) -> Work:
    """Start to fill ``whole`` with all ranks' parts; ``own`` may be this rank's part of it."""
    work: Work = _all_gather(whole, own, group=group, async_op=True)
    return work


def start_reduce_scatter(own: Tensor, whole: Tensor, *, group: ProcessGroup) -> Work:
    """Start to sum ``whole`` over the ranks, of which each gets the part of its place in ``own``.

    ``own`` may be this rank's part of ``whole``; the other parts are undefined afterwards.
    """
    work: Work = _reduce_scatter(own, whole, group=group, async_op=True)
    return work
