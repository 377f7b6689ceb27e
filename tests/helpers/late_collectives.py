"""A network that does nothing until somebody waits for it: a test double of a group's collectives.

Synchronous calls go through. See late_rows for all-to-alls of experts alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives

_PLACES = (
    (dist, "all_to_all_single", True),
    (dist, "all_reduce", False),  # in place: what is in it may be read too early, unnoticed
    (collectives, "_all_gather", True),
)


class _LateWork:
    """A collective that is done only when it is waited for."""

    def __init__(self, start: Callable[[], Any], note: Callable[[], None]) -> None:
        self._start, self._note = start, note

    def wait(self) -> None:
        self._start()
        self._note()


@contextmanager
def late_collectives(note: Callable[[str], None]) -> Iterator[None]:
    """Do every asynchronous collective only when it is waited for; ``note`` both, as words."""
    with ExitStack() as stack:
        for home, name, has_output in _PLACES:
            right = getattr(home, name)

            def late(
                out: Tensor,
                *args: Any,
                async_op: bool = False,
                _do: Any = right,
                _name: str = name.strip("_"),
                _fill: bool = has_output,
                **kwargs: Any,
            ) -> Any:
                if not async_op:
                    return _do(out, *args, **kwargs)
                note(f"launch {_name}")
                if _fill:
                    out.fill_(float("nan"))  # who reads before the wait, reads this
                return _LateWork(lambda: _do(out, *args, **kwargs), lambda: note(f"wait {_name}"))

            stack.enter_context(patch.object(home, name, late))
        yield
