"""Tokens on disk: Megatron's ``.bin``/``.idx`` pairs, and what is known about them."""

from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.format import DType
from megatron.core.datasets.indexed_dataset.locate import find_prefix
from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.datasets.indexed_dataset.sidecar import Sidecar, read_sidecar

__all__ = [
    "DType",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Sidecar",
    "find_prefix",
    "read_sidecar",
]
