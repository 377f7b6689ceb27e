"""Layers, collectives and random numbers of parallel ranks; names are imported when first used."""

from megatron.core.lazy_exports import lazy_exports

__getattr__ = lazy_exports(
    __name__,
    {
        "ColumnParallelLinear": "megatron.core.tensor_parallel.layers.column",
        "RowParallelLinear": "megatron.core.tensor_parallel.layers.row",
        "VocabParallelEmbedding": "megatron.core.tensor_parallel.layers.vocab_embedding",
        "all_to_all": "megatron.core.tensor_parallel.mappings",
        "vocab_parallel_cross_entropy": "megatron.core.tensor_parallel.cross_entropy",
    },
)
