"""Collectives of torch.distributed whose names differ between torch releases: one name here."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed all_gather_into_tensor and warns, on every rank, when the old name is called.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_single(output: Tensor, x: Tensor, *, group: ProcessGroup) -> None:
    """Fill ``output`` [ranks * n, ...] with the ``x`` [n, ...] of every rank, in rank order."""
    _all_gather(output, x, group=group)
