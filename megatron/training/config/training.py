"""Options of the training loop."""

from dataclasses import dataclass

from megatron.core.config_field import derived


@dataclass(kw_only=True)
class TrainingConfig:
    """Training loop."""

    micro_batch_size: int = derived()
    """Samples that one rank computes at once; when not set, 2 or the largest number below it that
    divides --global-batch-size."""

    global_batch_size: int = derived()
    """Samples of one optimizer step over all ranks; --micro-batch-size x data-parallel size when
    not set."""

    train_iters: int = derived()
    """Optimizer steps of the whole run, resumed steps included; one epoch of the data when not
    set, 100 with --mock-data."""

    exit_interval: int | None = None
    """Save and end the run when the iteration is a multiple of this."""

    exit_duration_in_mins: int | None = None
    """Save and end the run after this many minutes."""

    seed: int = 1234
    """Seed of initial weights, dropout and data order."""

    skip_train: bool = False
    """Load, evaluate and end, without training."""
