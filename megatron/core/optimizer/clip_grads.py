"""The global norm of the gradient, and what gradients are divided by to clip it.

The norm is one number, bit-identical on all ranks: every element counts once, a slice of an expert
on the rank that holds it, a replica never. Nothing here waits for the device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_single
from megatron.core.cpu_kernels.flat_buffers import flat_kernels
from megatron.core.distributed.bucket_layout import BUFFER_ALIGNMENT, BufferKey
from megatron.core.process_groups_config import ProcessGroupCollection

_CLIP_EPS = 1e-6


class SpreadGradients(NamedTuple):
    """Flat gradients whose elements lie on the ranks of a group, each on one of them."""

    group: ProcessGroup
    flats: Sequence[Tensor]
    """Those that this rank counts; padding is zero. Or their sums of squares, [] fp64 each."""


def owned_gradients(
    gradients: Iterable[tuple[BufferKey, Tensor]], pg_collection: ProcessGroupCollection
) -> list[SpreadGradients]:
    """Share out the gradients of a model so that every element is counted once.

    A copy on several tensor-parallel ranks is counted by the first of them, and one on both ends
    of the pipeline by the first stage.

    Args:
        gradients: What each flat gradient holds, and the flat gradient of this rank.
        pg_collection: Of this rank.
    """
    groups = pg_collection
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for key, flat in gradients:
        sharing = groups.expt_tp if key.is_expert else groups.tp
        is_copy = key.tied_ends == "apart" and groups.pp.rank() > 0
        if (key.split_over is not None or sharing.rank() == 0) and not is_copy:
            found[key.is_expert].append(flat)
    # tp_ep_pp: the ranks that together hold every slice of every expert once
    experts, dense = found[True], found[False]
    return [SpreadGradients(groups.tp_ep_pp, experts), SpreadGradients(groups.mp, dense)]


def global_grad_norm(
    gradients: Sequence[SpreadGradients],
    device: torch.device,
    *,
    squares: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the L2 norm over all parameters of the model, an fp64 scalar on ``device``.

    Args:
        gradients: All gradients; every rank takes part.
        device: Where they are.
        squares: What makes a ``flats`` of ``gradients`` a sum of squares; by default they are
            gradients.
    """
    sum_up = squares or sum_of_squares
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group, flats in gradients:
        own = sum((sum_up(flat) for flat in flats), torch.zeros_like(total))
        # Gathered and added in rank order: the result of a reduction may differ in its last bit
        # between groups, and replicas that clip differently drift apart.
        total = total + sum_over_ranks(own, group)
    return total.sqrt()


def sum_over_ranks(own: Tensor, group: ProcessGroup) -> Tensor:
    """Add up a [] fp64 of every rank of ``group`` in rank order: the same bits on all of them."""
    if group.size() == 1:
        return own
    parts = torch.empty(group.size(), dtype=torch.float64, device=own.device)
    all_gather_single(parts, own.reshape(1), group=group)
    return parts.sum()


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what to divide gradients by so that their norm is at most ``max_norm``; >= 1.

    Source: Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1.
    """
    return ((norm + _CLIP_EPS) / max_norm).clamp(min=1.0)


def sum_of_squares(flat: Tensor) -> Tensor:
    """Return the [] fp64 sum of squares of whole rows of a buffer."""
    kernels = flat_kernels(flat)
    if kernels is not None:
        return torch.tensor(kernels.sum_of_squares(flat), dtype=torch.float64)
    # One fp32 sum over 30 million elements is off by 1.7e-3 on CPU; sums of short rows, added
    # in fp64, are off by 4e-10 and cost the same.
    rows = flat.view(-1, BUFFER_ALIGNMENT)
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum()
