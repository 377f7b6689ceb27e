"""What a run says before it begins: fresh or resumed, its options, what was chosen for it."""

import logging

from megatron.core.dist_checkpointing.agreement import attempt
from megatron.core.dist_checkpointing.folders import prove_writable
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.errors import CheckpointError
from megatron.core.extensions import registry
from megatron.core.log import banner
from megatron.training.checkpointing import world_group
from megatron.training.config.run_config import RunConfig
from megatron.training.fused_kernels import announced
from megatron.training.initialize import Launch
from megatron.training.start_clock import start_clock
from megatron.training.starting_point import starting_point, takes_newer

log = logging.getLogger(__name__)


def start_line(config: RunConfig, launch: Launch) -> str:
    """Return the first line of the log: fresh, or resuming at which step from where.

    Args:
        config: Of the run.
        launch: Says whether torchrun starts these ranks for the first time.

    Raises:
        CheckpointError: The folder of --load is damaged.
    """
    line = _where(config)
    if launch.restarts:
        line += f"; restart {launch.restarts} of at most {launch.max_restarts} by torchrun"
    return line


def _where(config: RunConfig) -> str:
    options = config.checkpoint
    start = starting_point(options)
    if start is None and options.load is None:
        return "starting a fresh run at iteration 0 (no --load)"
    kind = options.non_persistent_ckpt_type if takes_newer(options) else None
    between = f", unless a newer {kind} checkpoint is there" if kind else ""
    if start is None:
        why = f"{options.load} holds no checkpoint yet"
        return f"starting a fresh run at iteration 0 ({why}){between}"
    own = options.load is not None and start.folder == place(options.load)
    if start.weights_only and not own:
        why = f"{options.load} holds no checkpoint yet" if options.load else "no --load"
        return f"finetuning at iteration 0 with the weights of {start.path} ({why}){between}"
    if options.finetune or start.weights_only:
        return f"finetuning at iteration 0 with the weights of {start.path}"
    return f"resuming at iteration {start.iteration} from {start.path}{between}"


def ready(config: RunConfig) -> None:
    """Show the options, then prove that --save can be written; every rank must call this.

    Raises:
        CheckpointError: It cannot; see ``prove_store``.
    """
    tell_options(config)
    prove_store(config)
    start_clock.mark("tokenizer")


def prove_store(config: RunConfig) -> None:
    """Write to the object store of --save and delete that again; every rank must call this.

    Raises:
        CheckpointError: Some rank cannot; the same on all, before anything is computed.
    """
    save = config.checkpoint.save
    if save is not None:
        attempt(lambda: _prove(save), world_group())


def _prove(save: str) -> None:
    try:
        prove_writable(place(save))
    except OSError as error:
        raise CheckpointError(f"--save {save} cannot be written: {error.strerror}") from error


def tell_options(config: RunConfig) -> None:
    """Show every option with its value, and whence it came unless it is the default."""
    rows = []
    for name, value in config.flat().items():
        source = config.sources.get(name, "default")
        rows.append((name, str(value) if source == "default" else f"{value}  ({source})"))
    log.info("%s", banner("arguments", rows))
    log.info("  %-16s %-14s %s", "op", "chosen", "why (also known)")
    for choice in registry.table({"grouped_mm": config.model.moe_grouped_mm_backend}):
        why = f"{choice.why} ({choice.also_known})"
        log.info("  %-16s %-14s %s", choice.op, choice.chosen, why)
    for kernel in announced(config):
        log.info("  %-16s %-14s %s", *kernel)
    for notice in config.notices:
        log.info(" > %s", notice)
