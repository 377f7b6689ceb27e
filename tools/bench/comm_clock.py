"""How long this rank stands in its collectives and messages, call by call.

Patches the functions of torch.distributed that a step uses. A call begun with ``async_op`` takes
what starting it and waiting for it take; what goes on meanwhile is not its time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives

MESSAGES = ("isend", "irecv")
_PLACES = (
    (dist, "all_reduce"),
    (dist, "all_gather"),
    (dist, "all_to_all_single"),
    (dist, "broadcast"),
    (dist, "barrier"),
    (dist, "isend"),
    (dist, "irecv"),
    (collectives, "_all_gather"),
    (collectives, "_reduce_scatter"),
)


class Spent(NamedTuple):
    """One call."""

    op: str
    size_bytes: int
    """Of what the rank hands over or, of ``irecv``, gets."""
    seconds: float


class TimedWork:
    """Stands for a ``Work``; adds the time of waiting for it to that of its call."""

    def __init__(self, work: Any, add: Callable[[float], None]) -> None:
        self._work, self._add = work, add

    def wait(self, *args: Any) -> Any:
        """See ``torch.distributed.Work.wait``."""
        start = time.perf_counter()
        result = self._work.wait(*args)
        self._add(time.perf_counter() - start)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def timed_collectives() -> Iterator[list[Spent]]:
    """List every call made inside the block, in the order in which they began."""
    found: list[Spent] = []
    with ExitStack() as stack:
        for home, name in _PLACES:
            stack.enter_context(patch.object(home, name, _timed(name, getattr(home, name), found)))
        yield found


def _timed(name: str, original: Callable[..., Any], found: list[Spent]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        place = len(found)
        found.append(Spent(name.strip("_"), _size_bytes(name, args), 0.0))

        def add(seconds: float) -> None:
            found[place] = found[place]._replace(seconds=found[place].seconds + seconds)

        start = time.perf_counter()
        result = original(*args, **kwargs)
        add(time.perf_counter() - start)
        return result if result is None else TimedWork(result, add)

    return call


def _size_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Return the bytes of the tensor that is handed over: the second, where the first is filled."""
    fills_first = name in ("all_gather", "all_to_all_single", "_all_gather", "_reduce_scatter")
    handed = args[int(fills_first) :][:1]
    tensor = handed[0] if handed else None
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0


def transfer_and_waiting(ranks: list[list[Spent]]) -> list[tuple[float, float]]:
    """Split each rank's seconds in collectives into (transfer, waiting for others).

    In a collective that all of them are in, the transfer is what the last to come saw of it: the
    least time of all ranks. Messages between two ranks are waiting: for the other stage.

    Raises:
        AssertionError: The ranks did not make the same collectives.
    """
    together = [[one for one in calls if one.op not in MESSAGES] for calls in ranks]
    kinds = {tuple(one.op for one in calls) for calls in together}
    assert len(kinds) == 1, f"ranks made different collectives: {kinds}"
    transfer = sum(min(one.seconds for one in same) for same in zip(*together, strict=True))
    return [(transfer, sum(one.seconds for one in calls) - transfer) for calls in ranks]


def by_op(calls: list[Spent]) -> dict[str, tuple[int, int, float]]:
    """Return op -> (calls, bytes, seconds)."""
    found: dict[str, tuple[int, int, float]] = {}
    for op, size, seconds in calls:
        count, total, spent = found.get(op, (0, 0, 0.0))
        found[op] = (count + 1, total + size, spent + seconds)
    return found
