"""Who writes what: each block of each tensor once, on the rank with the least to write so far.

The planning is that of torch.distributed.checkpoint (DCP), but for the balance: DCP counts a block
as if it were its whole tensor, and so gives some ranks much more to write than others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import gather, gather_first, rank_in, scatter_first
from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards

if TYPE_CHECKING:  # DCP is loaded when the first checkpoint is written or read
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

    from megatron.core.dist_checkpointing.dcp_planners import SavePlanner

_Structure: TypeAlias = tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class PlannedBlock:
    """A block that this rank writes."""

    key: str
    whole: TensorFacts
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the block begins in it."""
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the block in its file: the key, and where it begins unless it is the whole."""
        if self.shape == self.whole.shape:
            return self.key
        return f"{self.key}@{','.join(map(str, self.offset))}"


def plan_save(
    tensors: Mapping[str, Storable], group: ProcessGroup | None, *, complete: bool = True
) -> list[PlannedBlock]:
    """Share out the blocks of all ranks; return those of this rank. Every rank must call this.

    Args:
        tensors: Key -> tensor of this rank, or its blocks of one.
        group: The ranks that take part.
        complete: The blocks of all ranks must tile every tensor.
    """
    local = _planner(tensors, rank_in(group) == 0).create_local_plan()
    plans = gather_first(local, group)
    return scatter_first(None if plans is None else _shares(plans, complete), group)


def plan_for_ranks(
    tensors_of_ranks: Iterable[Mapping[str, Storable]],
) -> list[list[PlannedBlock]]:
    """Share out the blocks of all ranks as ``plan_save`` does, in one process.

    Args:
        tensors_of_ranks: For each rank, key -> tensor, or its blocks of one; need hold no data.

    Returns:
        The blocks of each rank.
    """
    plans = [
        _planner(tensors, rank == 0).create_local_plan()
        for rank, tensors in enumerate(tensors_of_ranks)
    ]
    return _shares(plans, True)


class SavePlans:
    """Remembers who writes what, for ranks that save the same tensors again and again.

    Planning takes seconds where there are many ranks and experts, and its outcome is the same as
    long as no rank holds other tensors.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        """Plan nothing yet.

        Args:
            group: The ranks that save together; a message of a few bytes a save goes over it.
        """
        self.group = group
        self._structure: _Structure | None = None
        self._blocks: list[PlannedBlock] = []

    def blocks(self, tensors: Mapping[str, Storable]) -> list[PlannedBlock]:
        """Return what this rank writes; the very same list until some rank holds other tensors.

        Args:
            tensors: Key -> tensor of this rank, or its blocks of one. Every rank must call this.
        """
        structure = _structure(tensors)
        if any(gather(structure != self._structure, self.group)):
            self._blocks = plan_save(tensors, self.group)
            self._structure = structure
        return self._blocks


def block_of(tensors: Mapping[str, Storable], block: PlannedBlock) -> Tensor:
    """Return the block as a view of this rank's tensors."""
    found = tensors[block.key]
    return found.block_at(block.offset) if isinstance(found, TensorShards) else found


def dedup(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each block to one of the ranks that offer it, the large ones first."""
    offers: dict[MetadataIndex, tuple[WriteItem, list[int]]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            offers.setdefault(item.index, (item, []))[1].append(rank)
    load = [0] * len(plans)
    kept: list[list[WriteItem]] = [[] for _ in plans]
    # what only one rank holds is settled first; sorting is stable, so every run shares out alike
    for item, ranks in sorted(offers.values(), key=lambda o: (len(o[1]) > 1, -_nbytes(o[0]))):
        writer = min(ranks, key=lambda rank: load[rank])
        load[writer] += _nbytes(item)
        kept[writer].append(item)
    return [replace(plan, items=items) for plan, items in zip(plans, kept, strict=True)]


def _planner(tensors: Mapping[str, Storable], first: bool) -> SavePlanner:
    from megatron.core.dist_checkpointing.dcp_planners import SavePlanner

    planner = SavePlanner(dedup)
    planner.set_up_planner(dict(tensors), is_coordinator=first)
    return planner


def _shares(plans: list[SavePlan], complete: bool) -> list[list[PlannedBlock]]:
    if complete:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        plans, metadata = _planner({}, True).create_global_plan(plans)
        for key, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata), f"{key} is no tensor"
            there = sum(math.prod(chunk.sizes) for chunk in found.chunks)
            assert there == math.prod(found.size), f"the ranks hold only {there} elements of {key}"
    else:
        plans = dedup(plans)
    return [[_planned(item) for item in plan.items] for plan in plans]


def _planned(item: WriteItem) -> PlannedBlock:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is no tensor"
    return PlannedBlock(
        item.index.fqn,
        TensorFacts(tuple(data.size), data.properties.dtype),
        tuple(data.chunk.offsets),
        tuple(data.chunk.sizes),
    )


def _nbytes(item: WriteItem) -> int:
    block = _planned(item)
    return math.prod(block.shape) * block.whole.dtype.itemsize


def _structure(tensors: Mapping[str, Storable]) -> _Structure:
    return tuple(
        (key, tensor.shape, tensor.dtype, tuple(s.offset for s in tensor.shards))
        if isinstance(tensor, TensorShards)
        else (key, tensor.shape, tensor.dtype)
        for key, tensor in tensors.items()
    )
