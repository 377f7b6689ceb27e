"""Why ranks that walk lists cannot go on: who stands where, and for whom. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedule_transfers import Action


class Wait(NamedTuple):
    """One rank that cannot go on."""

    rank: int
    place: int
    """Index in its list."""
    action: Action
    """What it stands at."""
    waits_for: int
    """The rank that would have to act; its own if its list is in the wrong order."""
    why: str

    def __str__(self) -> str:
        """Write one line: rank, place, action, reason."""
        return f"rank {self.rank} stands at action {self.place}, {self.action}: {self.why}"


class Deadlock(NamedTuple):
    """Ranks that wait for each other, or for a rank that is through."""

    waits: tuple[Wait, ...]
    """In the order of waiting: each waits for the next one, the last one as ``end`` says."""
    end: str

    def __str__(self) -> str:
        """Write what each rank stands at."""
        return "\n  ".join(["deadlock:", *map(str, self.waits), self.end])


def find_deadlock(waits: Mapping[int, Wait]) -> Deadlock | None:
    """Return the first circle of ranks that wait for each other; None if nobody waits.

    Args:
        waits: Every rank that has not reached the end of its list.

    Returns:
        The circle; where there is none, the chain that leads to a rank whose list has ended.
    """
    if not waits:
        return None
    chain: list[int] = []
    rank = min(waits)
    while rank in waits and rank not in chain:
        chain.append(rank)
        rank = waits[rank].waits_for
    if rank not in waits:
        end = f"rank {rank} is through its list and sends and receives nothing more"
        return Deadlock(tuple(waits[r] for r in chain), end)
    circle = chain[chain.index(rank) :]
    end = f"rank {circle[-1]} waits for rank {rank}, which closes the circle"
    if len(circle) == 1:
        end = f"rank {rank} waits for itself: its list is in the wrong order"
    return Deadlock(tuple(waits[r] for r in circle), end)
