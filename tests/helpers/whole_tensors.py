"""Slices of one rank made whole: what tests compare is named and shaped as in one process."""

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.core.param_role import LogicalShard, ParamRole, logical_shards
from megatron.core.process_groups_config import ProcessGroupCollection


def whole_tensors(
    name: str, tensor: Tensor, role: ParamRole, groups: ProcessGroupCollection
) -> dict[str, Tensor]:
    """Return the logical tensors in ``tensor`` by global name; slices are gathered.

    Collective over the group that ``tensor`` is split over, if it is. Fails when the slices do not
    tile the whole.
    """
    shards = list(logical_shards(name, tensor.detach(), role))
    if role.split is None:
        return {shard.name: shard.tensor.clone() for shard in shards}
    own = [LogicalShard(s.name, s.tensor.clone(), s.shape, s.offset) for s in shards]
    ranks: list[list[LogicalShard]] = [[]] * role.split.count
    dist.all_gather_object(ranks, own, group=getattr(groups, role.split.over))
    every = sorted((shard for rank in ranks for shard in rank), key=lambda shard: shard.name)
    return {key: _join(list(found)) for key, found in groupby(every, lambda shard: shard.name)}


def unsharded(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that data ranks share out (ZeRO-3), or the tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _join(shards: list[LogicalShard]) -> Tensor:
    whole = shards[0].tensor.new_empty(shards[0].shape)
    times = torch.zeros(whole.shape, dtype=torch.int64)
    for shard in shards:
        whole[shard.region] = shard.tensor
        times[shard.region] += 1
    assert (times == 1).all(), f"the slices of {shards[0].name} do not tile it"
    return whole
