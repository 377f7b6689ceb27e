"""Proof that ranks call the same collectives: each is compared with the others' before it begins.

For debugging. Ranks that disagree get an error that names both calls, where a collective would hang
or, over gloo, give one of them wrong numbers. Costs a few messages over the store a call and takes
overlap away. Sends and receives between two ranks are not compared, nor is what another thread does
beside training, on a group of its own: there the ranks are not at the same place.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megatron.core import collectives
from megatron.core.errors import MegatronError
from megatron.core.process_groups_config import is_background

SITES_SHOWN = 4
"""Places in the program that a message names for each call, innermost first."""
_ROOT = Path(__file__).parents[3]
_WRAPPERS = (__file__, collectives.__file__, str(Path(torch.__file__).parent))


class CollectiveError(MegatronError):
    """Ranks of a group called collectives that do not belong together."""


class Call(NamedTuple):
    """What one rank is about to do."""

    name: str
    tensor: str
    """Shape and dtype as it is, for people."""
    like: str
    """What must be the same on every rank."""
    send: list[int]
    """Rows to each rank of the group; for an all-to-all only."""
    recv: list[int]
    """Rows from each rank of the group; for an all-to-all only."""
    sites: list[str]
    """``file:line in function``, innermost first."""

    def __str__(self) -> str:
        """Write it on one line."""
        rows = f", rows to ranks {self.send}, from ranks {self.recv}" if self.send else ""
        return f"{self.name} {self.tensor}{rows} at {' < '.join(self.sites)}".replace("  ", " ")


class CollectiveChecks:
    """Compares this rank's calls with those of the other ranks, over a store that all share."""

    def __init__(self, store: Store, rank: int, timeout: timedelta) -> None:
        """Begin with no call made.

        Args:
            store: The same on every rank; keys begin with ``collective/``.
            rank: Of the world.
            timeout: How long the other ranks of a group may take to make their call.
        """
        self._store = PrefixStore("collective", store)
        self._rank, self._timeout = rank, timeout
        self._counts: dict[tuple[int, ...], int] = {}

    @classmethod
    def of_world(cls, timeout: timedelta) -> "CollectiveChecks":
        """Compare over the store through which the ranks of the default group found each other."""
        return cls(_get_default_store(), dist.get_rank(), timeout)

    def compare(self, group: ProcessGroup | None, call: Call) -> None:
        """Wait until every rank of ``group`` says what it calls next, and compare.

        Raises:
            CollectiveError: On every rank of the group, if they differ; on those that wait, if
                some rank does not come.
        """
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        if len(ranks) == 1:
            return
        number = self._counts[ranks] = self._counts.get(ranks, 0) + 1
        place = f"{'-'.join(map(str, ranks))}/{number}"
        text = json.dumps(call)
        self._store.set(f"now/{self._rank}", text)
        self._store.set(f"{place}/{self._rank}", text)
        calls = self._others(ranks, number, place)
        problem = difference(ranks, calls)
        if problem is not None:
            raise CollectiveError(f"collective {number} of ranks {_listed(ranks)}: {problem}")
        if number > 1:  # every rank has read those, or it would not be here
            self._store.delete_key(f"{'-'.join(map(str, ranks))}/{number - 1}/{self._rank}")

    def _others(self, ranks: Sequence[int], number: int, place: str) -> list[Call]:
        keys = [f"{place}/{rank}" for rank in ranks]
        try:
            self._store.wait(keys, self._timeout)
        except RuntimeError as error:  # a timeout, of a kind that depends on the store
            missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self._has(key)]
            if not missing:
                raise
            mine = Call(*json.loads(self._store.get(f"{place}/{self._rank}")))
            lines = [f"rank {self._rank} waits: {mine}"]
            lines += [f"rank {rank} is elsewhere: {self._now(rank)}" for rank in missing]
            raise CollectiveError(
                f"collective {number} of ranks {_listed(ranks)} is not called by all ranks:\n  "
                + "\n  ".join(lines)
            ) from error
        return [Call(*json.loads(self._store.get(key))) for key in keys]

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _now(self, rank: int) -> str:
        if not self._has(f"now/{rank}"):
            return "it has called no collective"
        return f"its last was {Call(*json.loads(self._store.get(f'now/{rank}')))}"


