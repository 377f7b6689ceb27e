"""Rules of what is kept of checkpoints, and of what is taken from one; each yields sentences."""

from collections.abc import Iterator

from megatron.core.errors import CheckpointError
from megatron.training.config.checks import Check, Rule
from megatron.training.starting_point import starting_point


def retention(check: Check) -> Iterator[str]:
    """A checkpoint to keep must be one that is saved."""
    options = check.config.checkpoint
    if options.save is None or options.save_retain_interval is None:
        return  # without --save nothing is kept, and another rule says so
    if options.save_interval is None:
        yield (
            f"{check.show('save_retain_interval')} needs --save-interval: without it there is one "
            "checkpoint, at the end"
        )
    elif options.save_retain_interval % options.save_interval:
        yield (
            f"{check.show('save_retain_interval')} must be a multiple of "
            f"{check.show('save_interval')}: others are never saved"
        )


def taken_options(check: Check) -> Iterator[str]:
    """What is taken from a checkpoint is said once, and by the flag that takes it."""
    options = check.config.checkpoint
    if not options.use_checkpoint_args:
        yield from check.useless(
            "use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args",
            "without --use-checkpoint-args",
        )
    if options.override_opt_param_scheduler and options.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt_param-scheduler takes the schedule of the command line and "
            "--use-checkpoint-opt_param-scheduler that of the checkpoint: give one of them"
        )


def pretrained(check: Check) -> Iterator[str]:
    """--pretrained-checkpoint is for the first start, and then has to be there."""
    options = check.config.checkpoint
    if options.pretrained_checkpoint is None or options.load is None:
        return  # without --load another rule says of these options that they have no effect
    if options.finetune:
        yield (
            f"{check.show('pretrained_checkpoint')} and --finetune exclude each other: the former "
            "begins anew at the first start only, the latter at each; leave --finetune out"
        )
    if options.ckpt_step is not None:
        yield (
            f"{check.show('ckpt_step')} has no effect with --pretrained-checkpoint, whose folder "
            "may be one checkpoint, such as DIR/iter_0000010"
        )
    yield from check.useless(
        "allow_fresh_start", "with --pretrained-checkpoint, which the first start takes"
    )


def pretrained_is_there(check: Check) -> Iterator[str]:
    """What the first start takes must be there at the first start."""
    options = check.config.checkpoint
    if options.pretrained_checkpoint is None:
        return
    try:
        start = starting_point(options)
        found = start and start.path
    except CheckpointError as error:
        yield str(error)
        return
    if found is None:
        yield f"{check.show('pretrained_checkpoint')} has no checkpoint"


CHECKPOINT_RULES: tuple[Rule, ...] = (retention, taken_options, pretrained, pretrained_is_there)

CHECKPOINT_RULES_OF_FOLDERS: tuple[Rule, ...] = (pretrained_is_there,)
"""Those that read disks. What they say is the same for every layout."""
