"""Copies of what this rank writes, of one moment: training goes on while they are written.

The buffers stay from save to save: their first use costs the memory, later ones a copy at the speed
of memory. Only blocks that this rank will write are copied: of what several ranks hold, one has a
copy.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import attempt
from megatron.core.dist_checkpointing.save_plan import PlannedBlock, SavePlans, block_of
from megatron.core.dist_checkpointing.tensor_shards import Storable, storable
from megatron.core.errors import CheckpointError
from megatron.core.param_role import LogicalShard


class Staging:
    """Host memory for this rank's share of a checkpoint."""

    def __init__(self, group: ProcessGroup | None) -> None:
        """Take no memory yet.

        Args:
            group: The ranks that save together; messages of a few bytes a save go over it, and
                at the first save, or another structure, who copies what.
        """
        self._group = group
        self._plans = SavePlans(group)
        self._planned: list[PlannedBlock] | None = None
        self._buffers: list[tuple[PlannedBlock, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that are held."""
        return sum(buffer.nbytes for _, buffer in self._buffers)

    def copy(self, tensors: Mapping[str, Storable]) -> dict[str, Storable]:
        """Return this rank's share of ``tensors``, copied; every rank of the group must call this.

        The copies are valid until the next call.

        Args:
            tensors: Key -> tensor of this rank, or its blocks of one.

        Raises:
            CheckpointError: Some rank has no memory for its copies; the same on every rank.
        """
        blocks = self._plans.blocks(tensors)
        if blocks is not self._planned:  # on every rank, if on one
            self._planned, self._buffers = None, []
            self._buffers = attempt(lambda: _buffers(blocks, tensors), self._group)
            self._planned = blocks
        on_gpu = False
        with torch.no_grad():
            for block, buffer in self._buffers:
                source = block_of(tensors, block)
                on_gpu = on_gpu or source.is_cuda
                buffer.copy_(source, non_blocking=source.is_cuda)
        if on_gpu:
            torch.cuda.synchronize()  # the copies are complete before the next step writes
        return self._storables()

    def _storables(self) -> dict[str, Storable]:
        shards: dict[str, list[LogicalShard]] = {}
        for block, buffer in self._buffers:
            shard = LogicalShard(block.key, buffer, block.whole.shape, block.offset)
            shards.setdefault(block.key, []).append(shard)
        return {key: storable(found) for key, found in shards.items()}


def _buffers(
    blocks: Sequence[PlannedBlock], tensors: Mapping[str, Storable]
) -> list[tuple[PlannedBlock, Tensor]]:
    sources = [(block, block_of(tensors, block)) for block in blocks]
    try:
        return [(block, _host_memory(source)) for block, source in sources]
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        needed = sum(source.nbytes for _, source in sources) / 2**30
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise CheckpointError(
            f"no host memory for a copy of {needed:.2f} GiB to write in the background: {reason}"
        ) from error


def _host_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
