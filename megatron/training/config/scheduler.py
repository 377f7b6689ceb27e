"""Options of the learning-rate and weight-decay schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.config_field import derived


@dataclass(kw_only=True)
class SchedulerConfig:
    """Learning rate and weight decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay from --lr to --min-lr."""

    lr_decay_iters: int = derived()
    """Iterations over which the learning rate decays; --train-iters when not set."""

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from --lr-warmup-init."""

    lr_warmup_fraction: float | None = None
    """Warm-up as a share of --lr-decay-iters, instead of --lr-warmup-iters."""

    lr_warmup_init: float = 0.0
    """Learning rate at which warm-up begins."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay of WSD."""

    lr_wsd_decay_iters: int | None = None
    """Iterations of the final decay of WSD; needed with --lr-decay-style WSD."""

    start_weight_decay: float | None = None
    """Weight decay at the first step; --weight-decay when not set."""

    end_weight_decay: float | None = None
    """Weight decay at the last step; --weight-decay when not set."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the way from --start-weight-decay to --end-weight-decay."""
