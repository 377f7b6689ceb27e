"""Ranks that save one checkpoint after the other until they are killed."""

import faulthandler
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)
from megatron.training.checkpoint_state import Retention
from megatron.training.saver import BackgroundWriter

NUMBERS = 200_000
PATIENCE = timedelta(seconds=60)
KEEP_LAST = 2


def keys(world_size: int) -> list[str]:
    """Return the names of the tensors that ranks save together."""
    return ["model.shared", *(f"model.rank{r}.{name}" for r in range(world_size) for name in "ab")]


def save_for_ever(
    folder: Path, first: int, who: tuple[int, int], meeting: Path, began: int, *, is_async: bool
) -> None:
    """Save tensors full of the number of the iteration; tell ``began`` of each save."""
    rank, world_size = who
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=PATIENCE,
    )
    own = [key for key in keys(world_size) if key == "model.shared" or f"rank{rank}." in key]
    held = {key: torch.empty(NUMBERS) for key in own}
    writer = BackgroundWriter(PATIENCE) if is_async else None
    for iteration in count(first):
        for tensor in held.values():
            tensor.fill_(iteration)
        content = CheckpointContent(tensors=held, common={"iteration": iteration})
        if writer is None:
            os.write(began, b".")
            write_checkpoint(folder, iteration, content, dist.group.WORLD, keep_last=KEEP_LAST)
            continue
        result = writer.wait()
        assert result is None or result.path is not None, result
        writer.begin(folder, iteration, content, Retention(KEEP_LAST))
        os.write(began, b".")
        for tensor in held.values():
            tensor.fill_(-1)  # training goes on


class SavingWorld:
    """Forked ranks in ``save_for_ever``. A context: none of them outlives it."""

    def __init__(self, folder: Path, first: int, world_size: int, *, is_async: bool) -> None:
        self.pids: list[int] = []
        self._world_size = world_size
        reading, writing = os.pipe()
        self._began: BinaryIO = os.fdopen(reading, "rb", buffering=0)
        meeting = folder.with_name(f"{folder.name}.meeting{first}.{os.getpid()}")
        meeting.unlink(missing_ok=True)
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                try:
                    who = rank, world_size
                    save_for_ever(folder, first, who, meeting, writing, is_async=is_async)
                finally:
                    traceback.print_exc()
                    os._exit(1)  # the test must not run on in this process
            self.pids.append(pid)
        os.close(writing)

    def __enter__(self) -> "SavingWorld":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kill(self.pids)
        self.wait()
        self._began.close()

    def wait_for_saves(self, number: int) -> None:
        """Wait until all ranks have begun ``number`` saves more."""
        for _ in range(number * self._world_size):
            ready, _, _ = select.select([self._began], [], [], PATIENCE.total_seconds() / 2)
            if not ready:
                for pid in self.pids:
                    os.kill(pid, signal.SIGUSR1)
                time.sleep(1)
            assert ready, "no rank begins a save"
            assert self._began.read(1), "all ranks ended by themselves"

    def kill(self, ranks: Iterable[int]) -> None:
        """Kill some ranks; the others must end by themselves."""
        self._kill([self.pids[rank] for rank in ranks])
        self.wait()

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until all ranks are gone; one that stays is killed, and that is a failure."""
        deadline = time.monotonic() + PATIENCE.total_seconds() / 2
        while self.pids:
            self.pids = [pid for pid in self.pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
            if time.monotonic() > deadline:
                for pid in self.pids:
                    os.kill(pid, signal.SIGUSR1)  # it shows where it stands
                time.sleep(1)
                self._kill(self.pids)
                raise AssertionError("a rank hangs after another one was killed")
            time.sleep(0.002)


def loaded_iteration(folder: Path, world_size: int) -> int:
    """Return the iteration of the newest checkpoint, all of whose numbers must say the same."""
    opened = open_checkpoint(folder, None)
    assert opened is not None, "nothing to load"
    iteration = opened.common["iteration"]
    tensors = {key: torch.zeros(NUMBERS) for key in keys(world_size)}
    read_tensors(opened.path, tensors, None, prefixes=("model.",))
    for key, tensor in tensors.items():
        assert tensor.eq(iteration).all(), f"{key} is not of iteration {iteration}"
    return iteration


def is_half_saved(folder: Path) -> bool:
    """Tell whether a save was interrupted in ``folder``, by what it left."""
    return any(entry.name.startswith(".") for entry in folder.iterdir())


def kill_at_random(
    folder: Path, world_size: int, *, is_async: bool, interrupted: int, draw: random.Random
) -> int:
    """Kill ranks until so many saves were interrupted; check the newest checkpoint each time.

    Returns:
        How many kills it took.
    """
    last = 0
    for kills in range(1, 6 * interrupted + 1):
        with SavingWorld(folder, last + 1, world_size, is_async=is_async) as world:
            world.wait_for_saves(1)
            begin = time.perf_counter()
            world.wait_for_saves(1)  # the first is complete now, or nearly so
            save_s = time.perf_counter() - begin
            time.sleep(draw.uniform(0, 1.2) * save_s)
            everyone = list(range(world_size))
            world.kill(everyone if draw.random() < 0.5 else [draw.choice(everyone)])
        found = loaded_iteration(folder, world_size)
        assert found >= last, f"iteration {last} was the newest, and {found} is now"
        last = found
        interrupted -= is_half_saved(folder)
        if not interrupted:
            return kills
    raise AssertionError("too few saves were interrupted: the test shows nothing")
