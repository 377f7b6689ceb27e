"""The live tensors of a run in files of the tool's own: ranks write, anyone reads whole ones.

What is checked must not be read through what is checked: nothing here goes through the keys, the
files or the code of checkpoints. Blocks are named and placed by their roles, so that every key is
global and tensors of different layouts compare.
"""

import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.core.param_blocks import ParamBlocks, block_shards
from megatron.core.param_role import LogicalShard, ParamRole, logical_shards, role_of
from megatron.training.run import Run

WEIGHT, FROZEN, BUFFER, SCRATCH = "weight", "frozen", "buffer", "scratch"
"""Kinds of tensors beside the states of the optimizer, which are kinds by their own names. Frozen
weights are not stepped; scratch is what the model itself says not to save."""

_ALIGNED = 16
"""Every block begins at a multiple of so many bytes."""


class Place(NamedTuple):
    """Where a block lies in the file of its rank."""

    rank: int
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the block begins in the whole tensor."""
    size: tuple[int, ...]
    """Of the block."""
    at: int
    """Byte of the file."""


def live_blocks(run: Run) -> Iterator[LogicalShard]:
    """Yield what this rank holds of weights, buffers and optimizer, named ``<kind>.<name>``."""
    run.model.finish_param_sync()
    model = run.model.module
    if isinstance(run.model, TorchFullyShardedDataParallel):
        for name, role, part in run.model.saved_weights():
            yield from _named(WEIGHT, block_shards(name, part, role))
    else:
        for name, param in model.named_parameters():
            kind = WEIGHT if param.requires_grad else FROZEN
            yield from _named(kind, logical_shards(name, param.detach(), role_of(param)))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            kind = SCRATCH if name in module._non_persistent_buffers_set else BUFFER
            whole = f"{kind}.{prefix}.{name}" if prefix else f"{kind}.{name}"
            yield LogicalShard(whole, buffer, tuple(buffer.shape), (0,) * buffer.dim())
    for name, role, tensors in run.optimizer.named_state():
        for kind, tensor in tensors.items():
            yield from _named(kind, _shards(name, tensor, role))


def _shards(name: str, tensor: Tensor | ParamBlocks, role: ParamRole) -> Iterator[LogicalShard]:
    if isinstance(tensor, ParamBlocks):
        return block_shards(name, tensor, role)
    return logical_shards(name, tensor.detach(), role)


def _named(kind: str, shards: Iterable[LogicalShard]) -> Iterator[LogicalShard]:
    for shard in shards:
        yield shard._replace(name=f"{kind}.{shard.name}")


def write_state(folder: Path, rank: int, blocks: Iterable[LogicalShard]) -> None:
    """Write the blocks of this rank; the file of places comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    places: list[list[object]] = []
    at = 0
    with (folder / f"rank{rank}.bin").open("wb") as stream:
        for block in blocks:
            tensor = block.tensor.detach().cpu().contiguous()
            dtype = str(tensor.dtype).removeprefix("torch.")
            places.append([block.name, dtype, block.shape, block.offset, tuple(tensor.shape), at])
            at += stream.write(_bytes(tensor))
            at += stream.write(bytes(-at % _ALIGNED))
    (folder / f"rank{rank}.json").write_text(json.dumps(places))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class SavedState:
    """The tensors that all ranks wrote, mapped into memory: read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the places; every rank must have written."""
        self._files: dict[int, mmap.mmap | bytes] = {}
        self._places: dict[str, list[Place]] = {}
        for path in sorted(folder.glob("rank*.json"), key=lambda path: int(path.stem[4:])):
            rank = int(path.stem[4:])
            self._files[rank] = _mapped(path.with_suffix(".bin"))
            for name, dtype, shape, offset, size, at in json.loads(path.read_text()):
                place = Place(rank, dtype, tuple(shape), tuple(offset), tuple(size), at)
                self._places.setdefault(name, []).append(place)

    def names(self) -> list[str]:
        """Return the names of all tensors, ``<kind>.<global name>``."""
        return sorted(self._places)

    def has(self, name: str) -> bool:
        """Return whether any rank holds a part of a tensor."""
        return name in self._places

    def facts(self, name: str) -> str:
        """Return dtype and shape of a tensor, as text."""
        place = self._places[name][0]
        return f"{place.dtype} {list(place.shape)}"

    def blocks(self, name: str) -> Iterator[tuple[int, LogicalShard]]:
        """Yield (rank, block) of a tensor, replicas too."""
        for place in self._places[name]:
            dtype = getattr(torch, place.dtype)
            count = torch.Size(place.size).numel()
            if count:
                flat = torch.frombuffer(
                    self._files[place.rank], dtype=dtype, count=count, offset=place.at
                )
            else:
                flat = torch.empty(0, dtype=dtype)
            tensor = flat.view(place.size)
            yield place.rank, LogicalShard(name, tensor, place.shape, place.offset)

    def whole(self, name: str) -> tuple[Tensor, bool]:
        """Return a tensor put together from the blocks of all ranks, and whether they tile it.

        Elements that no rank holds are 0.
        """
        first = self._places[name][0]
        tensor = torch.zeros(first.shape, dtype=getattr(torch, first.dtype))
        is_held = torch.zeros(first.shape, dtype=torch.bool)
        for _, block in self.blocks(name):
            tensor[block.region] = block.tensor
            is_held[block.region] = True
        return tensor, bool(is_held.all())


def _mapped(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as stream:
        if not path.stat().st_size:
            return b""  # an empty file cannot be mapped
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
