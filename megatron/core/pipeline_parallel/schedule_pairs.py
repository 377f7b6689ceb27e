"""Which steps of a schedule run as a pair: a forward and a backward of two microbatches. Pure.

While rows of one travel between experts, the other computes. What a pair makes leaves when both
have ended, so a pair stands only where nobody waits for half of it: see ``paired``.
"""

from typing import NamedTuple

from megatron.core.pipeline_parallel.schedule_step import Schedule, Step


class Pair(NamedTuple):
    """Two steps of different microbatches that begin together and end together."""

    forward: Step
    backward: Step

    def __str__(self) -> str:
        """Write ``F3.1 with B0.1``."""
        return f"{self.forward} with {self.backward}"


Computation = Step | Pair


def steps_of(computation: Computation) -> tuple[Step, ...]:
    """Return the steps of a pair, the forward first, or the one step itself."""
    return (computation,) if isinstance(computation, Step) else (*computation,)


def can_pair(schedule: Schedule) -> bool:
    """Say whether the steps of ``schedule`` may run in pairs, and lose no time by it.

    A rank of 1F1B with one chunk sends a forward to the next rank while that one runs the backward
    it will get back: as pairs, both would wait for each other by turns. In interleaved 1F1B and
    DualPipeV each rank is further ahead. DualPipeV of fewer microbatches than ranks has no middle,
    and zero-bubble schedules have no whole backwards in theirs.
    """
    if schedule.name == "dualpipev":
        return schedule.num_microbatches >= schedule.pp
    return schedule.chunks > 1 or (schedule.name == "1f1b" and schedule.pp == 1)


def paired(schedule: Schedule) -> tuple[tuple[Computation, ...], ...]:
    """Return the lists of all ranks with neighbouring forwards and backwards as pairs.

    In DualPipeV a backward is paired with the forward before it. In 1F1B it is with the one behind
    it: each rank is one more forward ahead, and keeps one more chunk. On one rank that is F0, F1
    with B0, F2 with B1, ... Backwards stay in their order, and so do the additions to gradients.

    Source: DeepSeek-AI 2024 (arXiv:2412.19437), section 3.2.1.
    """
    assert can_pair(schedule), f"{schedule.name} on {schedule.pp} ranks cannot run in pairs"
    kinds = ("F", "B") if schedule.v_shape else ("B", "F")
    return tuple(_paired(steps, kinds) for steps in schedule.steps)


def _paired(steps: tuple[Step, ...], kinds: tuple[str, str]) -> tuple[Computation, ...]:
    found: list[Computation] = []
    for step in steps:
        before = found[-1] if found else None
        if (
            isinstance(before, Step)
            and (before.kind, step.kind) == kinds
            and before.microbatch != step.microbatch
        ):
            found[-1] = Pair(*sorted((before, step), key=lambda s: s.kind, reverse=True))
        else:
            found.append(step)
    return tuple(found)
