"""What is left to do with gradients after the last backward of a step, before the optimizer."""

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel


def finalize_model_grads(ddp: DistributedDataParallel) -> None:
    """Make gradients complete and equal on all replicas: finish their sums over data ranks."""
    ddp.finish_grad_sync()
