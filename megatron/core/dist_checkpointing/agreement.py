"""Ranks agree on success: either every rank raises the same CheckpointError, or none does.

A group of None means one process without torch.distributed (tools).
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.errors import CheckpointError

ValueT = TypeVar("ValueT")
_SHOWN = 8


def rank_in(group: ProcessGroup | None) -> int:
    """Return the place of this process in ``group``."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: ProcessGroup | None) -> int:
    """Return the number of ranks in ``group``."""
    return 1 if group is None else dist.get_world_size(group)


def gather(value: ValueT, group: ProcessGroup | None) -> list[ValueT]:
    """Return the value of every rank, in rank order, on every rank. Plain values only."""
    if group is None:
        return [value]
    gathered: list[ValueT | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]


def gather_first(value: ValueT, group: ProcessGroup | None) -> list[ValueT] | None:
    """Return the value of every rank, in rank order, on the first rank; None on the others."""
    if group is None:
        return [value]
    first = dist.get_rank(group) == 0
    gathered: list[ValueT | None] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(value, gathered, group=group, group_dst=0)
    return gathered  # type: ignore[return-value]


def scatter_first(values: list[ValueT] | None, group: ProcessGroup | None) -> ValueT:
    """Give each rank its one of the first rank's ``values``, which the others pass as None."""
    if group is None:
        assert values is not None, "one process is the first rank"
        return values[0]
    received: list[ValueT | None] = [None]
    dist.scatter_object_list(received, values, group=group, group_src=0)
    return received[0]  # type: ignore[return-value]


def broadcast(value: ValueT, group: ProcessGroup | None) -> ValueT:
    """Return the first rank's value on every rank. Plain values only."""
    if group is None:
        return value
    held = [value]
    dist.broadcast_object_list(held, group=group, group_src=0)
    return held[0]


def attempt(work: Callable[[], ValueT], group: ProcessGroup | None) -> ValueT:
    """Do this rank's share of a step that reads or writes files; every rank must call this.

    Args:
        work: Runs on this rank, without collectives but those of a smaller group whose ranks fail
            together; it may raise ``OSError`` or ``CheckpointError``.
        group: The ranks that share the step.

    Returns:
        What ``work`` returned on this rank.

    Raises:
        CheckpointError: ``work`` failed on some rank; the same message on every rank.
    """
    problem, result = "", None
    try:
        result = work()
    except (OSError, CheckpointError) as error:
        problem = describe(error)
    problems = gather(problem, group)
    raise_if_any({rank: text for rank, text in enumerate(problems) if text})
    return result  # type: ignore[return-value]


def raise_if_any(problems: dict[int, str]) -> None:
    """Raise one error for the problems of some ranks; equal sentences are said once."""
    if not problems:
        return
    ranks_of: dict[str, list[int]] = {}
    for rank, text in problems.items():
        ranks_of.setdefault(text, []).append(rank)
    lines = [
        f"rank {', '.join(map(str, ranks[:_SHOWN]))}{', ...' if ranks[_SHOWN:] else ''}: {text}"
        for text, ranks in ranks_of.items()
    ]
    if len(lines) == 1 and problems.get(0) is not None:
        lines = [next(iter(ranks_of))]
    raise CheckpointError("\n".join(lines))


def describe(error: BaseException) -> str:
    """Return one line for ``error``: ours, or the operating system's reason, or its own."""
    cause = os_error_behind(error)
    if isinstance(error, CheckpointError) or cause is None:
        return str(error) or type(error).__name__
    path = f" ({cause.filename})" if cause.filename else ""
    return f"{cause.strerror or cause}{path}"


def os_error_behind(error: BaseException) -> OSError | None:
    """Return the OSError that ``error`` is or hides, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
