"""The global norm of the gradient, and what gradients are divided by to clip it.

The norm is one number, bit-identical on all ranks: every parameter counts once, an expert on the
ranks that hold it, a replica never. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_single
from megatron.core.distributed.bucket_layout import BUFFER_ALIGNMENT

_CLIP_EPS = 1e-6


def global_grad_norm(
    dense: Sequence[Tensor], expert: Sequence[Tensor], *, ep_group: ProcessGroup
) -> Tensor:
    """Return the L2 norm over all parameters of the model, an fp64 scalar on their device.

    Args:
        dense: Flat gradients that all ranks of ``ep_group`` hold alike; padding is zero.
        expert: Flat gradients of this rank's experts.
        ep_group: Ranks that together hold every expert once.
    """
    device = (*dense, *expert)[0].device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    own = sum((_sum_of_squares(flat) for flat in expert), zero)
    # Gathered and added in rank order: the result of a reduction may differ in its last bit
    # between groups, and replicas that clip differently drift apart.
    if ep_group.size() > 1:
        parts = torch.empty(ep_group.size(), dtype=torch.float64, device=device)
        all_gather_single(parts, own.reshape(1), group=ep_group)
        own = parts.sum()
    return sum((_sum_of_squares(flat) for flat in dense), own).sqrt()


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what to divide gradients by so that their norm is at most ``max_norm``; >= 1.

    Source: Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1.
    """
    return ((norm + _CLIP_EPS) / max_norm).clamp(min=1.0)


def _sum_of_squares(flat: Tensor) -> Tensor:
    # One fp32 sum over 30 million elements is off by 1.7e-3 on CPU; sums of short rows, added
    # in fp64, are off by 4e-10 and cost the same.
    rows = flat.view(-1, BUFFER_ALIGNMENT)
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum()
