"""Small data sets: documents in memory, and the same on disk."""

from pathlib import Path

import numpy as np

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


class ListDocuments:
    """Documents from a list; a ``DocumentSource``."""

    def __init__(self, documents: list[list[int]]) -> None:
        self._documents = [np.array(document, dtype=np.int32) for document in documents]
        self.sequence_lengths = np.array([len(d) for d in documents], dtype=np.int32)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        tokens = self._documents[index][offset:]
        return tokens if length is None else tokens[:length]


def write_documents(prefix: Path, documents: list[list[int]]) -> str:
    """Write ``prefix.bin`` and ``prefix.idx``; return the prefix."""
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32) as builder:
        for document in documents:
            builder.add_document(np.array(document, dtype=np.int32))
        builder.finalize(f"{prefix}.idx")
    return str(prefix)


def counting_documents(lengths: list[int], eod: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different from each other's, each ended by ``eod``."""
    documents, first = [], 1
    for length in lengths:
        documents.append([*range(first, first + length - 1), eod])
        first += length
    return documents
