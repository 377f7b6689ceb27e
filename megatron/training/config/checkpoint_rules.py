"""Rules of what is kept of checkpoints, and of what is taken from one; each yields sentences."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.errors import CheckpointError, ConfigError
from megatron.training.config.checks import Check, Rule
from megatron.training.huggingface_family import fitting_family, options_of_checkpoint
from megatron.training.starting_point import starting_point

MEMORY = Path("/dev/shm")
"""A file system in memory, on every Linux."""


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


def between(check: Check) -> Iterator[str]:
    """Checkpoints between the persistent ones have a time and a place."""
    options = check.config.checkpoint
    kind, every = options.non_persistent_ckpt_type, options.non_persistent_save_interval
    for wanted in ("global", "local"):
        if kind != wanted:
            yield from check.useless(
                f"non_persistent_{wanted}_ckpt_dir", f"without --non-persistent-ckpt-type {wanted}"
            )
    if every is not None and kind is None:
        yield (
            f"{check.show('non_persistent_save_interval')} needs --non-persistent-ckpt-type: "
            "global (a shared folder), local (a folder of each node) or in_memory"
        )
    if every is not None and options.save_interval and every % options.save_interval == 0:
        yield (
            f"{check.show('non_persistent_save_interval')} has no effect with "
            f"{check.show('save_interval')}, which saves at all of them; make it smaller"
        )
    if every is None and options.load is None:
        yield from check.useless(
            "non_persistent_ckpt_type", "without --non-persistent-save-interval or --load"
        )
    if kind == "local" and options.non_persistent_local_ckpt_dir is None:
        yield "--non-persistent-ckpt-type local needs --non-persistent-local-ckpt-dir"
    if kind == "in_memory" and not MEMORY.is_dir():
        yield (
            f"--non-persistent-ckpt-type in_memory needs {MEMORY}, a file system in memory, which "
            "this machine does not have; local takes any folder"
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


def huggingface(check: Check) -> Iterator[str]:
    """What --save-hf writes must be possible, and said before training and not after it."""
    options = check.config.checkpoint
    if options.save_hf is None:
        return
    shown = check.show("save_hf")
    if options.save is None:
        yield f"{shown} needs --save: it is made of the last checkpoint"
    for flag, text in (("--save", options.save), ("--save-hf", options.save_hf)):
        if text is not None and not isinstance(place(text), Path):
            yield f"{shown} is not offered with {flag} {text} in an object store; use a folder"
    if check.config.training.skip_train:
        yield f"{shown} has no effect with --skip-train; tools/checkpoint/convert.py exports"
    if importlib.util.find_spec("safetensors") is None:
        yield f"{shown} needs the package safetensors: pip install 'megatron-moe[huggingface]'"
    rows = check.config.tokenizer.padded_vocab_size
    try:
        fitting_family(check.config, options_of_checkpoint(check.config, rows))
    except ConfigError as error:
        yield f"{shown}: no family of Hugging Face's is this model: {'; '.join(error.problems)}"


def huggingface_target(check: Check) -> Iterator[str]:
    """--save-hf writes where nothing is."""
    target = check.config.checkpoint.save_hf
    if target is None or not isinstance(place(target), Path):
        return
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        yield f"{check.show('save_hf')} is there already and not empty; delete it or give another"


CHECKPOINT_RULES: tuple[Rule, ...] = (
    retention,
    between,
    taken_options,
    pretrained,
    pretrained_is_there,
    huggingface,
    huggingface_target,
)

CHECKPOINT_RULES_OF_FOLDERS: tuple[Rule, ...] = (pretrained_is_there, huggingface_target)
"""Those that read disks. What they say is the same for every layout."""
