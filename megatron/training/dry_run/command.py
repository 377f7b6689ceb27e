"""``--dry-run``: all ranks of a run in one process, without data, memory or training."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.core.errors import ConfigError
from megatron.training.config.run_config import RunConfig
from megatron.training.dry_run.census import Census, take_census
from megatron.training.dry_run.matcher import describe
from megatron.training.dry_run.plan import Rehearsal, choose_closeness, rehearse
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.dry_run.recorded_run import Recipe
from megatron.training.dry_run.report import fits, page, same_memory, same_traffic
from megatron.training.run import ForwardStep
from megatron.training.setup_model import ModelProvider

FAILED = 1
"""Exit code of a run that would stand still, or not fit."""


def dry_run(config: RunConfig, provider: ModelProvider, forward_step: ForwardStep) -> int:
    """Look at all ranks of the run, write the report to standard output, return the exit code.

    Args:
        config: Resolved for the ranks of ``--dry-run-world-size``.
        provider: Builds the model of a rank, as in training.
        forward_step: As in training.

    Raises:
        ConfigError: The report cannot be written to ``--dry-run-json``.
    """
    options = config.dry_run
    recipe = Recipe(
        config=config,
        layout=config.model.layout(options.dry_run_world_size or 1),
        model_provider=provider,
        forward_step=forward_step,
        device=device_of(config),
    )
    table = recipe.groups()
    census = take_census(config, provider, table)
    ranks = recipe.layout.dense_grid()["dp"] * config.training.micro_batch_size
    closeness = choose_closeness(census, config.training.global_batch_size // ranks)
    rehearsal = rehearse(recipe, table, census, closeness)
    lines = [f"DRY RUN as on {recipe.device}: nothing is trained", ""]
    lines += page(config, table, census, rehearsal)
    good = rehearsal.problem is None and not census.whole.missing
    if options.dry_run_memory_gib is not None:
        fit, sentence = fits(rehearsal, options.dry_run_memory_gib)
        lines.append(sentence)
        good = good and fit
    sys.stdout.write("\n".join(lines).rstrip() + "\n")
    sys.stdout.flush()
    if options.dry_run_json is not None:
        _write(Path(options.dry_run_json), figures(recipe, census, rehearsal, table))
    return 0 if good else FAILED


def device_of(config: RunConfig) -> str:
    """Return whose kernels are counted: by --device, by the library, or by this machine."""
    where = config.distributed
    if where.device is not None:
        return where.device
    if where.distributed_backend == "nccl" or torch.cuda.is_available():
        return "cuda"
    return "cpu"


def figures(
    recipe: Recipe, census: Census, rehearsal: Rehearsal, table: GroupTable
) -> dict[str, Any]:
    """Return everything that the report says, as plain numbers; bytes, not GiB."""
    return {
        "world_size": recipe.layout.world_size,
        "device": recipe.device,
        "dense_grid": recipe.layout.dense_grid(),
        "expert_grid": recipe.layout.expert_grid(),
        "groups": {
            name: {"of_rank_0": lists[0], "count": len(lists)}
            for name, lists in table.lists.items()
        },
        "parameters": {
            "whole": census.whole.params,
            "dense": census.whole.dense_params,
            "experts": census.whole.expert_params,
            "active": census.whole.active_params,
            "parts": {name: part._asdict() for name, part in census.whole.parts.items()},
            "missing": census.whole.missing,
        },
        "ranks": [
            {
                **{key: value for key, value in dataclasses.asdict(model).items() if key != "kind"},
                "memory_bytes": rehearsal.of(model.rank).memory._asdict(),
            }
            for model in census.ranks
        ],
        "memory": [
            {"ranks": ranks, **rehearsal.of(ranks[0]).memory._asdict()}
            for ranks in same_memory(rehearsal, table)
        ],
        "traffic": [
            {"ranks": ranks, "calls": [row._asdict() for row in rows]}
            for ranks, rows in same_traffic(rehearsal)
        ],
        "closeness": rehearsal.closeness._asdict(),
        "deadlock": None if rehearsal.problem is None else describe(rehearsal.problem),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    except OSError as error:
        raise ConfigError(f"--dry-run-json {path} cannot be written: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no place in a report")
