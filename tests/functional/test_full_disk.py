"""A disk that is full, gone or read-only: one line, training goes on, the previous one loads."""

import errno
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)
from megatron.core.errors import CheckpointError

TAKE_ROOM = ("fsync", "mkdir")


def content(value: float) -> CheckpointContent:
    return CheckpointContent(
        tensors={"model.a": torch.full((10,), float(value))}, common={"iteration": value}
    )


def loaded(folder: Path) -> int | None:
    """Return the iteration of the newest checkpoint, all of which must be of that iteration."""
    opened = open_checkpoint(folder, None)
    if opened is None:
        return None
    tensors = {"model.a": torch.zeros(10)}
    read_tensors(opened.path, tensors, None, prefixes=("model.",))
    assert tensors["model.a"].eq(opened.common["iteration"]).all()
    assert opened.path.name == f"iter_{opened.common['iteration']:07d}"
    return opened.common["iteration"]


def full_from(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the ``step``-th change of the disk fail, and all later ones that take room."""
    done = 0

    def failing(name: str) -> Callable:
        function = getattr(os, name)

        def change(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step or (done > step and name in TAKE_ROOM):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return change

    for name in (*TAKE_ROOM, "rename", "replace"):
        patch.setattr(os, name, failing(name))


@pytest.mark.parametrize("before", [(), (5,), (3, 5)], ids=["first save", "second", "third"])
@pytest.mark.parametrize("iteration", [5, 10])
def test_a_disk_that_is_full_at_any_moment_changes_nothing(
    before: tuple[int, ...], iteration: int, tmp_path: Path
) -> None:
    """Iteration 5 is there already, unless it is the first save; 10 is new."""
    for saved in before:
        write_checkpoint(tmp_path, saved, content(saved), None)
    newest, there = max(before, default=None), set(os.listdir(tmp_path))
    for step in count(1):
        error = save_on_a_full_disk(tmp_path, iteration, step)
        if not error or loaded(tmp_path) == iteration != newest:
            break  # it is saved; at most the last flush, of the tracker's name, has failed
        assert "No space left on device" in error
        assert loaded(tmp_path) == newest, step
        left = {name for name in os.listdir(tmp_path) if not name.endswith(".old")}  # whole too
        assert left == there, step
    assert step > 12
    write_checkpoint(tmp_path, iteration, content(iteration), None)
    assert loaded(tmp_path) == iteration


def save_on_a_full_disk(folder: Path, iteration: int, step: int) -> str:
    """Save, the disk being full from its ``step``-th change on; return the error."""
    with pytest.MonkeyPatch.context() as patch:
        full_from(patch, step)
        try:
            write_checkpoint(folder, iteration, content(iteration), None)
        except CheckpointError as error:
            return str(error)
    return ""
