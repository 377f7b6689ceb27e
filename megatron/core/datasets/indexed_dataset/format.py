"""The bytes of an ``.idx`` file and the dtypes of a ``.bin`` file, as Megatron writes them.

All little-endian. ``.bin`` holds the ids of all sequences back to back. ``.idx`` holds a header of
34 bytes, then per sequence its length (int32, tokens) and its place in ``.bin`` (int64, bytes),
then per document the number of its first sequence (int64) and a last entry, the number of
sequences. docs/data_format.md shows an example byte by byte.
"""

import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
LENGTH_DTYPE = np.dtype("<i4")
POINTER_DTYPE = np.dtype("<i8")
# Megatron's limit, a little below the 65536 ids that uint16 could hold.
UINT16_VOCAB_LIMIT = 65500


class DType(IntEnum):
    """Codes of the ``.idx`` header."""

    uint8 = 1
    int8 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float64 = 6
    float32 = 7
    uint16 = 8

    @classmethod
    def code_from_dtype(cls, dtype: np.typing.DTypeLike) -> int:
        """Return the code of a numpy dtype.

        Raises:
            DataError: The format has no code for it.
        """
        name = np.dtype(dtype).name
        if name not in cls.__members__:
            raise DataError(
                f"an indexed dataset cannot hold {name}; use {', '.join(cls.__members__)}"
            )
        return int(cls[name])

    @classmethod
    def dtype_from_code(cls, code: int) -> np.dtype:
        """Return the little-endian numpy dtype of a code."""
        return np.dtype(cls(code).name).newbyteorder("<")

    @staticmethod
    def optimal_dtype(cardinality: int | None) -> type[np.uint16] | type[np.int32]:
        """Return the smallest dtype that Megatron uses for ids below ``cardinality``."""
        fits = cardinality is not None and cardinality < UINT16_VOCAB_LIMIT
        return np.uint16 if fits else np.int32


class IndexHeader(NamedTuple):
    """The first 34 bytes of an ``.idx`` file."""

    dtype: np.dtype
    num_sequences: int
    num_document_indices: int  # documents + 1

    @property
    def lengths_at(self) -> int:
        """Offset of the sequence lengths, in bytes."""
        return HEADER_BYTES

    @property
    def pointers_at(self) -> int:
        """Offset of the sequence pointers, in bytes."""
        return self.lengths_at + self.num_sequences * LENGTH_DTYPE.itemsize

    @property
    def documents_at(self) -> int:
        """Offset of the document indices, in bytes."""
        return self.pointers_at + self.num_sequences * POINTER_DTYPE.itemsize

    @property
    def end(self) -> int:
        """Size of the file in bytes, without the modes of multimodal datasets."""
        return self.documents_at + self.num_document_indices * POINTER_DTYPE.itemsize

    def pack(self) -> bytes:
        """Return the 34 bytes."""
        code = DType.code_from_dtype(self.dtype)
        return _HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_document_indices)


def read_header(path: Path) -> IndexHeader:
    """Read the header of an ``.idx`` file and check it against the size of the file.

    Raises:
        DataError: The file is missing, no index, of another version or dtype, or cut short.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    with path.open("rb") as file:
        content = file.read(HEADER_BYTES)
    if content[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path} is not the index of a dataset: it does not start with {MAGIC!r}")
    if len(content) < HEADER_BYTES:
        raise DataError(f"{path} is cut short: {len(content)} bytes, a header has {HEADER_BYTES}")
    _, version, code, num_sequences, num_document_indices = _HEADER.unpack(content)
    if version != VERSION:
        raise DataError(f"{path} is of version {version}; this program reads version {VERSION}")
    if code not in list(DType):
        raise DataError(f"{path} has the unknown dtype code {code}; known are 1 to {max(DType)}")
    header = IndexHeader(DType.dtype_from_code(code), num_sequences, num_document_indices)
    # multimodal datasets append one byte per sequence, which is not needed here
    sizes = (header.end, header.end + num_sequences)
    actual = path.stat().st_size
    if actual not in sizes:
        raise DataError(
            f"{path} has {actual} bytes, but its header ({num_sequences} sequences, "
            f"{num_document_indices} document indices) needs {header.end}"
        )
    return header


def bin_path(prefix: str | Path) -> Path:
    """Return the file of tokens of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the file of lengths, pointers and documents of a dataset."""
    return Path(f"{prefix}.idx")
