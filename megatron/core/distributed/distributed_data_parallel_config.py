"""Options of gradient reduction over data-parallel ranks."""

from dataclasses import dataclass, field

from megatron.core.config_field import flag


@dataclass(kw_only=True)
class DistributedDataParallelConfig:
    """Data parallelism."""

    overlap_grad_reduce: bool = False
    """Reduce each bucket of gradients as soon as backward has filled it, not all at the end."""

    use_distributed_optimizer: bool = False
    """Share main weights and moments of the optimizer over data-parallel ranks (ZeRO-1): each
    steps its slice of every bucket, and the ranks gather the weights."""

    overlap_param_gather: bool = False
    """Gather updated weights while the next forward runs, each bucket just before its first use."""

    use_torch_fsdp2: bool = False
    """Share weights, gradients and moments out over data-parallel ranks (ZeRO-3): each layer is
    gathered by torch's fully_shard while it computes, forward and backward."""

    torch_fsdp2_no_reshard_after_forward: bool = False
    """With --use-torch-fsdp2, keep layers whole between forward and backward: one gather less, for
    the memory of all layers."""

    bucket_size: int | None = field(default=None, metadata=flag("--ddp-bucket-size"))
    """Parameters in a bucket; max(40,000,000, 1,000,000 x data-parallel size) when not set."""
