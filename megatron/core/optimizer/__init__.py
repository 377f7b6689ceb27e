"""Optimizers over flat buffers; names are imported when first used."""

from megatron.core.lazy_exports import lazy_exports

__getattr__ = lazy_exports(
    __name__,
    {
        "MegatronOptimizer": "megatron.core.optimizer.optimizer",
        "OptimizerConfig": "megatron.core.optimizer.optimizer_config",
        "get_megatron_optimizer": "megatron.core.optimizer.optimizer",
    },
)
