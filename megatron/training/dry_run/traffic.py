"""How often and how much a rank sends in a step, by group and purpose. Pure."""

from collections.abc import Iterable
from typing import NamedTuple

from megatron.training.dry_run.events import Event, Post


class Traffic(NamedTuple):
    """All calls of one kind of one rank in one step."""

    group: str
    ranks: int
    op: str
    dtype: str
    calls: int
    payload_bytes: int
    """Of the tensors that were handed over (received, for a recv)."""
    sent_bytes: int
    """What goes to other ranks by the usual ring algorithms; see ``Post.bytes_sent``."""


def traffic_of(events: Iterable[Event]) -> list[Traffic]:
    """Sum the posts of one rank by group, op and dtype, the most bytes first."""
    found: dict[tuple[str, int, str, str], list[int]] = {}
    for event in events:
        if not isinstance(event, Post):
            continue
        key = (event.group, event.ranks, event.op, event.dtype)
        sums = found.setdefault(key, [0, 0, 0])
        sums[0] += 1
        sums[1] += event.elements * event.itemsize
        sums[2] += event.bytes_sent()
    rows = [
        Traffic(group, ranks, op, dtype, *sums) for (group, ranks, op, dtype), sums in found.items()
    ]
    return sorted(rows, key=lambda row: (-row.sent_bytes, -row.payload_bytes, row.group, row.op))
