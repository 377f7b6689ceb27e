"""Slices of one rank made whole: what is compared is named and shaped as in one process."""

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.param_role import LogicalShard, ParamRole, logical_shards
from megatron.core.process_groups_config import ProcessGroupCollection

Blocks = list[LogicalShard]
"""What one rank holds of logical tensors."""


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


def whole_of_ranks(ranks: Iterable[Blocks]) -> dict[str, Tensor]:
    """Put the blocks of all ranks together, by global name in the order of their first mention.

    Fails when replicas of a block differ in a bit, or when the blocks do not tile the whole.
    """
    found: dict[str, dict[tuple[int, ...], LogicalShard]] = {}
    for block in (block for blocks in ranks for block in blocks):
        first = found.setdefault(block.name, {}).setdefault(block.offset, block)
        assert torch.equal(first.tensor, block.tensor), f"replicas of {block.name} differ"
    return {name: _join(list(blocks.values())) for name, blocks in found.items()}


def _join(shards: list[LogicalShard]) -> Tensor:
    whole = shards[0].tensor.new_empty(shards[0].shape)
    times = torch.zeros(whole.shape, dtype=torch.int64)
    for shard in shards:
        whole[shard.region] = shard.tensor
        times[shard.region] += 1
    assert (times == 1).all(), f"the slices of {shards[0].name} do not tile it"
    return whole
