"""A tensor of which this rank holds only some blocks, as torch.distributed.checkpoint wants it.

DCP asks an object for its blocks by the methods with underscores; everything else about resharding
(which saved block covers which wanted one) is DCP's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from megatron.core.param_role import LogicalShard

if TYPE_CHECKING:  # DCP loads 700 modules in 0.6 s: none before a checkpoint is written or read
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import WriteItem


class TensorShards:
    """The blocks of one logical tensor on this rank; writing to them writes the model."""

    def __init__(self, shards: Iterable[LogicalShard]) -> None:
        """Take ``shards``, at least one and all of the same logical tensor."""
        self.shards = tuple(shards)
        wholes = {(shard.name, shard.shape, shard.tensor.dtype) for shard in self.shards}
        assert len(wholes) == 1, f"blocks of several tensors: {wholes}"
        places = {shard.offset for shard in self.shards}
        assert len(places) == len(self.shards), f"two tensors are named {self.shards[0].name}"
        self.shape = torch.Size(self.shards[0].shape)
        self.dtype = self.shards[0].tensor.dtype

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor."""
        return self.shape

    def block_at(self, offset: Sequence[int] | None) -> Tensor:
        """Return the block that begins at ``offset`` in the whole tensor."""
        assert offset is not None, "a block has a place"
        return next(s.tensor for s in self.shards if s.offset == tuple(offset))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """See torch.distributed._checkpointable."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(shard.offset), sizes=shard.tensor.size())
            for shard in self.shards
        ]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        """See torch.distributed._checkpointable."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.shards[0].tensor)
        return [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


Storable: TypeAlias = Tensor | TensorShards
"""What a checkpoint holds under one key: a whole tensor, or this rank's blocks of one."""


def storable(shards: Iterable[LogicalShard]) -> Storable:
    """Return the blocks of one logical tensor as a tensor, if it is whole, or as blocks."""
    found = tuple(shards)
    first = found[0]
    if len(found) == 1 and tuple(first.tensor.shape) == first.shape:
        return first.tensor
    return TensorShards(found)
