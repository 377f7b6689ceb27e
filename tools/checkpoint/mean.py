"""Weighted means of checkpoints, tensor by tensor: what is averaged, and what is not."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import CheckpointError, ConfigError
from megatron.training.resume_rules import architecture_problems, stored_architecture
from tools.checkpoint.keys import main_key, model_order, parts_of
from tools.checkpoint.rewrite import Made, copied

_SHOWN = 5


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights as shares of their sum.

    Raises:
        ConfigError: One is negative or no number, or all are 0.
    """
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise ConfigError(f"weights {', '.join(map(str, weights))}: 0 or more each, not all 0")
    return [weight / sum(weights) for weight in weights]


def exponential(decay: float, number: int) -> list[float]:
    """Return the shares of an exponential mean that began with the first of ``number`` values.

    Each later value x makes it ``decay * mean + (1 - decay) * x``.

    Raises:
        ConfigError: ``decay`` is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise ConfigError(f"--ema {decay} must lie between 0 and 1; 0.9 is a usual start")
    later = [(1 - decay) * decay ** (number - 1 - place) for place in range(1, number)]
    return [decay ** (number - 1), *later]


def refuse_others(sources: Sequence[StoredCheckpoint]) -> None:
    """Refuse to average models that are not one and the same.

    Raises:
        CheckpointError: Names what differs: flags of the architecture, tokenizer, tensors.
    """
    first, problems = sources[0], []
    for other in sources[1:]:
        found = [
            problem.replace(" in the checkpoint", f" in {first.path}").replace(
                " in this run", f" in {other.path}"
            )
            for problem in architecture_problems(
                stored_architecture(first.common), stored_architecture(other.common)
            )
        ]
        prints = [(c.common["tokenizer"] or {}).get("fingerprint") for c in (first, other)]
        if prints[0] != prints[1]:
            found.append(f"{other.path} has another tokenizer than {first.path}")
        problems += found or _key_problems(first, other)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else ""
        raise CheckpointError(f"only checkpoints of one model have a mean:{listed}{more}")


def mean_tensors(
    sources: Sequence[StoredCheckpoint], weights: Sequence[float], *, with_optim: bool
) -> dict[str, Made]:
    """Return the tensors of the mean.

    Sums are made in fp64 and rounded once. Where all have main weights, the mean of a weight is
    that of its main weights. Expert biases and prices are averaged as weights are. Random states,
    and tensors that are no real numbers, are those of the last.

    Args:
        sources: Of one model; the last stands for what has no mean.
        weights: Shares, which sum to 1.
        with_optim: Average the state of the optimizer too.
    """
    last = sources[-1]
    made = {}
    for key in sorted(last.keys, key=model_order):
        parts, facts = parts_of(key), last.facts(key)
        if parts.is_optimizer and not with_optim:
            continue
        if parts.kind == "rng" or not facts.dtype.is_floating_point:
            made[key] = copied(last, key)
            continue
        origin = key
        if parts.kind == "model" and all(main_key(key) in source.index for source in sources):
            origin = main_key(key)
        made[key] = Made(facts, partial(_mean, sources, weights, origin, facts.dtype))
    return made


def mean_common(sources: Sequence[StoredCheckpoint], *, with_optim: bool) -> dict[str, Any]:
    """Return the common data of the mean: that of the last."""
    common: Mapping[str, Any] = sources[-1].common
    return {**common, "optimizer": common["optimizer"] if with_optim else None}


def _mean(
    sources: Sequence[StoredCheckpoint],
    weights: Sequence[float],
    key: str,
    dtype: torch.dtype,
) -> Tensor:
    total = torch.zeros(sources[-1].facts(key).shape, dtype=torch.float64)
    for source, weight in zip(sources, weights, strict=True):
        if weight:
            total.add_(source.read(key), alpha=weight)
    return total.to(dtype)


def _key_problems(first: StoredCheckpoint, other: StoredCheckpoint) -> list[str]:
    mine, its = (
        {key: c.facts(key) for key in c.keys if parts_of(key).kind == "model"}
        for c in (first, other)
    )
    lines = [f"{key} is only in {first.path}" for key in mine.keys() - its.keys()]
    lines += [f"{key} is only in {other.path}" for key in its.keys() - mine.keys()]
    lines += [
        f"{key} is {mine[key]} in {first.path} and {its[key]} in {other.path}"
        for key in mine.keys() & its.keys()
        if mine[key] != its[key]
    ]
    return sorted(lines)
