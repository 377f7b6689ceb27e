"""What the ranks of one layout do: train and save, or load what every layout saved and go on.

Saves and loads as a run does, by `save_checkpoint` and `load_checkpoint`; batches, model and steps
are those of `tools/layouts/oracle.py`. Ranks are forked, so that they share what is compared with.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.config.run_config import RunConfig
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tools.layouts.oracle import make_run, microbatches
from tools.reshard.blocks import blocks_of, poison
from tools.reshard.differences import (
    ALLOWED,
    Difference,
    Near,
    Tensors,
    of_bits,
    of_facts,
    of_keys,
    of_numbers,
    of_values,
)
from tools.reshard.layouts import MORE_STEPS, SAVED_AT

Step = dict[str, float | None]
"""What a step told: ``lm loss``, ``grad norm``, ``learning rate``."""
FINGERPRINT = "of no data"


class Source(NamedTuple):
    """A checkpoint of one layout, read by the process that forks the ranks."""

    name: str
    folder: Path
    """As --load."""
    facts: dict[str, Any]
    """What of it is no tensor, but for what a layout may change (see ``facts_of``)."""
    tensors: Tensors
    """All of model and optimizer."""
    steps: list[Step]
    """The steps that its own run went on with."""
    end: Tensors
    """All of model and optimizer after them."""


class PairRecord(NamedTuple):
    """What became of a checkpoint on another layout; the same on every rank."""

    source: str
    first: Difference | None = None
    refused: str = ""
    """What `load_checkpoint` said."""
    error: float = 0.0
    """The worst of steps and of the state after them."""
    of: str = ""
    """Name of that."""


class Job(NamedTuple):
    """A layout that loads."""

    config: RunConfig
    sources: list[Source]
    own: str
    """The source of the same layout."""
    want: Source | None
    """The unbroken run of one process; None where steps of other layouts cannot be compared."""
    folder: Path
    """Gets a checkpoint of every pair, and the records."""


def train_and_save(config: RunConfig, folder: Path) -> None:
    """Train, save into ``saved``, train on and save into ``end``; the steps go to ``steps.pt``."""
    run, state = make_run(config), TrainState(dropout_seed=config.training.seed)
    _go_on(run, state, SAVED_AT)
    _save(folder / "saved", run, state, FINGERPRINT)
    steps = _go_on(run, state, MORE_STEPS)
    _save(folder / "end", run, state, FINGERPRINT)
    if dist.get_rank() == 0:
        torch.save(steps, folder / "steps.pt")


def load_each(job: Job) -> None:
    """Load every source, save it again, train on; the records go to ``records.pt``."""
    run = make_run(job.config)
    keys = set().union(*_gathered({key for key, _ in blocks_of(run)}))
    records = [_pair(run, source, keys, job) for source in job.sources]
    if dist.get_rank() == 0:
        torch.save(records, job.folder / "records.pt")


def _pair(run: Run, source: Source, keys: set[str], job: Job) -> PairRecord:
    """Try one source; ``keys`` are those that all ranks hold together."""
    poison(run)
    try:
        loaded = load_checkpoint(
            source.folder, config=run.config, model=run.model, optimizer=run.optimizer
        )
    except CheckpointError as error:
        return PairRecord(source.name, refused=str(error))
    state, when = loaded.state(), "after loading"
    facts = {
        "iteration": loaded.iteration,
        "consumed_train_samples": loaded.consumed_train_samples,
        "dropout_seed": loaded.dropout_seed,
        "data_fingerprint": loaded.data_fingerprint,
        "step_count": run.optimizer.step_count,
        "loss_scale": run.optimizer.grad_scaler.state_dict(),
    }
    stored = {**source.facts, "step_count": source.facts["optimizer"]["step_count"]}
    found = [
        *of_facts(when, facts, {key: stored[key] for key in facts}),
        *of_bits(when, blocks_of(run), source.tensors),
        *of_keys(when, keys, source.tensors),
    ]
    if (first := _first(found)) is not None:
        return PairRecord(source.name, first)
    _save(job.folder / source.name, run, state, loaded.data_fingerprint or "")
    nears = []
    if source.name == job.own:
        nears = _after_steps(run, state, source, 0.0)
    elif job.want is not None:
        nears = _after_steps(run, state, job.want, ALLOWED)
    worst = max(nears, key=lambda near: near.error, default=Near(0.0, "", None))
    first = _first([near.first for near in nears if near.first is not None])
    error, of = max(_gathered((worst.error, worst.key)))
    return PairRecord(source.name, first, error=error, of=of)


def _after_steps(run: Run, state: TrainState, want: Source, allowed: float) -> list[Near]:
    """Train on; compare each step, then everything that this rank holds."""
    steps = _go_on(run, state, MORE_STEPS)
    nears = [
        of_values(f"step {SAVED_AT + number}", mine, theirs, allowed)
        for number, (mine, theirs) in enumerate(zip(steps, want.steps, strict=True), 1)
    ]
    when = f"after step {SAVED_AT + MORE_STEPS}"
    return [*nears, of_numbers(when, blocks_of(run), want.end, allowed)]


def _first(found: Iterable[Difference]) -> Difference | None:
    """Return the first difference of the first rank that has one, on every rank."""
    mine = next(iter(found), None)
    ranks = enumerate(_gathered(mine))
    return next((one._replace(rank=rank) for rank, one in ranks if one is not None), None)


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _go_on(run: Run, state: TrainState, steps: int) -> list[Step]:
    made: list[Step] = []
    for _ in range(steps):
        outcome = train_step(run, state, microbatches(run, state.consumed_samples))
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
        made.append(
            {
                "lm loss": outcome.lm_loss,
                "grad norm": outcome.grad_norm,
                "learning rate": outcome.learning_rate,
            }
        )
    return made


def _save(folder: Path, run: Run, state: TrainState, fingerprint: str) -> None:
    saved = save_checkpoint(
        folder,
        state,
        config=run.config,
        model=run.model,
        optimizer=run.optimizer,
        data_fingerprint=fingerprint,
    )
    if saved.path is None:
        raise CheckpointError(saved.error)
