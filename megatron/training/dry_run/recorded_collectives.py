"""Stands in for torch.distributed: what is called becomes events, and nothing is sent.

Known numbers go through as if every rank of the group had those of this one: counts are balanced,
and then it is so. Messages between two ranks carry no known numbers.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from megatron.core import collectives
from megatron.training.dry_run.events import CallSite, Event, Op, Post, Wait
from megatron.training.dry_run.known_values import known, write_known
from megatron.training.dry_run.rank_groups import RankGroup

_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_ROOT = Path(__file__).parents[3]
_FRAMES = 6


class RecordedWork:
    """What an asynchronous collective returns."""

    def __init__(self, log: "EventLog", post: int) -> None:
        self._log, self._post, self._is_out = log, post, False

    def wait(self, timeout: Any = None) -> bool:
        """Note that the rank waits."""
        del timeout
        if not self._is_out:
            self._log.wait(self._post)
        return True

    def is_completed(self) -> bool:
        """Say what the library would: only NCCL knows, and then nobody waits any more."""
        self._is_out = self._log.tells_completion
        return self._is_out


class EventLog:
    """Events of one rank in the order in which they came."""

    def __init__(self, *, tells_completion: bool) -> None:
        """Begin with nothing; NCCL tells when a message is out, gloo does not."""
        self.tells_completion = tells_completion
        self.events: list[Event] = []
        self.num_posts = 0

    def post(self, event: Post) -> int:
        """Add a post; return its number."""
        self.events.append(event)
        self.num_posts += 1
        return self.num_posts - 1

    def wait(self, post: int) -> None:
        """Add a wait for post number ``post``."""
        self.events.append(Wait(post, call_site()))


def call_site() -> CallSite:
    """Return where torch.distributed was called, and from where that was, in our or users' code."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < _FRAMES:
        name = frame.f_code.co_filename
        function = frame.f_code.co_name
        ours = not name.startswith((_HERE, _TORCH, "<")) and not function.startswith("<")
        if ours:
            found.append(f"{_short(name)}:{frame.f_lineno} in {function}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def _short(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else name


class RecordedCollectives:
    """The functions of torch.distributed that a step may call, under their names there."""

    def __init__(self, log: EventLog, world: RankGroup) -> None:
        self.log = log
        self._world = world

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> RecordedWork | None:
        """See ``torch.distributed.all_reduce``."""
        group, value = self._group(group), known(tensor)
        if value is not None and op == dist.ReduceOp.SUM:
            with no_dispatch():
                value.mul_(group.size())
        return self._done("all_reduce", group, tensor, async_op, detail=_name(op))

    def all_gather_single(
        self, output: Tensor, x: Tensor, group: Any = None, async_op: bool = False
    ) -> RecordedWork | None:
        """See ``torch.distributed.all_gather_into_tensor``."""
        group, value = self._group(group), known(x)
        if value is not None:
            with no_dispatch():
                value = value.reshape(-1).repeat(group.size())
        write_known(output, value)
        return self._done("all_gather", group, x, async_op)

    def reduce_scatter_single(
        self,
        output: Tensor,
        x: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> RecordedWork | None:
        """See ``torch.distributed.reduce_scatter_tensor``."""
        group = self._group(group)
        write_known(output, None)
        return self._done("reduce_scatter", group, x, async_op, detail=_name(op))

    def all_gather(
        self, outputs: Sequence[Tensor], x: Tensor, group: Any = None, async_op: bool = False
    ) -> RecordedWork | None:
        """See ``torch.distributed.all_gather``."""
        group = self._group(group)
        for output in outputs:
            write_known(output, known(x))
        return self._done("all_gather", group, x, async_op)

    def all_to_all_single(
        self,
        output: Tensor,
        x: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> RecordedWork | None:
        """See ``torch.distributed.all_to_all_single``."""
        group = self._group(group)
        send = _splits(x, input_split_sizes, group.size())
        recv = _splits(output, output_split_sizes, group.size())
        value = known(x)
        if value is not None:
            start = sum(send[: group.place])
            with no_dispatch():
                block = value.reshape(-1)[start : start + send[group.place]].repeat(group.size())
            value = block if block.numel() == output.numel() else None
        write_known(output, value)
        return self._done("all_to_all", group, x, async_op, send=send, recv=recv)

    def broadcast(
        self,
        tensor: Tensor,
        src: int | None = None,
        group: Any = None,
        async_op: bool = False,
        group_src: int | None = None,
    ) -> RecordedWork | None:
        """See ``torch.distributed.broadcast``."""
        group = self._group(group)
        place = group_src if src is None else group.ranks.index(src)
        return self._done("broadcast", group, tensor, async_op, detail=f"from place {place}")

    def barrier(self, group: Any = None, async_op: bool = False, **_: Any) -> RecordedWork | None:
        """See ``torch.distributed.barrier``."""
        return self._done("barrier", self._group(group), torch.empty(0), async_op)

    def all_gather_object(self, objects: list[Any], mine: Any, group: Any = None) -> None:
        """See ``torch.distributed.all_gather_object``; every rank has what this one has."""
        objects[:] = [mine] * len(objects)
        self._done("all_gather_object", self._group(group), torch.empty(0), False)

    def isend(
        self,
        tensor: Tensor,
        dst: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_dst: int | None = None,
        *,
        is_batched: bool = False,
    ) -> RecordedWork:
        """See ``torch.distributed.isend``."""
        return self._message("send", tensor, group, dst, group_dst, tag, is_batched)

    def irecv(
        self,
        tensor: Tensor,
        src: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_src: int | None = None,
        *,
        is_batched: bool = False,
    ) -> RecordedWork:
        """See ``torch.distributed.irecv``."""
        write_known(tensor, None)
        return self._message("recv", tensor, group, src, group_src, tag, is_batched)

    def send(self, *args: Any, **kwargs: Any) -> None:
        """See ``torch.distributed.send``."""
        self.isend(*args, **kwargs).wait()

    def recv(self, *args: Any, **kwargs: Any) -> None:
        """See ``torch.distributed.recv``."""
        self.irecv(*args, **kwargs).wait()

    def batch_isend_irecv(self, ops: Sequence["RecordedP2POp"]) -> list[RecordedWork]:
        """See ``torch.distributed.batch_isend_irecv``."""
        ways = {True: self.isend, False: self.irecv}
        works = []
        for op in ops:
            ends = {"group_dst" if op.sends else "group_src": op.group_peer}
            if op.group_peer is None:
                ends = {"dst" if op.sends else "src": op.peer}
            send = cast(Callable[..., RecordedWork], ways[op.sends])
            works.append(send(op.tensor, group=op.group, tag=op.tag, is_batched=True, **ends))
        return works

    def get_rank(self, group: Any = None) -> int:
        """See ``torch.distributed.get_rank``."""
        return self._group(group).place

    def get_world_size(self, group: Any = None) -> int:
        """See ``torch.distributed.get_world_size``."""
        return self._group(group).size()

    def get_process_group_ranks(self, group: Any = None) -> list[int]:
        """See ``torch.distributed.get_process_group_ranks``."""
        return list(self._group(group).ranks)

    def _group(self, group: Any) -> RankGroup:
        return self._world if group is None else group

    def _message(
        self,
        op: Op,
        tensor: Tensor,
        group: Any,
        rank: int | None,
        place: int | None,
        tag: int,
        is_batched: bool,
    ) -> RecordedWork:
        group = self._group(group)
        peer = place if rank is None else group.ranks.index(rank)
        assert peer is not None, "a message has a rank at its other end"
        detail = f"tag {tag}" if tag else ""
        more = {"peer": peer, "detail": detail, "is_batched": is_batched}
        work = self._done(op, group, tensor, True, **more)
        assert work is not None, "a message is asynchronous"
        return work

    def _done(
        self, op: Op, group: RankGroup, tensor: Tensor, async_op: bool, **more: Any
    ) -> RecordedWork | None:
        site = call_site()
        number = self.log.post(
            Post(
                op=op,
                group=group.name,
                ranks=group.size(),
                dtype=str(tensor.dtype).removeprefix("torch."),
                elements=tensor.numel(),
                itemsize=tensor.element_size(),
                site=site,
                **more,
            )
        )
        if async_op:
            return RecordedWork(self.log, number)
        self.log.events.append(Wait(number, site))
        return None


class RecordedP2POp:
    """See ``torch.distributed.P2POp``."""

    sender: Any = None
    """The function that stands for a send while this class stands for P2POp."""

    def __init__(
        self,
        op: Callable[..., Any],
        tensor: Tensor,
        peer: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_peer: int | None = None,
    ) -> None:
        self.sends = getattr(op, "__name__", "") == "isend"
        self.tensor, self.peer, self.group = tensor, peer, group
        self.tag, self.group_peer = tag, group_peer


_SAME_NAME = (
    "all_reduce",
    "all_gather",
    "all_to_all_single",
    "broadcast",
    "barrier",
    "all_gather_object",
    "isend",
    "irecv",
    "send",
    "recv",
    "batch_isend_irecv",
    "get_rank",
    "get_world_size",
    "get_process_group_ranks",
)


@contextmanager
def recorded(log: EventLog, world: RankGroup) -> Iterator[RecordedCollectives]:
    """Let this process be one rank of ``world`` inside the block; what it calls goes to ``log``."""
    stand_in = RecordedCollectives(log, world)
    with ExitStack() as stack:
        for name in _SAME_NAME:
            stack.enter_context(mock.patch.object(dist, name, getattr(stand_in, name)))
        stack.enter_context(mock.patch.object(dist, "P2POp", RecordedP2POp))
        gather, scatter = stand_in.all_gather_single, stand_in.reduce_scatter_single
        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, gather))
        for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, scatter))
        stack.enter_context(mock.patch.object(collectives, "_all_gather", gather))
        stack.enter_context(mock.patch.object(collectives, "_reduce_scatter", scatter))
        yield stand_in


def _splits(tensor: Tensor, rows: Sequence[int] | None, ranks: int) -> tuple[int, ...]:
    """Return the elements for each rank of an all-to-all whose splits are rows of dim 0."""
    if rows is None:
        return (tensor.numel() // ranks,) * ranks
    width = math.prod(tensor.shape[1:])
    return tuple(count * width for count in rows)


def _name(op: Any) -> str:
    return str(op).rsplit(".", maxsplit=1)[-1].lower()
