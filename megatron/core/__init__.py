"""Everything but one run: models, layers, data, optimizers. Names are imported when first used."""

from megatron.core.lazy_exports import lazy_exports

__getattr__ = lazy_exports(
    __name__,
    {
        "ModelParallelConfig": "megatron.core.model_parallel_config",
        "Timers": "megatron.core.timers",
        "mpu": "megatron.core.parallel_state",
        "parallel_state": "megatron.core.parallel_state",
        "tensor_parallel": "megatron.core.tensor_parallel",
    },
)
