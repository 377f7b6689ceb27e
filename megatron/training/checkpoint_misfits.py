"""What keeps a run from going on from a checkpoint, said at once and before anything is read."""

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.store import OpenCheckpoint
from megatron.core.errors import CheckpointError
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import (
    architecture,
    architecture_problems,
    schedule_problems,
    stored_architecture,
    tokenizer_problem,
)


def refuse_misfits(
    opened: OpenCheckpoint,
    config: RunConfig,
    tokenizer: dict[str, Any] | None,
    with_optim: bool,
    with_rng: bool,
) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Args:
        opened: The checkpoint.
        config: Of this run.
        tokenizer: Facts of this run's; see ``tokenizer_facts``.
        with_optim: The optimizer's state will be loaded.
        with_rng: The random state will be loaded.

    Raises:
        CheckpointError: One error with everything that differs, both values each.
    """
    common = opened.common
    problems = list(architecture_problems(stored_architecture(common), architecture(config.model)))
    if problem := tokenizer_problem(common["tokenizer"], tokenizer):
        problems.append(problem)
    problems += _vocabulary_problems(common, config)
    if with_rng and common["dropout_seed"] is None:
        problems.append("it was saved with --no-save-rng: add --no-load-rng")
    if with_optim:
        problems += _optimizer_problems(common, config)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(f"{opened.path} does not fit this run:{listed}")


def _vocabulary_problems(common: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Refuse another end of the vocabulary: the softmax would be over other tokens."""
    then = common["config"].get("tokenizer", {}).get("unpadded_vocab_size")
    now = config.tokenizer.unpadded_vocab_size
    if then is not None and now is not None and then != now:
        yield (
            f"--unpadded-vocab-size is {then} in the checkpoint and {now} in this run: give it, or "
            "take it by --use-checkpoint-args"
        )


def softmax_notices(common: dict[str, Any], config: RunConfig) -> list[str]:
    """Tell where padding of the vocabulary had a share in the softmax of an older version.

    Args:
        common: The ``common.json`` of the checkpoint.
        config: Of this run.
    """
    is_older = "unpadded_vocab_size" not in common["config"].get("tokenizer", {})
    rows, tokens = common.get("padded_vocab_size"), config.tokenizer.unpadded_vocab_size
    if not is_older or rows is None or tokens is None or tokens >= rows:
        return []
    return [
        f"saved when the softmax was over all {rows} rows of the vocabulary, padding too; now it "
        f"is over {tokens}, and losses are a little lower (--unpadded-vocab-size {rows} as before)"
    ]


def _optimizer_problems(common: dict[str, Any], config: RunConfig) -> Iterator[str]:
    stored = common["optimizer"]
    if stored is None:
        yield "it was saved with --no-save-optim: add --no-load-optim"
    elif stored["kind"] != config.optimizer.optimizer:
        yield (
            f"--optimizer is {stored['kind']} in the checkpoint and "
            f"{config.optimizer.optimizer} in this run (--no-load-optim starts a new optimizer)"
        )
    if not config.checkpoint.override_opt_param_scheduler:
        for problem in schedule_problems(common, config):
            yield f"{problem} (--override-opt_param-scheduler takes this run's)"
