"""Where every block of every tensor of a checkpoint lies: plain data, to JSON and back.

For torch.distributed.checkpoint (DCP), which works out what a rank has to read, the index gives the
``Metadata`` that DCP's own files hold as a pickle.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron.core.dist_checkpointing.folders import Place, write_file
from megatron.core.dist_checkpointing.tensor_file import BlockFacts, dtype_code, dtype_of
from megatron.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INDEX = "index.json"


class TensorFacts(NamedTuple):
    """Shape and dtype of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredBlock:
    """A block of a tensor, in a file."""

    offset: tuple[int, ...]
    """Where it begins in the whole tensor."""
    shape: tuple[int, ...]
    file: str
    """Name in the checkpoint."""
    facts: BlockFacts


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, in blocks; those of a complete checkpoint tile it."""

    facts: TensorFacts
    blocks: tuple[StoredBlock, ...]

    def __post_init__(self) -> None:
        """Refuse blocks of other dimensions, or whose bytes are not those of their shape."""
        for block in self.blocks:
            if not len(block.offset) == len(block.shape) == len(self.facts.shape):
                raise ValueError(f"a block of {block.shape} at {block.offset}")
            if block.facts.nbytes != math.prod(block.shape) * self.facts.dtype.itemsize:
                raise ValueError(f"a block of {block.shape} has {block.facts.nbytes} bytes")


TensorIndex = Mapping[str, StoredTensor]
"""Key -> where the tensor lies."""


def write_index(folder: Place, index: TensorIndex) -> None:
    """Write ``index`` into the checkpoint ``folder``, flushed to the disk."""
    write_file(folder / INDEX, json.dumps(_to_data(index), separators=(",", ":")) + "\n")


def read_index(folder: Place) -> dict[str, StoredTensor]:
    """Return where each tensor of the checkpoint ``folder`` lies.

    Raises:
        CheckpointError: The index is missing or damaged.
    """
    path = folder / INDEX
    try:
        return _from_data(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a checkpoint of this version") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def as_metadata(index: TensorIndex) -> Metadata:
    """Return ``index`` as what DCP's planners work with."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    return Metadata(
        {
            key: TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.facts.dtype),
                size=torch.Size(tensor.facts.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.shape))
                    for block in tensor.blocks
                ],
            )
            for key, tensor in index.items()
        }
    )


def keys_by_file(index: TensorIndex) -> dict[str, list[str]]:
    """Return file -> the tensors of which it holds blocks, in the order of the file."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for key, tensor in index.items():
        for block in tensor.blocks:
            found[block.file].append((block.facts.begin, key))
    return {file: [key for _, key in sorted(places)] for file, places in found.items()}


def _to_data(index: TensorIndex) -> dict[str, Any]:
    return {
        key: {
            "dtype": dtype_code(tensor.facts.dtype),
            "shape": list(tensor.facts.shape),
            "blocks": [
                {
                    "offset": list(block.offset),
                    "shape": list(block.shape),
                    "file": block.file,
                    "begin": block.facts.begin,
                    "bytes": block.facts.nbytes,
                    "crc32": block.facts.crc32,
                    "xor64": block.facts.xor64,
                }
                for block in tensor.blocks
            ],
        }
        for key, tensor in sorted(index.items())
    }


def _from_data(data: Mapping[str, Any]) -> dict[str, StoredTensor]:
    return {
        str(key): StoredTensor(
            TensorFacts(_ints(entry["shape"]), dtype_of(entry["dtype"])),
            tuple(
                StoredBlock(
                    _ints(block["offset"]),
                    _ints(block["shape"]),
                    str(block["file"]),
                    BlockFacts(
                        int(block["begin"]),
                        int(block["bytes"]),
                        int(block["crc32"]),
                        int(block["xor64"]),
                    ),
                )
                for block in entry["blocks"]
            ),
        )
        for key, entry in data.items()
    }


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
