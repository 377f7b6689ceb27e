"""Options of gradient reduction over data-parallel ranks."""

from dataclasses import dataclass, field

from megatron.core.config_field import flag


@dataclass(kw_only=True)
class DistributedDataParallelConfig:
    """Data parallelism."""

    overlap_grad_reduce: bool = False
    """Reduce each bucket of gradients as soon as backward has filled it, not all at the end."""

    bucket_size: int | None = field(default=None, metadata=flag("--ddp-bucket-size"))
    """Parameters in a bucket; max(40,000,000, 1,000,000 x data-parallel size) when not set."""
