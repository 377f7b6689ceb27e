"""What a rank sends: every collective of a block, in the order in which it was issued."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives

_PLACES = (
    (dist, "all_to_all_single"),
    (dist, "all_reduce"),
    (dist, "all_gather"),
    (dist, "broadcast"),
    (collectives, "_all_gather"),
    (collectives, "_reduce_scatter"),
)


class Issued(NamedTuple):
    """One collective as its rank issued it."""

    op: str
    ranks: tuple[int, ...]
    """Of its group."""
    dtype: str
    row: tuple[int, ...]
    """Shape of a row where rows are split unevenly, else of the whole tensor."""
    send: tuple[int, ...]
    """Rows to each rank, empty where all get as many."""
    recv: tuple[int, ...]
    """Rows from each rank, likewise."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What is the same on ranks of other groups of this shape."""
        return self.op, len(self.ranks), self.dtype, self.row


@contextmanager
def logged_collectives() -> Iterator[list[Issued]]:
    """List every collective of the block, behind whatever ``dist`` was patched with before."""
    log: list[Issued] = []
    with ExitStack() as stack:
        for home, name in _PLACES:
            original = getattr(home, name)

            def call(x: Any, *args: Any, _op: str = name, _do: Any = original, **kw: Any) -> Any:
                log.append(_issued(_op, x, args, kw.get("group")))
                return _do(x, *args, **kw)

            stack.enter_context(patch.object(home, name, call))
        yield log


def _issued(op: str, x: Any, args: tuple[Any, ...], group: Any) -> Issued:
    tensor: Tensor = x[0] if isinstance(x, list) else x
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    recv, send = ((), ()) if len(args) < 3 else (tuple(args[1]), tuple(args[2]))
    row = tuple(tensor.shape[1:] if send else tensor.shape)
    return Issued(op, ranks, str(tensor.dtype), row, send, recv)


def assert_ranks_agree(logs: list[list[Issued]]) -> None:
    """Fail unless the n-th collective of a group is the same on all its ranks, and rows fit.

    Args:
        logs: Of rank 0, 1, ...; groups may be cut out of the ranks in any way.
    """
    for group in {issued.ranks for log in logs for issued in log}:
        of_group = [[issued for issued in logs[rank] if issued.ranks == group] for rank in group]
        assert len({len(log) for log in of_group}) == 1, f"{group}: {[len(x) for x in of_group]}"
        for number, calls in enumerate(zip(*of_group, strict=True)):
            assert len({call[:4] for call in calls}) == 1, f"{group}, call {number}: {calls}"
            for i, sender in enumerate(calls):
                for j, receiver in enumerate(calls if sender.send else ()):
                    assert sender.send[j] == receiver.recv[i], f"{group}, call {number}: {calls}"
