"""Options of checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from megatron.core.config_field import flag
from megatron.training.config.upcycling import UpcyclingConfig


@dataclass(kw_only=True)
class CheckpointConfig(UpcyclingConfig):
    """Checkpointing."""

    save: str | None = None
    """Folder to write checkpoints to, or URL of an object store such as s3://bucket/run (needs the
    extra ``object-store``); none are written when not set."""

    save_hf: str | None = None
    """Folder to write the trained model to when training is over, as Hugging Face has it:
    config.json, safetensors, tokenizer. Made of the last checkpoint of --save; the folder must not
    be there yet, or be empty."""

    save_interval: int | None = field(
        default=None, metadata=flag("--save-interval", "--persistent-save-interval")
    )
    """Iterations between checkpoints; only at the end when not set."""

    async_save: bool = False
    """Copy the state and write it in the background while training goes on; one at a time."""

    keep_last: int | None = None
    """Keep only this many of the newest checkpoints, not counting those of later iterations that
    an earlier run left; all when not set."""

    save_retain_interval: int | None = None
    """Keep checkpoints whose iteration is a multiple of this for good. The one saved before goes
    when a new one is there, or with --keep-last all but that many of the newest."""

    non_persistent_save_interval: int | None = None
    """Iterations between checkpoints of which only the newest is kept, beside those of
    --save-interval: less work is lost when a process dies. None when not set."""

    non_persistent_ckpt_type: Literal["global", "local", "in_memory"] | None = None
    """Where those go: global is a folder that all nodes share; local a folder of each node, which
    gets what its own ranks hold; in_memory the same in /dev/shm, which outlives a process but not
    its node. On --load the newest of them is taken if it is newer than the persistent ones; local
    and in_memory ones only with the same ranks and parallel sizes."""

    non_persistent_global_ckpt_dir: str | None = None
    """Folder of --non-persistent-ckpt-type global, in which each run has a folder of its own;
    non_persistent in --save when not set."""

    non_persistent_local_ckpt_dir: str | None = None
    """Folder of --non-persistent-ckpt-type local, on a disk of each node."""

    load: str | None = None
    """Folder or URL to resume from, at its newest checkpoint. The run ends if there is none, unless
    --allow-fresh-start."""

    ckpt_step: int | None = None
    """Iteration to load instead of the newest."""

    allow_fresh_start: bool = False
    """Start from the beginning when --load holds no checkpoint yet."""

    pretrained_checkpoint: str | None = None
    """Begin with the weights of this checkpoint, or of the newest in this folder, as long as --load
    holds none: as --finetune does, but only at the first start."""

    use_checkpoint_args: bool = False
    """Take from the checkpoint that the run begins with what its model and tokenizer are; options
    given on the command line or by --yaml-cfg stay."""

    use_mp_args_from_checkpoint_args: bool = False
    """Take the sizes and ways of model parallelism too, with --use-checkpoint-args."""

    use_tokenizer_model_from_checkpoint_args: bool = True
    """Taking the tokenizer's files with --use-checkpoint-args; without, they are those that are
    given or noted beside the data."""

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

    use_checkpoint_opt_param_scheduler: bool = field(
        default=False,
        metadata=flag(
            "--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler"
        ),
    )
    """On resume, take learning-rate and weight-decay settings from the checkpoint, whatever the
    command line says."""
