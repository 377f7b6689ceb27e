"""Proof that replicas hold the same parameters, bit for bit; nothing else ever compares them."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer
from megatron.core.errors import MegatronError

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES_SHOWN = 5


class ReplicaError(MegatronError):
    """Ranks that should hold the same parameters hold different ones."""


def check_replicas(ddp: DistributedDataParallel) -> None:
    """Compare every parameter with that of the first rank of each group that holds copies of it.

    Those are its data-parallel group, and the tensor-parallel one if it is not split over it.
    Collective over all ranks; moves the parameters once for each group. Call it before the first
    step, when weights were drawn or loaded.

    Raises:
        ReplicaError: On every rank, if any rank differs in any bit, or in how its parameters are
            laid out.
    """
    _check_layouts(ddp)
    names = [name for name, _ in ddp.trainable_parameters()]
    differs = torch.zeros(
        len(names), dtype=torch.int32, device=ddp.grad_buffers[0].param_data.device
    )
    for bucket in ddp.bucket_layout.buckets:
        buffer = ddp.grad_buffers[bucket.buffer]
        mine = buffer.param_data[bucket.start : bucket.end]
        unequal = torch.zeros_like(mine, dtype=torch.bool)
        for group in _groups_of_copies(ddp, buffer):
            first = mine.clone()
            dist.broadcast(first, group=group, group_src=0)
            unequal |= _bits(first) != _bits(mine)
        for span in buffer.layout.spans:
            if span.param in bucket.params:
                found = unequal[span.start - bucket.start : span.end - bucket.start].any()
                differs[span.param] = found
    # every rank raises or none; experts of other ranks are told by this rank's names
    dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=ddp.pg_collection.world)
    bad = [name for name, flag in zip(names, differs.tolist(), strict=True) if flag]
    if bad:
        shown = ", ".join(bad[:_NAMES_SHOWN]) + (", ..." if len(bad) > _NAMES_SHOWN else "")
        raise ReplicaError(
            f"{len(bad)} of {len(names)} parameters differ between data-parallel replicas: "
            f"{shown}. All ranks must start from the same --seed and the same checkpoint"
        )


def _groups_of_copies(
    ddp: DistributedDataParallel, buffer: ParamAndGradBuffer
) -> list[ProcessGroup]:
    key, groups = buffer.layout.key, ddp.pg_collection
    sharing = groups.expt_tp if key.is_expert else groups.tp
    copies = key.split_over is None and sharing.size() > 1
    return [buffer.group, sharing] if copies else [buffer.group]


def _check_layouts(ddp: DistributedDataParallel) -> None:
    mine = ddp.bucket_layout.fingerprint()
    world = ddp.pg_collection.world
    every: list[str | None] = [None] * world.size()
    dist.all_gather_object(every, mine, group=world)
    if len(set(every)) > 1:
        other = next(rank for rank, value in enumerate(every) if value != every[0])
        raise ReplicaError(
            f"ranks 0 and {other} have models of different shapes (parameters, dtypes or "
            "bucket sizes); all ranks must run with the same options"
        )


def _bits(flat: Tensor) -> Tensor:
    return flat.view(_BITS[flat.element_size()])
