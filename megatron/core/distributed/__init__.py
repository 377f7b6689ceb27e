"""Data parallelism; names are imported when first used."""

from megatron.core.lazy_exports import lazy_exports

__getattr__ = lazy_exports(
    __name__,
    {
        "DistributedDataParallel": "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallelConfig": (
            "megatron.core.distributed.distributed_data_parallel_config"
        ),
        "TorchFullyShardedDataParallel": (
            "megatron.core.distributed.torch_fully_sharded_data_parallel"
        ),
        "finalize_model_grads": "megatron.core.distributed.finalize_model_grads",
    },
)
