"""Which rank sends and receives what, and when: transfers between the steps of a schedule. Pure.

The order that no deadlock can come from: all steps and transfers of all ranks stand in one global
order, and each rank walks its own part of it. A transfer is one event of two ranks. Whatever is
first in the global order and not yet done can then always be done, even if sends and receives
block, and any two ranks see their common transfers in the same order, as NCCL asks.
"""

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


def with_transfers(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """Return for each rank its steps in their order, with sends and receives between them.

    A send stands right after the step that made its product; its receive stands where the receiver
    is then, if forward, input and weight gradient take as long. The result depends on nothing but
    the schedule, so each rank may compute all lists for itself.

    Raises:
        AssertionError: The steps cannot be ordered: a step needs what is only made after it.
    """
    actions: list[list[Action]] = [[] for _ in range(schedule.pp)]
    # (time, transfers before steps, rank) and, to break no tie by the clock, place in the list
    events: list[tuple[int, int, int, int]] = []
    starts = _start_times(schedule)
    for rank, times in enumerate(starts):
        for place, start in enumerate(times):
            events.append((start, 1, rank, place))
            if schedule.receiver(schedule.makes(rank, schedule.steps[rank][place])) is not None:
                end = start + _TIME[schedule.steps[rank][place].kind]
                events.append((end, 0, rank, place))
    for _, is_step, rank, place in sorted(events):
        step = schedule.steps[rank][place]
        if is_step:
            actions[rank].append(step)
            continue
        product = schedule.makes(rank, step)
        receiver = schedule.receiver(product)
        assert receiver is not None, f"{product} stays on rank {rank}"
        actions[rank].append(Transfer("send", receiver, product))
        actions[receiver].append(Transfer("recv", rank, product))
    return tuple(tuple(own) for own in actions)


def _start_times(schedule: Schedule) -> list[list[int]]:
    """Return when each step starts if it takes its ``_TIME``, and messages take none."""
    starts: list[list[int]] = [[] for _ in range(schedule.pp)]
    free = [0] * schedule.pp
    made: dict[Product, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(schedule.steps):
            while len(starts[rank]) < len(steps):
                step = steps[len(starts[rank])]
                needs = schedule.needs(rank, step)
                if not all(product in made for product in needs):
                    break
                start = max([free[rank], *(made[product] for product in needs)])
                starts[rank].append(start)
                free[rank] = made[schedule.makes(rank, step)] = start + _TIME[step.kind]
                moved = True
    stuck = {
        rank: str(steps[len(starts[rank])])
        for rank, steps in enumerate(schedule.steps)
        if len(starts[rank]) < len(steps)
    }
    assert not stuck, f"schedule {schedule.name} cannot run: ranks stand at {stuck}"
    return starts
