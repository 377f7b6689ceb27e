"""A network of a given speed, as a test double: all-to-alls land no sooner than it lets them.

The machine's own transport still carries the rows. A rank's messages go one after the other, as
over one cable; what it sends to itself is free.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor


class SlowNetwork:
    """The cable of this rank."""

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        """Make an idle cable.

        Args:
            bytes_per_s: Rate of what a rank sends to others.
            latency_s: Time of an all-to-all without any rows.
        """
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s
        self.busy_s = 0.0
        """How long the cable was in use so far."""
        self._is_free_at = 0.0
        self._plain = dist.all_to_all_single

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Send every all-to-all of the block over this cable."""
        with patch.object(dist, "all_to_all_single", self._all_to_all):
            yield

    def _all_to_all(
        self, out: Tensor, x: Tensor, *splits: list[int], async_op: bool = False, group: Any = None
    ) -> Any:
        rows = splits[1] if len(splits) > 1 else [len(x) // dist.get_world_size(group)]
        own = rows[dist.get_rank(group)] if len(splits) > 1 else rows[0]
        sent = (len(x) - own) * x[:1].numel() * x.element_size()
        takes = self.latency_s + sent / self.bytes_per_s
        self.busy_s += takes
        self._is_free_at = max(self._is_free_at, time.perf_counter()) + takes
        work = self._plain(out, x, *splits, group=group, async_op=True)
        late = _LateWork(work, self._is_free_at)
        return late if async_op else late.wait()


class _LateWork:
    """A collective that has landed when it is done and the cable would have carried it."""

    def __init__(self, work: Any, lands_at: float) -> None:
        self._work, self._lands_at = work, lands_at

    def wait(self) -> None:
        """Sleep until the rows are there; other threads compute meanwhile."""
        self._work.wait()
        time.sleep(max(0.0, self._lands_at - time.perf_counter()))
