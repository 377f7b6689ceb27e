"""Where activations leave what tensor-parallel ranks compute in slices; see region_entry too.

Outside, they are replicated on the ranks of the group, or with sequence parallelism each rank has
an equal share of the sequence, dim 0. A group of one rank is an identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.mappings import all_gather_rows, reduce_scatter_rows


def leave_region(group: ProcessGroup, x: Tensor, *, sequence_parallel: bool) -> Tensor:
    """Sum the parts ``x`` [s, ...] of all ranks: the mirror image of ``RegionEntry``.

    With sequence parallelism each rank keeps its share of the sum, [s / ranks, ...].
    """
    if sequence_parallel:
        return reduce_scatter_rows(group, x, [x.shape[0] // group.size()] * group.size())
    return reduce_from_region(group, x)


def share_sequence(group: ProcessGroup, x: Tensor, *, sequence_parallel: bool) -> Tensor:
    """Keep this rank's share of ``x`` [s, ...], which all ranks have; gradients are gathered."""
    if group.size() == 1 or not sequence_parallel:
        return x
    out: Tensor = _Share.apply(group, x)
    return out


def gather_sequence(group: ProcessGroup, x: Tensor) -> Tensor:
    """Give every rank the shares ``x`` [s / ranks, ...] of all: [s, ...], the same everywhere.

    So is its gradient, of which each rank keeps its share: the mirror image of ``share_sequence``.
    """
    if group.size() == 1:
        return x
    out: Tensor = _GatherShares.apply(group, x)
    return out


def reduce_from_region(group: ProcessGroup, x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the ranks of ``group``; its gradient is each part's gradient."""
    if group.size() == 1:
        return x
    out: Tensor = _ReduceFrom.apply(group, x)
    return out


def all_reduce_(group: ProcessGroup, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``x`` in place over ``group`` and return it; no gradient."""
    if group.size() > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


def gather_from_region(group: ProcessGroup, x: Tensor) -> Tensor:
    """Concatenate ``x`` of all ranks along its last dimension; without a gradient."""
    if group.size() == 1:
        return x
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        return all_reduce_(group, x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return x.chunk(group.size())[group.rank()].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, all_gather_rows(ctx.group, grad, [grad.shape[0]] * ctx.group.size())


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return all_gather_rows(group, x, [x.shape[0]] * group.size())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous()
