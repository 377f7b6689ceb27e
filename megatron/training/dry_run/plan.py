"""Which ranks are recorded, and how closely; which recording stands for a rank that is not."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron.training.dry_run.census import Census
from megatron.training.dry_run.events import Event
from megatron.training.dry_run.matcher import Problem, find_problem
from megatron.training.dry_run.rank_groups import GroupTable, RankGroup
from megatron.training.dry_run.recorded_run import Recipe, RecordedStep, record_step
from megatron.training.dry_run.replay import Replay

SMALL_WORLD = 64
"""Up to so many ranks each is recorded by itself, where that takes no longer than ``PATIENCE``."""
SECONDS_A_LAYER = 0.12
"""One layer, forward and backward, without data, on one core."""
PATIENCE_SECONDS = 40.0


class Closeness(NamedTuple):
    """How closely the step of the ranks is looked at."""

    every_rank: bool
    """Else one rank of each kind and place."""
    every_pass: bool
    """Every layer in every microbatch is run; else a layer's first pass stands for others."""
    every_layer: bool
    """Else layers that are alike count as one."""

    def sentence(self) -> str:
        """Say it."""
        ranks = "every rank" if self.every_rank else "one rank of each kind and place, and the last"
        if self.every_pass:
            return f"{ranks}, every layer, every microbatch"
        return f"{ranks}, {'every layer' if self.every_layer else 'every kind of layer'} once"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The recorded steps of a world."""

    steps: dict[int, RecordedStep]
    """Recorded rank -> its step."""
    stands_for: tuple[int, ...]
    """Rank -> the recorded rank that does the same."""
    closeness: Closeness
    seconds: float
    problem: Problem | None

    def of(self, rank: int) -> RecordedStep:
        """Return the step of ``rank``, or of the rank that stands for it."""
        return self.steps[self.stands_for[rank]]


def choose_closeness(census: Census, num_microbatches: int) -> Closeness:
    """Return the closest look that takes no longer than ``PATIENCE_SECONDS``."""
    layers = sum(len(rank.layers) for rank in census.ranks)
    small = len(census.ranks) <= SMALL_WORLD
    if small and layers * num_microbatches * SECONDS_A_LAYER < PATIENCE_SECONDS:
        return Closeness(True, True, True)
    if small and layers * 2 * SECONDS_A_LAYER < PATIENCE_SECONDS:
        return Closeness(True, False, True)
    few = len(census.ranks) <= 16 and layers * SECONDS_A_LAYER < PATIENCE_SECONDS
    return Closeness(few, False, False)


def rehearse(
    recipe: Recipe,
    table: GroupTable,
    census: Census,
    closeness: Closeness,
    tell: Callable[[str], None] = lambda _: None,
) -> Rehearsal:
    """Record the ranks, and play all of them against each other.

    Args:
        recipe: Of the run.
        table: Groups of all ranks.
        census: What all ranks hold.
        closeness: How closely to look.
        tell: Told of progress.
    """
    begun = time.monotonic()
    stands_for = _representatives(census, table, closeness)
    replays: dict[object, Replay] = {}
    steps: dict[int, RecordedStep] = {}
    one: dict[Event, Event] = {}  # equal events of several ranks are one object, told apart by id
    for rank in sorted(set(stands_for)):
        replay = None
        if not closeness.every_pass:
            alone = closeness.every_layer or closeness.every_rank or rank == len(stands_for) - 1
            key = rank if alone else _places(table, rank)
            replay = replays.setdefault(key, Replay(by_kind=not closeness.every_layer))
        step = record_step(recipe, table, rank, replay)
        steps[rank] = replace(step, events=tuple(one.setdefault(e, e) for e in step.events))
        tell(f"recorded rank {rank}")
    sequences: list[tuple[Event, ...]] = [steps[rank].events for rank in stands_for]
    return Rehearsal(
        steps=steps,
        stands_for=tuple(stands_for),
        closeness=closeness,
        seconds=time.monotonic() - begun,
        problem=find_problem(sequences, table.lists, is_nccl=recipe.device == "cuda"),
    )


def _representatives(census: Census, table: GroupTable, closeness: Closeness) -> list[int]:
    if closeness.every_rank:
        return list(range(len(census.ranks)))
    first: dict[object, int] = {}
    found: list[int] = []
    for model in census.ranks:
        places = (_places(table, model.rank), _stage(table, model.rank))
        found.append(first.setdefault((model.kind, model.parts, *places), model.rank))
    found[-1] = len(found) - 1  # the rank that is last in all groups is looked at for itself
    return found


def _places(table: GroupTable, rank: int) -> tuple[int, ...]:
    """Return the places in groups whose ranks do different things: slices, positions."""
    groups = table.collection(rank)
    return tuple(group.rank() for group in (groups.tp, groups.cp, groups.expt_tp))


def _stage(table: GroupTable, rank: int) -> int:
    pp = table.collection(rank).pp
    assert isinstance(pp, RankGroup), "a dry run has stand-ins for groups"
    return pp.rank()
