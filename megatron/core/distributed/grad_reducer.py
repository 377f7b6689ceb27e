"""When each bucket of gradients is reduced: one fixed order, whatever order backward fills them in.

Knows nothing of tensors or groups. Easy to break: a bucket may be launched only when all before it
were, and every bucket is launched in every step, or ranks call different collectives and hang.
"""

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
        self._next = 0
        self._pending: list[Pending] = []
        self._finished = False

    def is_late(self, param: int) -> bool:
        """Say whether a gradient of ``param`` would come after its bucket was launched."""
        return self._bucket_of[param] < self._next

    def mark_filled(self, param: int) -> None:
        """Note the last gradient of ``param`` in this step; launch what may be launched."""
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
