"""kill -9 while saving, at every change of the disk and at random moments: the latest loads."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)

KILLS = 12
NUMBERS = 200_000
KILLED = 9


def save_for_ever(folder: Path, first: int) -> None:
    for iteration in range(first, 1_000_000):
        tensors = {f"model.{name}": torch.full((NUMBERS,), float(iteration)) for name in "abcd"}
        write_checkpoint(
            folder,
            iteration,
            CheckpointContent(tensors=tensors, common={"iteration": iteration}),
            None,
            keep_last=2,
        )


def loaded_iteration(folder: Path) -> int:
    opened = open_checkpoint(folder, None)
    assert opened is not None
    iteration = opened.common["iteration"]
    tensors = {f"model.{name}": torch.zeros(NUMBERS) for name in "abcd"}
    read_tensors(opened.path, tensors, None, prefixes=("model.",))
    assert all(tensor.eq(iteration).all() for tensor in tensors.values())
    return iteration


def test_the_latest_checkpoint_is_loadable_after_kill_9_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(11)
    iteration = 1
    began = time.perf_counter()
    write_checkpoint(
        tmp_path,
        iteration,
        CheckpointContent(
            tensors={f"model.{name}": torch.ones(NUMBERS) for name in "abcd"},
            common={"iteration": iteration},
        ),
        None,
    )
    save_s = time.perf_counter() - began  # what a moment is, on a machine as busy as this
    killed_in_the_middle = 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, iteration + 1)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.2, 5.0) * save_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed_in_the_middle += any(entry.suffix == ".tmp" for entry in tmp_path.iterdir())
        after = loaded_iteration(tmp_path)
        assert after >= iteration
        iteration = after
    assert iteration > 1, "no save ever finished: the test kills too early"
    assert killed_in_the_middle > 0, "no save was ever interrupted: the test shows nothing"


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
