"""Read a ``.bin``/``.idx`` pair without copying: every sequence is a view of one mapped file.

Offsets are int64 throughout, so files may pass 2^32 bytes.
"""

import mmap
from pathlib import Path
from typing import overload

import numpy as np

from megatron.core.datasets.indexed_dataset.format import (
    LENGTH_DTYPE,
    POINTER_DTYPE,
    IndexHeader,
    bin_path,
    idx_path,
    read_header,
)
from megatron.core.errors import DataError


class IndexedDataset:
    """Sequences of tokens on disk, grouped into documents.

    Pickling keeps only the prefix: a worker process maps the files again.

    Attributes:
        prefix: Path of the files without ``.bin`` and ``.idx``.
        dtype: Of the tokens.
        sequence_lengths: int32 [sequences], in tokens.
        sequence_pointers: int64 [sequences], in bytes.
        document_indices: int64 [documents + 1]; document d holds the sequences from entry d
            up to entry d + 1.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open the pair.

        Raises:
            DataError: A file is missing, is not of this format, or the two do not fit together.
        """
        self.prefix = str(prefix)
        index, tokens = idx_path(prefix), bin_path(prefix)
        header = read_header(index)
        if not tokens.is_file():
            raise DataError(f"{tokens} does not exist, but {index} does")
        self.dtype = header.dtype
        self._map_index(index, header)
        self._check(tokens, index)
        self._tokens = _map(tokens).view(self.dtype)

    def _map_index(self, index: Path, header: IndexHeader) -> None:
        content = _map(index)
        lengths = content[header.lengths_at : header.pointers_at]
        pointers = content[header.pointers_at : header.documents_at]
        self.sequence_lengths = lengths.view(LENGTH_DTYPE)
        self.sequence_pointers = pointers.view(POINTER_DTYPE)
        self.document_indices = content[header.documents_at : header.end].view(POINTER_DTYPE)

    def _check(self, tokens: Path, index: Path) -> None:
        actual = tokens.stat().st_size
        lengths, pointers = self.sequence_lengths, self.sequence_pointers
        width = self.dtype.itemsize
        needed = int(lengths.sum(dtype=np.int64)) * width
        last = int(pointers[-1]) + int(lengths[-1]) * width if len(lengths) else 0
        if not needed == last == actual:
            raise DataError(
                f"{tokens} has {actual} bytes, but {index} describes {max(needed, last)} bytes: "
                "they do not belong together, or writing was interrupted"
            )
        documents = self.document_indices
        if not len(documents) or documents[0] != 0 or documents[-1] != len(lengths):
            raise DataError(f"{index} is damaged: its documents do not cover its sequences")

    def verify(self) -> None:
        """Check every length, pointer and document, not only their sums.

        Raises:
            DataError: One of them is wrong; names the first.
        """
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        wrong = np.flatnonzero((self.sequence_pointers != starts) | (self.sequence_lengths < 0))
        if len(wrong):
            raise DataError(f"{idx_path(self.prefix)} is damaged at sequence {wrong[0]}")
        wrong = np.flatnonzero(np.diff(self.document_indices) < 0)
        if len(wrong):
            raise DataError(f"{idx_path(self.prefix)} is damaged at document {wrong[0]}")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """Return the read-only view of a sequence, or the views of a range of them."""
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return ``length`` tokens of a sequence from token ``offset`` on; all the rest if None.

        Raises:
            IndexError: There is no such sequence, or it is shorter than asked for.
        """
        size = int(self.sequence_lengths[index])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(
                f"sequence {index} of {self.prefix} has {size} tokens, asked for "
                f"{length} from {offset} on"
            )
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    @staticmethod
    def exists(prefix: str | Path) -> bool:
        """Whether both files of a dataset are there."""
        return bin_path(prefix).is_file() and idx_path(prefix).is_file()

    def __getstate__(self) -> str:
        return self.prefix

    def __setstate__(self, prefix: str) -> None:
        self.__init__(prefix)  # type: ignore[misc]


def _map(path: Path) -> np.ndarray:
    """Return the bytes of a file as a read-only uint8 array that the system loads when touched."""
    if path.stat().st_size == 0:  # the system refuses to map nothing
        return np.empty(0, dtype=np.uint8)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
