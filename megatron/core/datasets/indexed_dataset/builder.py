"""Write a ``.bin``/``.idx`` pair in bounded memory; both files appear complete or not at all.

Tokens go to ``NAME.bin.partial``, lengths and documents to unnamed temporary files beside it, and
``finalize`` puts them in place. One process at a time may write a dataset.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron.core.datasets.indexed_dataset.format import (
    LENGTH_DTYPE,
    POINTER_DTYPE,
    IndexHeader,
    bin_path,
)
from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.errors import DataError

COPY_BYTES = 1 << 22
CHUNK_ENTRIES = 1 << 18


class IndexedDatasetBuilder:
    """Appends sequences, then writes the index.

    Use as a context manager: leaving it without ``finalize`` removes what was written.

    Args:
        path: The ``.bin`` file to make; its folder must exist.
        dtype: Of the tokens; ``DType.optimal_dtype`` chooses it from a vocabulary size.

    Raises:
        DataError: Another process is writing the same file.
    """

    def __init__(self, path: str | Path, dtype: np.typing.DTypeLike = np.int32) -> None:
        self._path = Path(path)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._partial = Path(f"{path}.partial")
        self._tokens = _open_alone(self._partial)
        self._lengths = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115
        self._documents = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0
        self._done = False

    def add_item(self, tokens: Any) -> None:
        """Append one sequence to the current document; ``end_document`` closes the document.

        Args:
            tokens: Integers [tokens]: a list, an array or a CPU tensor.

        Raises:
            DataError: An id does not fit the dtype.
        """
        self.add_sequences(np.asarray(tokens), [len(tokens)])

    def add_document(self, tokens: Any, lengths: Sequence[int] | None = None) -> None:
        """Append a document.

        Args:
            tokens: Integers [tokens] of all its sequences.
            lengths: Tokens of each sequence; one sequence if None.
        """
        array = np.asarray(tokens)
        self.add_sequences(array, [len(array)] if lengths is None else lengths)
        self.end_document()

    def add_sequences(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append sequences that lie back to back in ``tokens`` [sum(lengths)]."""
        assert len(tokens) == sum(lengths), f"{len(tokens)=} {sum(lengths)=}"
        self._tokens.write(_cast(tokens, self._dtype).tobytes())
        self._lengths.write(np.asarray(lengths, dtype=LENGTH_DTYPE).tobytes())
        self.num_sequences += len(lengths)
        self.num_tokens += len(tokens)

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of one sequence each, back to back in ``tokens`` [sum(lengths)]."""
        first = self.num_sequences
        self.add_sequences(tokens, lengths)
        self._add_ends(np.arange(first + 1, self.num_sequences + 1))

    def end_document(self) -> None:
        """Close the document that the last sequences belong to."""
        self._add_ends(np.array([self.num_sequences]))

    def _add_ends(self, ends: np.ndarray) -> None:
        self._documents.write(ends.astype(POINTER_DTYPE).tobytes())
        self.num_documents += len(ends)

    def add_index(self, prefix: str | Path) -> None:
        """Append all of another dataset.

        Raises:
            DataError: It has another dtype, or is damaged.
        """
        other = IndexedDataset(prefix)
        other.verify()
        if other.dtype != self._dtype:
            raise DataError(
                f"{prefix} holds {other.dtype.name}, {self._path} holds {self._dtype.name}"
            )
        first = self.num_sequences
        for start in range(0, len(other), CHUNK_ENTRIES):
            self._lengths.write(other.sequence_lengths[start : start + CHUNK_ENTRIES].tobytes())
        for start in range(1, len(other.document_indices), CHUNK_ENTRIES):
            self._add_ends(other.document_indices[start : start + CHUNK_ENTRIES] + first)
        with bin_path(prefix).open("rb") as file:
            shutil.copyfileobj(file, self._tokens, COPY_BYTES)
        self.num_sequences += len(other)
        self.num_tokens += other.num_tokens

    def finalize(self, index_path: str | Path) -> None:
        """Write the index and put both files in place, over what was there."""
        index = Path(index_path)
        partial_index = Path(f"{index_path}.partial")
        with partial_index.open("wb") as file:
            self._write_index(file)
            _flush(file)
        _flush(self._tokens)
        index.unlink(missing_ok=True)  # an old index must never describe the new tokens
        os.replace(self._partial, self._path)
        os.replace(partial_index, index)
        self._done = True
        self._close()

    def _write_index(self, file: IO[bytes]) -> None:
        file.write(IndexHeader(self._dtype, self.num_sequences, self.num_documents + 1).pack())
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, file, COPY_BYTES)
        self._lengths.seek(0)
        place = 0
        while chunk := self._lengths.read(CHUNK_ENTRIES * LENGTH_DTYPE.itemsize):
            lengths = np.frombuffer(chunk, LENGTH_DTYPE)
            ends = place + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            starts = np.concatenate([[place], ends[:-1]])
            file.write(starts.astype(POINTER_DTYPE).tobytes())
            place = int(ends[-1])
        file.write(np.zeros(1, POINTER_DTYPE).tobytes())
        self._documents.seek(0)
        shutil.copyfileobj(self._documents, file, COPY_BYTES)

    def abort(self) -> None:
        """Remove what was written; a finished dataset stays."""
        if not self._done:
            self._partial.unlink(missing_ok=True)
            self._done = True
        self._close()

    def _close(self) -> None:
        for file in (self._tokens, self._lengths, self._documents):
            file.close()

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


def _cast(tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the tokens in ``dtype``; never wraps an id around."""
    if tokens.dtype == dtype or not len(tokens):
        return tokens.astype(dtype, copy=False)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        low, high = tokens.min(), tokens.max()
        if low < limits.min or high > limits.max or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"ids from {low} to {high} ({tokens.dtype.name}) do not fit {dtype.name}, "
                f"which holds {limits.min} to {limits.max}"
            )
    return tokens.astype(dtype)


def _open_alone(partial: Path) -> IO[bytes]:
    """Open a file for writing that no other process is writing."""
    file = partial.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise DataError(f"{partial} is being written by another process") from error
    except OSError:
        pass  # some network file systems have no locks
    file.truncate(0)
    return file


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
