"""Rules of upcycling a dense checkpoint at the start of a run; each yields sentences."""

from collections.abc import Iterator
from pathlib import Path

from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.errors import CheckpointError
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.checks import Check, Rule
from megatron.training.resume_rules import config_from_data
from megatron.training.starting_point import StartingPoint, starting_point, stored_facts
from megatron.training.upcycling.widths import fitting_problems

FLAG = "--moe-use-upcycling"


def upcycling(check: Check) -> Iterator[str]:
    """A dense model becomes experts once, in a folder of its own."""
    options = check.config.checkpoint
    if not options.moe_use_upcycling:
        yield from check.useless("moe_upcycling_granularity", f"without {FLAG}")
        return
    if options.save is None:
        yield f"{FLAG} needs --save: the upcycled model is written there before training begins"
    if options.load is None and options.pretrained_checkpoint is None:
        yield f"{FLAG} needs the dense checkpoint: --load, or --pretrained-checkpoint"
    same = options.load is not None and options.load == options.save
    if same and options.pretrained_checkpoint is None:
        yield (
            f"{FLAG} writes a model of its own: {check.show('save')} must not be the folder of the "
            "dense one"
        )
    elsewhere = options.load is not None and options.load != options.save
    if elsewhere and options.pretrained_checkpoint is not None:
        yield (
            f"{FLAG} with --pretrained-checkpoint needs {check.show('load')} to be "
            f"{check.show('save')}: later starts go on from there"
        )
    for name in ("save", "load", "pretrained_checkpoint"):
        value = getattr(options, name)
        if value is not None and not isinstance(place(value), Path):
            yield f"{FLAG} works in folders: {check.show(name)} is a URL"
    if options.pretrained_checkpoint is None:
        yield from check.useless("allow_fresh_start", f"with {FLAG}, which needs the checkpoint")


def upcycling_fits(check: Check) -> Iterator[str]:
    """The experts must be able to grow out of what lies on the disk."""
    options, model = check.config.checkpoint, check.config.model
    if not options.moe_use_upcycling or model.num_moe_experts is None:
        return
    if any(model.moe_problems()) or any(model.layer_problems()):
        return  # said by other rules
    try:
        start = starting_point(options)
        if start is None or goes_on(start, options):
            return
        facts = stored_facts(start)
        dense = config_from_data(facts["config"]).model
    except CheckpointError as error:
        yield f"{FLAG}: {error}"
        return
    if start.is_huggingface:  # read in the number format of the run
        dense.bf16, dense.fp16, dense.fp64 = model.bf16, model.fp16, model.fp64
    for problem in fitting_problems(dense, model, options.moe_upcycling_granularity):
        yield f"{FLAG}: {problem}"


def goes_on(start: StartingPoint, options: CheckpointConfig) -> bool:
    """Tell whether a run begins with an upcycled model of its own, not with the dense one."""
    if options.pretrained_checkpoint is None or options.load is None:
        return False
    return start.folder == place(options.load)


UPCYCLING_RULES: tuple[Rule, ...] = (upcycling, upcycling_fits)

UPCYCLING_RULES_OF_FOLDERS: tuple[Rule, ...] = (upcycling_fits,)
"""Those that read disks. What they say is the same for every layout."""
