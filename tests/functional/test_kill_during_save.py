"""kill -9 while saving, at every change of the disk and at random moments: the latest loads."""

import os
import random
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)
from tests.helpers.endless_saves import kill_at_random

KILLED = 9
SYNC_AND_ASYNC = [pytest.param(False, id="sync"), pytest.param(True, id="async")]


@pytest.mark.parametrize("is_async", SYNC_AND_ASYNC)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_latest_checkpoint_loads_after_kill_9_at_random_moments(
    world_size: int, is_async: bool, tmp_path: Path
) -> None:
    draw = random.Random(11)
    kill_at_random(tmp_path / "run", world_size, is_async=is_async, interrupted=3, draw=draw)


@pytest.mark.slow
@pytest.mark.parametrize("is_async", SYNC_AND_ASYNC)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_latest_checkpoint_loads_after_kill_9_in_20_saves(
    world_size: int, is_async: bool, tmp_path: Path
) -> None:
    draw = random.Random(12)
    kill_at_random(tmp_path / "run", world_size, is_async=is_async, interrupted=20, draw=draw)


def small(value: float) -> CheckpointContent:
    return CheckpointContent(
        tensors={"model.a": torch.full((10,), float(value))}, common={"step": value}
    )


def _save_until_step(folder: Path, iteration: int, last_step: int) -> bool:
    """Save in a forked process that dies at its ``last_step``-th change of the disk."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), "saving failed of itself"
        return code == 0
    steps = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps > last_step:
                os._exit(KILLED)
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open"):
        setattr(os, name, counted(getattr(os, name)))
    code = 1
    try:
        write_checkpoint(folder, iteration, small(iteration), None, keep_last=1)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("iteration", [5, 10])
def test_a_save_killed_at_any_change_of_the_disk_leaves_a_loadable_latest(
    tmp_path: Path, iteration: int
) -> None:
    """Iteration 5 is there already and is replaced; 10 is new and prunes 5."""
    write_checkpoint(tmp_path, 5, small(5), None)
    last_step, done = 0, False
    while not done:
        done = _save_until_step(tmp_path, iteration, last_step)
        opened = open_checkpoint(tmp_path, None)
        assert opened is not None, last_step
        name = opened.path.name.removeprefix(".").removesuffix(".old")  # the next save renames it
        assert name == f"iter_{int(opened.common['step']):07d}"
        last_step += 1
    assert last_step > 12
    write_checkpoint(tmp_path, 15, small(15), None, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000015", folders.TRACKER]
