"""Part of a parameter, as the boxes that an arbitrary stretch of its elements is made of.

A rank that owns a slice of a flat buffer owns elements [a, b) of a parameter in row-major order;
a checkpoint stores boxes. Pure index arithmetic, but for views.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from megatron.core.param_role import LogicalShard, ParamRole, logical_shards


class Box(NamedTuple):
    """A box of a tensor whose elements follow each other in row-major order."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class ParamBlocks(NamedTuple):
    """What a rank holds of a tensor shaped like a parameter; nothing, perhaps."""

    shape: tuple[int, ...]
    """Of the parameter on this rank."""
    blocks: tuple[tuple[tuple[int, ...], Tensor], ...]
    """(Where it begins in the parameter, view); disjoint."""

    @classmethod
    def of_stretch(cls, shape: tuple[int, ...], start: int, flat: Tensor) -> "ParamBlocks":
        """Take ``flat``, the elements of a tensor of ``shape`` from number ``start`` on."""
        blocks, done = [], 0
        for box in boxes_of(shape, start, start + flat.numel()):
            view = flat[done : done + box.numel].view(box.shape)
            blocks.append((box.offset, view))
            done += box.numel
        return cls(shape, tuple(blocks))


def boxes_of(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Cut elements [start, end) of a row-major tensor into boxes, in order, 2 n - 1 at most.

    n is the number of dimensions: the rest of a row, whole rows, the begin of a row, and so on.
    """
    assert 0 <= start <= end <= math.prod(shape), f"[{start}, {end}) of {shape}"
    if start == end:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # within one row
        yield from _within(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < end:
        yield from _within(shape, last, 0, end - last * row)


def block_shards(name: str, part: ParamBlocks, role: ParamRole) -> Iterator[LogicalShard]:
    """Place the blocks of ``part`` in logical tensors, as ``logical_shards`` does with a whole.

    Those of one logical tensor need not follow each other.

    Args:
        name: See ``logical_tensors``.
        part: Blocks of a tensor shaped like the parameter.
        role: Role of the parameter.
    """
    if not part.blocks:
        return
    # an outline of the whole parameter, which takes no memory, says what lies where
    outline = part.blocks[0][1].new_empty(()).expand(part.shape)
    stacked, split = role.expert_ids is not None, role.split if role.split_over else None
    for place, shards in enumerate(_by_name(logical_shards(name, outline, role))):
        done = 0  # along the dimension that is split, of the parts before
        for shard in shards:
            region = [(0, size) for size in shard.tensor.shape]
            if split is not None:
                low, done = done, done + shard.tensor.shape[split.dim]
                region[split.dim] = (low, done)
            if stacked:
                region.insert(0, (place, place + 1))
            yield from _cut(shard, region, part, stacked)


def _by_name(shards: Iterator[LogicalShard]) -> Iterator[list[LogicalShard]]:
    for _, group in groupby(shards, lambda shard: shard.name):
        yield list(group)


def _cut(
    shard: LogicalShard, region: list[tuple[int, int]], part: ParamBlocks, stacked: bool
) -> Iterator[LogicalShard]:
    """Yield what the blocks of ``part`` hold of ``shard``, which is ``region`` of the parameter."""
    for origin, block in part.blocks:
        found = block
        moved = []
        for dim, ((low, high), at) in enumerate(zip(region, origin, strict=True)):
            start, end = max(low, at), min(high, at + block.shape[dim])
            if start >= end:
                break
            found = found.narrow(dim, start - at, end - start)
            moved.append(start - low)
        else:
            if stacked:
                found, moved = found.squeeze(0), moved[1:]
            offset = tuple(a + b for a, b in zip(shard.offset, moved, strict=True))
            yield shard._replace(tensor=found, offset=offset)


def _within(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[Box]:
    for box in boxes_of(shape[1:], start, end):
        yield Box((index, *box.offset), (1, *box.shape))
