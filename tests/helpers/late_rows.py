"""A network that does nothing until somebody waits for it: a test double of all-to-alls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


class _LateWork:
    """A collective that is done only when it is waited for."""

    def __init__(self, start: Callable[[], Any], note: Callable[[str], None]) -> None:
        self._start, self._note = start, note

    def wait(self) -> None:
        self._start()
        self._note("wait")


@contextmanager
def late_rows(note: Callable[[str], None]) -> Iterator[None]:
    """Do every asynchronous all-to-all only when it is waited for; ``note`` both, as words."""
    original = dist.all_to_all_single

    def late(out: Tensor, x: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if not async_op:
            return original(out, x, *args, **kwargs)
        note("launch")
        out.fill_(float("nan"))  # who reads before the wait, reads this
        return _LateWork(lambda: original(out, x, *args, **kwargs), note)

    dist.all_to_all_single = late
    try:
        yield
    finally:
        dist.all_to_all_single = original
