"""Ranks as processes that wait for orders: several worlds of this machine take turns in one run.

Each process is bound to one core and computes with one thread. Worlds do not know each other.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Order = Callable[..., Any]
_fork = multiprocessing.get_context("fork")


class World:
    """The processes of one world, seen from the process that gives the orders."""

    def __init__(self, ends: Sequence[Connection]) -> None:
        """Talk to the ranks over ``ends``, in rank order."""
        self._ends = list(ends)

    def start(self, order: Order, *args: Any) -> None:
        """Let every rank call ``order(kept, *args)``; ``kept`` is a dict of its own."""
        for end in self._ends:
            end.send((order, args))

    def answers(self) -> list[Any]:
        """Return what each rank's call returned.

        Raises:
            SystemExit: A rank failed; its traceback is shown.
        """
        found = [end.recv() for end in self._ends]
        for failed, answer in found:
            if failed:
                raise SystemExit(answer)
        return [answer for _, answer in found]

    def do(self, order: Order, *args: Any) -> list[Any]:
        """Start and return the answers."""
        self.start(order, *args)
        return self.answers()


@contextmanager
def worlds(cores: Sequence[Sequence[int]]) -> Iterator[list[World]]:
    """Start worlds; ``cores`` names the core of each rank of each of them."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        found = [
            World(
                [
                    stack.enter_context(_rank(Path(folder) / f"store{number}", of_ranks, rank))
                    for rank in range(len(of_ranks))
                ]
            )
            for number, of_ranks in enumerate(cores)
        ]
        for world in found:
            world.answers()  # all are connected
        yield found


def own_cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


@contextmanager
def _rank(store: Path, cores: Sequence[int], rank: int) -> Iterator[Connection]:
    mine, theirs = _fork.Pipe()
    process = _fork.Process(target=_serve, args=(mine, theirs, store, cores, rank), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine
    finally:
        mine.close()  # the process ends when nobody talks to it any more
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(
    others: Connection, orders: Connection, store: Path, cores: Sequence[int], rank: int
) -> None:
    others.close()  # inherited; open, it would keep the end of orders from being seen
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(cores))
    orders.send((False, None))
    kept: dict[str, Any] = {}
    while True:
        try:
            order, args = orders.recv()
        except EOFError:
            break
        try:
            orders.send((False, order(kept, *args)))
        except BaseException:
            orders.send((True, f"rank {rank} of {len(cores)}:\n{traceback.format_exc()}"))
            raise
    kept.clear()
    dist.destroy_process_group()
