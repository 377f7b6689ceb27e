"""Which rank sends and receives what, and when: transfers between the steps of a schedule. Pure.

The order that no deadlock can come from: all steps and transfers of all ranks stand in one global
order, and each rank walks its own part of it. A transfer is one event of two ranks. Whatever is
first in the global order and not yet done can then always be done, even if sends and receives
block, and any two ranks see their common transfers in the same order, as NCCL asks.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from megatron.core.pipeline_parallel.schedule_step import Product, Schedule, Step, StepKind


class Transfer(NamedTuple):
    """One end of a message between two pipeline ranks.

    An executor may start it without waiting; a ``recv`` must be complete before the step that needs
    its product, a ``send`` before its buffer is used again.
    """

    direction: Literal["send", "recv"]
    peer: int
    product: Product

    def __str__(self) -> str:
        """Write ``send activation of microbatch 3, stage 1, to rank 2``."""
        way = "to" if self.direction == "send" else "from"
        return f"{self.direction} {self.product}, {way} rank {self.peer}"


_TIME: dict[StepKind, int] = {"F": 1, "B": 2, "I": 1, "W": 1}
"""The clock of the global order."""
Action = Step | Transfer
"""One entry of the list that a rank walks."""


class Pair(NamedTuple):
    """A forward and a backward of another microbatch that a rank runs by turns, as one step.

    Both start when both can, and what both make is there when both are through.
    """

    forward: Step
    backward: Step


_Block = tuple[Step, ...]
"""Steps that start and end together: one, or two that are run by turns."""


def with_transfers(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """Return for each rank its steps in their order, with sends and receives between them.

    A send stands right after the step that made its product; its receive stands where the receiver
    is then, if forward, input and weight gradient take as long. The result depends on nothing but
    the schedule, so each rank may compute all lists for itself.

    Raises:
        AssertionError: The steps cannot be ordered: a step needs what is only made after it.
    """
    lists = _ordered(schedule, [[(step,) for step in steps] for steps in schedule.steps])
    return tuple(
        tuple(action if isinstance(action, Transfer) else action[0] for action in own)
        for own in lists
    )


def with_pairs(schedule: Schedule) -> tuple[tuple[Action | Pair, ...], ...]:
    """Do as ``with_transfers`` with forwards and backwards that stand side by side as pairs.

    Raises:
        AssertionError: The pairs cannot be ordered, as with few microbatches, or schedules that
            leave no time between what two ranks send each other.
    """
    lists = _ordered(schedule, [_paired(steps) for steps in schedule.steps])
    return tuple(tuple(map(_as_action, own)) for own in lists)


def _paired(steps: tuple[Step, ...]) -> list[_Block]:
    """Join every forward with the backward behind it, if that is of another passage."""
    blocks: list[_Block] = []
    for step in steps:
        before = blocks[-1] if blocks else ()
        is_pair = len(before) == 1 and before[0].kind == "F" and step.kind in ("B", "I")
        if is_pair and before[0][1:] != step[1:]:
            blocks[-1] = (before[0], step)
        else:
            blocks.append((step,))
    return blocks


def _as_action(entry: _Block | Transfer) -> Action | Pair:
    if isinstance(entry, Transfer):
        return entry
    return entry[0] if len(entry) == 1 else Pair(*entry)


def _ordered(
    schedule: Schedule, blocks: Sequence[Sequence[_Block]]
) -> list[list[_Block | Transfer]]:
    """Put transfers between the blocks of each rank, by the clock of all."""
    actions: list[list[_Block | Transfer]] = [[] for _ in range(schedule.pp)]
    # (time, transfers before steps, rank) and, to break no tie by the clock, place in the list
    events: list[tuple[int, int, int, int]] = []
    for rank, times in enumerate(_start_times(schedule, blocks)):
        for place, start in enumerate(times):
            events.append((start, 1, rank, place))
            events.append((start + _duration(blocks[rank][place]), 0, rank, place))
    for _, is_start, rank, place in sorted(events):
        if is_start:
            actions[rank].append(blocks[rank][place])
            continue
        for product in (schedule.makes(rank, step) for step in blocks[rank][place]):
            receiver = schedule.receiver(product)
            if receiver is not None:
                actions[rank].append(Transfer("send", receiver, product))
                actions[receiver].append(Transfer("recv", rank, product))
    return actions


def _duration(block: _Block) -> int:
    return sum(_TIME[step.kind] for step in block)


def _start_times(schedule: Schedule, blocks: Sequence[Sequence[_Block]]) -> list[list[int]]:
    """Return when each block starts if steps take their ``_TIME``, and messages take none."""
    starts: list[list[int]] = [[] for _ in range(schedule.pp)]
    free = [0] * schedule.pp
    made: dict[Product, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(blocks):
            while len(starts[rank]) < len(own):
                block = own[len(starts[rank])]
                needs = [product for step in block for product in schedule.needs(rank, step)]
                if not all(product in made for product in needs):
                    break
                start = max([free[rank], *(made[product] for product in needs)])
                starts[rank].append(start)
                free[rank] = start + _duration(block)
                made |= {schedule.makes(rank, step): free[rank] for step in block}
                moved = True
    stuck = {
        rank: " ".join(map(str, own[len(starts[rank])]))
        for rank, own in enumerate(blocks)
        if len(starts[rank]) < len(own)
    }
    assert not stuck, f"schedule {schedule.name} cannot run: ranks stand at {stuck}"
    return starts
