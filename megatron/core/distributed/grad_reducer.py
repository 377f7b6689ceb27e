"""When each bucket of gradients is reduced: one fixed order, whatever order backward fills them in.

Knows nothing of tensors or groups. Easy to break: a bucket may be launched only when all before it
were, and every bucket is launched in every step, or ranks call different collectives and hang.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron.core.distributed.bucket_layout import Bucket


class Pending(Protocol):
    """A started collective."""

    def wait(self) -> object:
        """Return when the result is there (on CUDA: order the current stream behind it)."""


class GradReducer:
    """Launches the buckets of one optimizer step in their global order."""

    def __init__(
        self, buckets: Sequence[Bucket], launch: Callable[[Bucket], Pending | None]
    ) -> None:
        """Start a first step.

        Args:
            buckets: All buckets in launch order.
            launch: Starts the reduction of one; returns what to wait for, or None.
        """
        self._buckets = tuple(buckets)
        self._launch = launch
        self._bucket_of = {
            param: number for number, bucket in enumerate(buckets) for param in bucket.params
        }
        self.reset()

    def reset(self) -> None:
        """Begin the next step: nothing is filled, nothing is launched."""
        self._unfilled = [set(bucket.params) for bucket in self._buckets]
        self._put_off: Counter[int] = Counter()
        self._waits_for_put_off: set[int] = set()
        self._next = 0
        self._pending: list[Pending] = []
        self._finished = False

    def is_late(self, param: int) -> bool:
        """Say whether a gradient of ``param`` would come after its bucket was launched."""
        return self._bucket_of[param] < self._next

    def put_off(self, param: int) -> None:
        """Note that a gradient of ``param`` will come after its backward."""
        self._put_off[param] += 1

    def settle(self, param: int) -> None:
        """Note that a gradient that was put off has come; launch what waited for it."""
        assert self._put_off[param] > 0, f"no gradient of parameter {param} was put off"
        self._put_off[param] -= 1
        if self._put_off[param] == 0 and param in self._waits_for_put_off:
            self._waits_for_put_off.discard(param)
            self.mark_filled(param)

    def unsettled(self) -> list[int]:
        """Return the parameters of which a gradient is still put off."""
        return sorted(param for param, count in self._put_off.items() if count)

    def mark_filled(self, param: int) -> None:
        """Note the last backward through ``param`` in this step; launch what may be launched.

        What was put off, in this backward or in one before, is waited for.
        """
        if self._put_off[param]:
            self._waits_for_put_off.add(param)
            return
        self._unfilled[self._bucket_of[param]].discard(param)
        while self._next < len(self._buckets) and not self._unfilled[self._next]:
            self._launch_next()

    def finish(self) -> None:
        """Launch every bucket that was not, filled or not, and wait for all."""
        assert not self._finished, "gradients of this step were reduced already"
        while self._next < len(self._buckets):
            self._launch_next()
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self._finished = True

    def _launch_next(self) -> None:
        work = self._launch(self._buckets[self._next])
        self._next += 1
        if work is not None:
            self._pending.append(work)
