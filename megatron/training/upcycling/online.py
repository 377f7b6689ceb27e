"""--moe-use-upcycling: the first rank makes the upcycled checkpoint, all ranks begin with it."""

import logging
import time
from dataclasses import replace
from pathlib import Path

from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import attempt, broadcast, rank_in
from megatron.core.dist_checkpointing.object_folders import place
from megatron.training.config.run_config import RunConfig
from megatron.training.config.upcycling_rules import goes_on
from megatron.training.starting_point import starting_point
from megatron.training.upcycling.dense_source import dense_source
from megatron.training.upcycling.preservation import Recipe, folds, tokens_crowd
from megatron.training.upcycling.writing import ITERATION, refuse_used, write_upcycled

log = logging.getLogger(__name__)
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def after_upcycling(config: RunConfig, group: ProcessGroup | None) -> RunConfig:
    """Upcycle the dense checkpoint of ``config``, unless the run goes on from its own.

    Every rank of ``group`` calls this; the first works, the others wait.

    Returns:
        The options with which the run loads its weights: those of ``config`` where it does not ask
        for upcycling.

    Raises:
        CheckpointError: On every rank: nothing there, damaged, or --save cannot be written.
    """
    options = config.checkpoint
    if not options.moe_use_upcycling:
        return config
    made = attempt(lambda: rank_in(group) == 0 and _upcycled(config), group)
    if not broadcast(made, group):
        log.info(" > --moe-use-upcycling: the run goes on from --load %s", options.load)
        return config
    start = replace(
        options, load=options.save, pretrained_checkpoint=None, ckpt_step=ITERATION, finetune=True
    )
    return replace(config, checkpoint=start)


def _upcycled(config: RunConfig) -> bool:
    """Write the upcycled checkpoint; False where the run has one of its own to go on from."""
    options, model, begin = config.checkpoint, config.model, time.perf_counter()
    start = starting_point(options)
    assert start is not None, "a rule asks for it"
    assert options.save is not None, "a rule asks for it"
    if goes_on(start, options):
        return False
    recipe = Recipe(granularity=options.moe_upcycling_granularity, seed=config.training.seed)
    folder = place(options.save)
    assert isinstance(folder, Path), "a rule refuses URLs"
    refuse_used(folder)
    line = f"upcycled at the start of a run from {start.path}"
    with dense_source(
        start.folder,
        start.iteration,
        scratch=folder,
        dtype=_DTYPES[model.params_dtype_name],
        vocab_size=config.tokenizer.padded_vocab_size,
    ) as source:
        path, size = write_upcycled(source, folder, config, recipe, history=line, origin=start.path)
    seconds = time.perf_counter() - begin
    log.info("upcycled %s to %s (%.1f MiB, %.1f s)", start.path, path, size / 2**20, seconds)
    if folded := sorted(set(folds(model, recipe.granularity).values()) - {1.0}):
        log.info(
            " > second matrices of experts are multiplied by %s, so that the model computes what "
            "it did; --moe-router-topk-scaling-factor would leave them as they are",
            ", ".join(f"{factor:g}" for factor in folded),
        )
    if any(tokens_crowd(model.for_layer(layer)) for layer in model.moe_layers):
        log.warning(
            "upcycling begins with equal scores, and scores choose experts here: all tokens begin "
            "at the first ones"
        )
    return True
