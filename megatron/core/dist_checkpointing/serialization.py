"""Tensors to files and back: every key is global, every block is checked.

torch.distributed.checkpoint (DCP) works out which saved block covers which wanted one; that is all
that resharding takes. The files are ours (see tensor_file.py): one safetensors file a rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import RawIOBase
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import (
    attempt,
    broadcast,
    gather_first,
    rank_in,
)
from megatron.core.dist_checkpointing.folders import Place, file_sizes, open_ranges
from megatron.core.dist_checkpointing.index import (
    StoredBlock,
    StoredTensor,
    TensorFacts,
    TensorIndex,
    as_metadata,
    read_index,
    write_index,
)
from megatron.core.dist_checkpointing.save_plan import PlannedBlock, SavePlans, block_of, plan_save
from megatron.core.dist_checkpointing.tensor_file import (
    BlockOutline,
    DamagedBlockError,
    TensorFileWriter,
    in_file_order,
    read_block,
)
from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards
from megatron.core.dist_checkpointing.validation import mismatch_problem
from megatron.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import ReadItem

_SHOWN = 5
_Written: TypeAlias = list[tuple[PlannedBlock, StoredBlock]]


def tensor_file_name(number: int) -> str:
    """Return the name of the file that the rank of this number writes."""
    return f"tensors_{number:05d}.safetensors"


def write_tensors(
    folder: Place,
    tensors: Mapping[str, Storable],
    group: ProcessGroup | None,
    *,
    complete: bool = True,
    plans: SavePlans | None = None,
) -> None:
    """Write the tensors of all ranks and their index into ``folder``, flushed to the disk.

    Args:
        folder: Exists, and every rank sees it.
        tensors: Key -> tensor of this rank, or its blocks of one. What several ranks offer is
            written once; the blocks of all ranks must make up the whole.
        group: The ranks that take part; every one must call this.
        complete: Refuse tensors of which the ranks do not hold every element.
        plans: Of the saves before, over the same group; they were complete.

    Raises:
        CheckpointError: Some rank could not write; the same message on every rank.
    """
    planned = None if plans is None else plans.blocks(tensors)
    blocks = plan_save(tensors, group, complete=complete) if planned is None else planned
    name = tensor_file_name(rank_in(group))
    written = attempt(lambda: _write_blocks(folder / name, blocks, tensors), group)
    parts = gather_first(written, group)
    attempt(lambda: None if parts is None else _write_checked_index(folder, parts), group)


def stored_tensors(folder: Place) -> dict[str, TensorFacts]:
    """Return key -> shape and dtype of every tensor in a checkpoint, from this rank's view.

    Raises:
        CheckpointError: The folder has no readable index.
    """
    return {key: tensor.facts for key, tensor in read_index(folder).items()}


def read_tensors(
    folder: Place,
    tensors: Mapping[str, Storable],
    group: ProcessGroup | None,
    *,
    prefixes: tuple[str, ...],
) -> None:
    """Fill ``tensors`` in place; nothing is changed unless everything fits.

    Args:
        folder: A checkpoint that ``write_tensors`` wrote at any number of ranks.
        tensors: Key -> tensor of this rank, or its blocks of one, of the shape and dtype on disk.
        group: The ranks that take part; every one must call this.
        prefixes: Every stored key that begins with one of these must be wanted by some rank.

    Raises:
        CheckpointError: Missing or unexpected keys, other shapes or dtypes, or damaged files; the
            same message on every rank, with the names of the tensors.
    """
    index = attempt(lambda: read_index(folder), group)
    wanted = gather_first({key: _facts(tensor) for key, tensor in tensors.items()}, group)
    problem = ""
    if wanted is not None:
        kept = {key: found.facts for key, found in index.items() if key.startswith(prefixes)}
        problem = mismatch_problem(kept, wanted)
    if problem := broadcast(problem, group):
        raise CheckpointError(f"{folder} does not fit this run:\n{problem}")
    attempt(lambda: _read_blocks(folder, index, tensors), group)


def _write_checked_index(folder: Place, parts: Sequence[_Written]) -> None:
    """Write the index of files that the first rank sees as the ranks wrote them."""
    index = _joined(parts)
    ends: dict[str, int] = defaultdict(int)
    for block in chain.from_iterable(tensor.blocks for tensor in index.values()):
        ends[block.file] = max(ends[block.file], block.facts.begin + block.facts.nbytes)
    sizes = file_sizes(folder)
    for name, end in ends.items():
        if (size := sizes.get(name, 0)) != end:
            raise CheckpointError(
                f"{folder / name} has {size} bytes, and {end} were written: does another run save "
                "to this folder, or do nodes not see the same files?"
            )
    write_index(folder, index)


def _facts(tensor: Storable) -> TensorFacts:
    return TensorFacts(tuple(tensor.shape), tensor.dtype)


def _joined(parts: Sequence[_Written]) -> dict[str, StoredTensor]:
    blocks: dict[str, list[StoredBlock]] = defaultdict(list)
    wholes: dict[str, TensorFacts] = {}
    for planned, stored in chain.from_iterable(parts):
        blocks[planned.key].append(stored)
        wholes[planned.key] = planned.whole
    return {key: StoredTensor(wholes[key], tuple(found)) for key, found in blocks.items()}


def _write_blocks(
    path: Place, blocks: Sequence[PlannedBlock], tensors: Mapping[str, Storable]
) -> _Written:
    if not blocks:
        return []
    outlines = [BlockOutline(b.name, b.whole.dtype, b.shape) for b in blocks]
    order = in_file_order(outlines)
    written = []
    with TensorFileWriter(path, [outlines[number] for number in order]) as writer:
        for number in order:
            block = blocks[number]
            facts = writer.add(block_of(tensors, block))
            written.append((block, StoredBlock(block.offset, block.shape, path.name, facts)))
    return written


class _Copy(NamedTuple):
    """A box of a saved block, and where it goes."""

    target: Tensor
    """A view of the model's memory."""
    source: tuple[slice, ...]
    """The box, in the saved block."""


