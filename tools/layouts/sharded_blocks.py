"""What a rank holds of a fully sharded model (ZeRO-3), as blocks of logical tensors."""

from collections.abc import Iterator

from torch import Tensor

from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    LocalShard,
    TorchFullyShardedDataParallel,
)
from megatron.core.param_blocks import ParamBlocks, block_shards
from megatron.core.param_role import LogicalShard
from tools.layouts.whole_tensors import Blocks


def sharded_weights(model: TorchFullyShardedDataParallel) -> Blocks:
    """Return copies of this rank's weights, in the number format of the model."""
    parts = model.saved_weights()
    return [_copy(block) for name, role, part in parts for block in block_shards(name, part, role)]


def sharded_gradients(model: TorchFullyShardedDataParallel) -> Blocks:
    """Return copies of this rank's part of the summed gradients."""
    return [_copy(block) for shard in model.shards for block in _of(shard, shard.gradient)]


def sharded_main_weights(model: TorchFullyShardedDataParallel) -> Blocks:
    """Return copies of this rank's main weights."""
    return [_copy(block) for shard in model.shards for block in _of(shard, shard.weight)]


def _of(shard: LocalShard, tensor: Tensor) -> Iterator[LogicalShard]:
    part = ParamBlocks(shard.shape, ((shard.offset, tensor),) if tensor.numel() else ())
    yield from block_shards(shard.name, part, shard.role)


def _copy(block: LogicalShard) -> LogicalShard:
    return block._replace(tensor=block.tensor.clone())
