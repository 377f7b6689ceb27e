"""What is left to do with gradients after the last backward of a step, before the optimizer."""

from megatron.core.distributed.data_parallel_base import DataParallelBase


def finalize_model_grads(ddp: DataParallelBase) -> None:
    """Make gradients complete and equal on all replicas: finish their sums over data ranks."""
    ddp.finish_grad_sync()
