"""Which rank sends and receives what, and when: transfers between the steps of a schedule. Pure.

The order that no deadlock can come from: all steps and transfers of all ranks stand in one global
order, and each rank walks its own part of it. A transfer is one event of two ranks. Whatever is
first in the global order and not yet done can then always be done, even if sends and receives
block, and any two ranks see their common transfers in the same order, as NCCL asks.
"""

from typing import Literal, NamedTuple, cast

from megatron.core.pipeline_parallel.schedule_pairs import Computation, paired, steps_of
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


PairedAction = Computation | Transfer
"""The same where steps run in pairs."""


def with_transfers(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """Return for each rank its steps in their order, with sends and receives between them.

    A send stands right after the step that made its product; its receive stands where the receiver
    is then, if forward, input and weight gradient take as long. The result depends on nothing but
    the schedule, so each rank may compute all lists for itself.

    Raises:
        AssertionError: The steps cannot be ordered: a step needs what is only made after it.
    """
    return cast("tuple[tuple[Action, ...], ...]", _with_transfers(schedule, schedule.steps))


def with_paired_transfers(schedule: Schedule) -> tuple[tuple[PairedAction, ...], ...]:
    """Do ``with_transfers`` of the ``paired`` steps: a ``Pair`` begins and ends as one step."""
    return _with_transfers(schedule, paired(schedule))


_Lists = tuple[tuple[Computation, ...], ...]


def _with_transfers(schedule: Schedule, lists: _Lists) -> tuple[tuple[PairedAction, ...], ...]:
    actions: list[list[PairedAction]] = [[] for _ in range(schedule.pp)]
    # (time, transfers before steps, rank) and, to break no tie by the clock, place in the list and
    # in the pair
    events: list[tuple[int, int, int, int, int]] = []
    starts = _start_times(schedule, lists)
    for rank, times in enumerate(starts):
        for place, start in enumerate(times):
            events.append((start, 1, rank, place, 0))
            end = start + _time(lists[rank][place])
            for number, step in enumerate(steps_of(lists[rank][place])):
                if schedule.receiver(schedule.makes(rank, step)) is not None:
                    events.append((end, 0, rank, place, number))
    for _, is_step, rank, place, number in sorted(events):
        if is_step:
            actions[rank].append(lists[rank][place])
            continue
        product = schedule.makes(rank, steps_of(lists[rank][place])[number])
        receiver = schedule.receiver(product)
        assert receiver is not None, f"{product} stays on rank {rank}"
        actions[rank].append(Transfer("send", receiver, product))
        actions[receiver].append(Transfer("recv", rank, product))
    return tuple(tuple(own) for own in actions)


def _time(computation: Computation) -> int:
    return sum(_TIME[step.kind] for step in steps_of(computation))


def _start_times(schedule: Schedule, lists: _Lists) -> list[list[int]]:
    """Return when each step starts if it takes its ``_TIME``, and messages take none."""
    starts: list[list[int]] = [[] for _ in range(schedule.pp)]
    free = [0] * schedule.pp
    made: dict[Product, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(lists):
            while len(starts[rank]) < len(own):
                now = own[len(starts[rank])]
                needs = [need for step in steps_of(now) for need in schedule.needs(rank, step)]
                if not all(product in made for product in needs):
                    break
                start = max([free[rank], *(made[product] for product in needs)])
                starts[rank].append(start)
                free[rank] = start + _time(now)
                made |= {schedule.makes(rank, step): free[rank] for step in steps_of(now)}
                moved = True
    stuck = {
        rank: str(own[len(starts[rank])])
        for rank, own in enumerate(lists)
        if len(starts[rank]) < len(own)
    }
    assert not stuck, f"schedule {schedule.name} cannot run: ranks stand at {stuck}"
    return starts
