"""Parallel layers under Megatron's import path."""

from megatron.core.tensor_parallel.layers.column import ColumnParallelLinear
from megatron.core.tensor_parallel.layers.linear import Linear
from megatron.core.tensor_parallel.layers.replicated import ReplicatedLinear
from megatron.core.tensor_parallel.layers.row import RowParallelLinear
from megatron.core.tensor_parallel.layers.vocab_embedding import (
    Embedding,
    VocabParallelEmbedding,
)

__all__ = [
    "ColumnParallelLinear",
    "Embedding",
    "Linear",
    "ReplicatedLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]
