"""A process group with a slow link: a test double whose collectives are real, and land late.

Wraps gloo as a backend of its own, ``slow``. The data moves at once, into tensors of the double;
the caller's see it when they are waited for and the link has had its time. Who reads before the
wait reads old numbers, so that results are right only if every collective was waited for.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "slow"


class Event(NamedTuple):
    """Something that happened on this rank, in order."""

    what: str
    """``launch`` or ``land`` of a collective, or what ``Link.note`` was given."""
    of: str
    """Name of the collective."""
    number: int
    """Of the collective, in the order of launches; the same at its launch and its landing."""
    size_bytes: int
    """What the collective sends, or gathers."""


class Link:
    """What the collectives of this process travel over, one after another."""

    def __init__(self) -> None:
        """Begin with a link that takes no time."""
        self.seconds_per_byte: dict[str, float] = {}
        """Collective -> seconds; others take no time."""
        self.events: list[Event] = []
        self._free_at = 0.0
        self._launched = 0
        self._lock = threading.Lock()

    def note(self, what: str) -> None:
        """Add an event of the caller's: a piece of computation, say."""
        self.events.append(Event(what, "", -1, 0))

    def launch(self, name: str, size_bytes: int) -> tuple[int, float]:
        """Begin to send; return the collective's number and when it arrives."""
        with self._lock:
            number, self._launched = self._launched, self._launched + 1
            self.events.append(Event("launch", name, number, size_bytes))
            seconds = self.seconds_per_byte.get(name, 0.0) * size_bytes
            now = time.perf_counter()
            if not seconds:
                return number, now
            self._free_at = max(self._free_at, now) + seconds
            return number, self._free_at


LINK = Link()
"""That of this process."""


class LateWork(dist.Work):
    """A started collective; its result is there once it was waited for."""

    def __init__(self, name: str, size_bytes: int, inner: dist.Work, land: Callable[[], None]):
        """Take ``inner`` under way, and ``land``, which hands its result to the caller."""
        super().__init__()
        self._name, self._size_bytes, self._inner, self._land = name, size_bytes, inner, land
        self._number, self._arrives = LINK.launch(name, size_bytes)
        self._has_landed = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when the link has had its time and the result is there."""
        del timeout
        if not self._has_landed:
            self._inner.wait()
            time.sleep(max(0.0, self._arrives - time.perf_counter()))
            self._land()
            LINK.events.append(Event("land", self._name, self._number, self._size_bytes))
            self._has_landed = True
        return True

    def is_completed(self) -> bool:
        """Return whether a wait would return at once."""
        return self._inner.is_completed() and time.perf_counter() >= self._arrives


class SlowGroup(dist.ProcessGroup):
    """Gloo over ``LINK``: the collectives that training overlaps are late, others are gloo's."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        """Connect the ranks of one group."""
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """Return the name of the backend."""
        return BACKEND

    def allreduce(self, tensors: list[Tensor], *options: Any) -> dist.Work:
        """Sum the one tensor in place."""
        (whole,) = tensors
        sums = whole.clone()
        work = self._gloo.allreduce([sums], *options)
        return LateWork("all_reduce", _bytes(whole), work, lambda: _copy(whole, sums))

    def all_gather_single(self, whole: Tensor, own: Tensor, *options: Any) -> dist.Work:
        """Fill ``whole`` with all ranks' ``own``."""
        parts = torch.empty_like(whole)
        work = self._gloo._allgather_base(parts, own.clone(), *options)
        return LateWork("all_gather", _bytes(whole), work, lambda: _copy(whole, parts))

    def reduce_scatter_single(self, own: Tensor, whole: Tensor, *options: Any) -> dist.Work:
        """Sum ``whole`` over the ranks; each gets its part."""
        part = torch.empty_like(own)
        work = self._gloo._reduce_scatter_base(part, whole.clone(), *options)
        return LateWork("reduce_scatter", _bytes(whole), work, lambda: _copy(own, part))

    def all_to_all_single(
        self, out: Tensor, x: Tensor, recv: list[int], send: list[int], *options: Any
    ) -> dist.Work:
        """Send each rank its rows of ``x``."""
        rows = torch.empty_like(out)
        work = self._gloo.alltoall_base(rows, x.clone(), recv, send, *options)
        return LateWork("all_to_all", _bytes(x), work, lambda: _copy(out, rows))

    # the names of releases before torch 2.13
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def allgather(self, *arguments: Any) -> dist.Work:
        """Gather a list of tensors, at once."""
        return self._gloo.allgather(*arguments)

    def broadcast(self, *arguments: Any) -> dist.Work:
        """Broadcast, at once."""
        return self._gloo.broadcast(*arguments)

    def barrier(self, opts: Any) -> dist.Work:
        """Wait for all ranks."""
        return self._gloo.barrier(opts)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy(to: Tensor, of: Tensor) -> None:
    to.data.copy_(of)  # as a network would: autograd is not told of it


def register() -> None:
    """Make ``backend="slow"`` known to torch.distributed; once is enough."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, SlowGroup, devices=["cpu"])