def difference(ranks: Sequence[int], calls: Sequence[Call]) -> str | None:
    """Say how calls differ that must belong together, with the first rank's and another's.

    Args:
        ranks: Of the world, by place in the group.
        calls: One of each.
    """
    first = calls[0]
    for rank, call in zip(ranks, calls, strict=True):
        if (call.name, call.like) != (first.name, first.like):
            return f"calls differ:\n  rank {ranks[0]}: {first}\n  rank {rank}: {call}"
    for sender, sent in enumerate(calls):
        for receiver, got in enumerate(calls):
            if sent.send and sent.send[receiver] != got.recv[sender]:
                return (
                    f"rank {ranks[sender]} sends {sent.send[receiver]} rows to rank "
                    f"{ranks[receiver]}, which takes {got.recv[sender]}:\n"
                    f"  rank {ranks[sender]}: {sent}\n  rank {ranks[receiver]}: {got}"
                )
    return None


@contextmanager
def checked_collectives(checks: CollectiveChecks) -> Iterator[None]:
    """Compare every collective of the block first; of the whole process, so one block at a time."""
    homes = [(dist, name) for name in _READERS if hasattr(dist, name)]
    homes += [(collectives, "_all_gather"), (collectives, "_reduce_scatter")]
    originals = [(home, name, getattr(home, name)) for home, name in homes]
    for home, name, original in originals:
        setattr(home, name, _checked(checks, name, original))
    try:
        yield
    finally:
        for home, name, original in originals:
            setattr(home, name, original)


def _checked(
    checks: CollectiveChecks, name: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    read = _READERS[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if not is_background(group):
            checks.compare(group, read(*args, **kwargs))
        return original(*args, **kwargs)

    return call


def _call(name: str, x: Tensor | None, detail: str = "", **rows: list[int]) -> Call:
    tensor = "" if x is None else f"{detail} {list(x.shape)} {_dtype(x)}".strip()
    like = "" if x is None else f"{detail} {x.numel()} {_dtype(x)}"
    return Call(name, tensor, like, rows.get("send", []), rows.get("recv", []), _sites())


def _all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **_: Any) -> Call:
    return _call("all_reduce", x, str(op).rpartition(".")[2].lower())


def _broadcast(x: Tensor, src: int | None = None, *_: Any, **named: Any) -> Call:
    return _call("broadcast", x, f"from {src if src is not None else named.get('group_src')}")


def _gather_list(parts: list[Tensor], x: Tensor, **_: Any) -> Call:
    return _call("all_gather", x)


def _gather_single(whole: Tensor, own: Tensor, **_: Any) -> Call:
    return _call("all_gather", own)


def _reduce_scatter_single(own: Tensor, whole: Tensor, **_: Any) -> Call:
    return _call("reduce_scatter", own)


def _all_to_all(
    out: Tensor,
    x: Tensor,
    recv: list[int] | None = None,
    send: list[int] | None = None,
    *,
    group: ProcessGroup | None = None,
    **_: Any,
) -> Call:
    size = dist.get_world_size(group)
    row = f"rows of {list(x.shape[1:])} {_dtype(x)}"
    return Call(
        "all_to_all",
        f"{list(x.shape)} {_dtype(x)}",
        row,
        list(send) if send else [x.shape[0] // size] * size,
        list(recv) if recv else [out.shape[0] // size] * size,
        _sites(),
    )


def _barrier(*_: Any, **__: Any) -> Call:
    return _call("barrier", None)


def _object(name: str) -> Callable[..., Call]:
    return lambda *_, **__: _call(name, None)


_READERS: dict[str, Callable[..., Call]] = {
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "all_gather": _gather_list,
    "all_to_all_single": _all_to_all,
    "barrier": _barrier,
    "all_gather_object": _object("all_gather_object"),
    "broadcast_object_list": _object("broadcast_object_list"),
    "_all_gather": _gather_single,
    "_reduce_scatter": _reduce_scatter_single,
}


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _sites() -> list[str]:
    """Return where the collective was called from, leaving out this file, its like and torch."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < SITES_SHOWN:
        code = frame.f_code
        if not code.co_filename.startswith(_WRAPPERS):
            path = Path(code.co_filename)
            name = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
            found.append(f"{name}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
