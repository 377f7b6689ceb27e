"""What a run leaves behind, said at its end: where the files are, the picture, the time it took."""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.core.timers import Timers
from megatron.training.log_line import format_duration
from megatron.training.plots import plot_run
from megatron.training.run import Run, TrainState

log = logging.getLogger(__name__)


def finish(
    run: Run, state: TrainState, timers: Timers, folder: Path | None, *, vocab_size: int
) -> None:
    """Draw the picture and tell where everything is. Rank 0 only.

    Args:
        run: The run that ended.
        state: Where it ended.
        timers: Seconds by what they were spent on.
        folder: Of the metrics; None when none were kept.
        vocab_size: Ids of the tokenizer.
    """
    spent = {name: timers(name).elapsed() for name in ("setup", "train", "evaluate", "save")}
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items() if seconds)
    total = format_duration(sum(spent.values()))
    log.info(
        "ended at iteration %d of %d in %s: %s", state.iteration, run.train_iters, total, parts
    )
    if run.config.checkpoint.save is not None:
        log.info("  checkpoints  %s", run.config.checkpoint.save)
    if folder is not None:
        log.info("  metrics      %s", folder / "metrics.jsonl")
        try:
            plot = plot_run(folder, title=describe(run), vocab_size=vocab_size)
        except OSError as error:
            log.warning("the plot cannot be written: %s", error)
        else:
            if plot is not None:
                log.info("  plot         %s", plot)
    if run.config.logging.tensorboard_dir is not None:
        log.info("  tensorboard  %s", run.config.logging.tensorboard_dir)


def describe(run: Run) -> str:
    """Return the model in a line, for the title of the picture."""
    model = run.config.model
    text = f"GPT, {model.num_layers} layers, hidden {model.hidden_size}"
    if run.moe_metrics is not None:
        experts, topk = _span(model.moe_experts_by_layer), _span(model.moe_topk_by_layer)
        text += f", {experts} experts top-{topk}"
    ranks = run.world.world_size
    return text + (f", {ranks} ranks" if ranks > 1 else "")


def _span(numbers: Sequence[int]) -> str:
    """Write numbers that are alike as one, others as their range: 8 to 16."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