class _Wanted(NamedTuple):
    """A saved block, and what this rank takes of it."""

    key: str
    dtype: torch.dtype
    block: StoredBlock
    parts: list[_Copy]


def _read_blocks(folder: Place, index: TensorIndex, tensors: Mapping[str, Storable]) -> None:
    """Read what this rank wants, block after block as they lie in the files.

    Raises:
        CheckpointError: Damaged blocks; all are named.
        OSError: A file cannot be read.
    """
    copies = _copies(index, tensors)
    by_file: dict[str, list[_Wanted]] = defaultdict(list)
    for (key, number), parts in copies.items():
        block = index[key].blocks[number]
        by_file[block.file].append(_Wanted(key, index[key].facts.dtype, block, parts))
    damaged = []
    for file, wanted in sorted(by_file.items()):  # one open at a time: there may be thousands
        wanted.sort(key=lambda want: want.block.facts.begin)
        ends = [(w.block.facts.begin, w.block.facts.begin + w.block.facts.nbytes) for w in wanted]
        with open_ranges(folder / file, ends) as stream, torch.no_grad():
            for want in wanted:
                try:
                    _read_block(stream, want.block, want.dtype, want.parts)
                except DamagedBlockError as error:
                    damaged.append(f"{want.key} (in {file}) {error}")
    if damaged:
        more = f"\n  ... and {len(damaged) - _SHOWN} more" if damaged[_SHOWN:] else ""
        listed = "".join(f"\n  - {text}" for text in damaged[:_SHOWN])
        raise CheckpointError(f"{folder} is damaged:{listed}{more}")


def _read_block(
    stream: BinaryIO | RawIOBase, block: StoredBlock, dtype: torch.dtype, parts: Sequence[_Copy]
) -> None:
    """Read a saved block whole, since only the whole can be checked, and hand out its parts."""
    first = parts[0].target
    if tuple(first.shape) == block.shape and first.is_cpu and first.is_contiguous():
        read_block(stream, block.facts, first)  # straight into the model
        saved, rest = first, parts[1:]
    else:
        saved, rest = torch.empty(block.shape, dtype=dtype), parts
        read_block(stream, block.facts, saved)
    for part in rest:
        part.target.copy_(saved[part.source])


def _copies(
    index: TensorIndex, tensors: Mapping[str, Storable]
) -> dict[tuple[str, int], list[_Copy]]:
    """Return (key, number of a saved block) -> what this rank takes of it."""
    from megatron.core.dist_checkpointing.dcp_planners import LoadPlanner

    planner = LoadPlanner()
    kept = {key: index[key] for key in tensors}
    planner.set_up_planner(dict(tensors), as_metadata(kept), is_coordinator=False)
    numbers = {
        (key, block.offset): number
        for key, tensor in kept.items()
        for number, block in enumerate(tensor.blocks)
    }
    found: dict[tuple[str, int], list[_Copy]] = defaultdict(list)
    missing = {
        (key, tuple(offset)): block.numel()
        for key, tensor in tensors.items()
        for offset, block in _own_blocks(tensor)
    }
    for item in planner.create_local_plan().items:
        key = item.dest_index.fqn
        target = planner.lookup_tensor(item.dest_index)[_box(item.dest_offsets, item.lengths)]
        assert item.storage_index.offset is not None, f"{key} has a block of no place"
        number = numbers[key, tuple(item.storage_index.offset)]
        found[key, number].append(_Copy(target, _box(item.storage_offsets, item.lengths)))
        missing[key, _offset_of(item, tensors[key])] -= math.prod(item.lengths)
    if holes := sorted({key for (key, _), count in missing.items() if count}):
        raise CheckpointError(f"the index does not cover {', '.join(holes[:_SHOWN])}")
    return found


def _own_blocks(tensor: Storable) -> list[tuple[tuple[int, ...], Tensor]]:
    if isinstance(tensor, TensorShards):
        return [(shard.offset, shard.tensor) for shard in tensor.shards]
    return [((0,) * tensor.dim(), tensor)]


def _offset_of(item: ReadItem, tensor: Storable) -> tuple[int, ...]:
    if isinstance(tensor, TensorShards):
        assert item.dest_index.offset is not None, "a block of no place"
        return tuple(item.dest_index.offset)
    return (0,) * tensor.dim()


def _box(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))
