"""Options of checkpoints."""

from dataclasses import dataclass, field

from megatron.core.config_field import flag


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpointing."""

    save: str | None = None
    """Folder to write checkpoints to, or URL of an object store such as s3://bucket/run (needs the
    extra ``object-store``); none are written when not set."""

    save_interval: int | None = None
    """Iterations between checkpoints; only at the end when not set."""

    async_save: bool = False
    """Copy the state and write it in the background while training goes on; one at a time."""

    keep_last: int | None = None
    """Keep only this many of the newest checkpoints, not counting those of later iterations that
    an earlier run left; all when not set."""

    load: str | None = None
    """Folder or URL to resume from, at its newest checkpoint. The run ends if there is none, unless
    --allow-fresh-start."""

    ckpt_step: int | None = None
    """Iteration to load instead of the newest."""

    allow_fresh_start: bool = False
    """Start from the beginning when --load holds no checkpoint yet."""

    finetune: bool = False
    """Load weights only: iteration, optimizer, data position and random state start anew."""

    no_load_optim: bool = field(default=False, metadata=flag("--no-load-optim"))
    """Do not load the optimizer's state."""

    no_load_rng: bool = field(default=False, metadata=flag("--no-load-rng"))
    """Do not load the random state: dropout goes on with a fresh stream."""

    no_save_optim: bool = field(default=False, metadata=flag("--no-save-optim"))
    """Leave the optimizer's state out of checkpoints."""

    no_save_rng: bool = field(default=False, metadata=flag("--no-save-rng"))
    """Leave the random state out of checkpoints."""

    override_opt_param_scheduler: bool = field(
        default=False,
        metadata=flag("--override-opt_param-scheduler", "--override-opt-param-scheduler"),
    )
    """On resume, take learning-rate and weight-decay settings from the command line instead of
    refusing settings that differ from the checkpoint's."""
