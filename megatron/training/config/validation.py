"""Options of evaluation during training."""

from dataclasses import dataclass

from megatron.core.config_field import derived


@dataclass(kw_only=True)
class ValidationConfig:
    """Validation."""

    eval_interval: int | None = None
    """Iterations between evaluations; only at the end when not set."""

    eval_iters: int = derived()
    """Batches of one evaluation; 0 turns evaluation off. When not set, 100 but at most a tenth of
    --train-iters, and 0 without validation data."""
