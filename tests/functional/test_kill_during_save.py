"""kill -9 at random moments of a run that saves all the time: the latest stays loadable."""

import os
import random
import signal
import time
from pathlib import Path

import torch

from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)

KILLS = 12
NUMBERS = 200_000


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
    write_checkpoint(
        tmp_path,
        iteration,
        CheckpointContent(
            tensors={f"model.{name}": torch.ones(NUMBERS) for name in "abcd"},
            common={"iteration": iteration},
        ),
        None,
    )
    killed_in_the_middle = 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            save_for_ever(tmp_path, iteration + 1)
            os._exit(0)
        time.sleep(draw.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed_in_the_middle += any(entry.suffix == ".tmp" for entry in tmp_path.iterdir())
        after = loaded_iteration(tmp_path)
        assert after >= iteration
        iteration = after
    assert iteration > 1, "no save ever finished: the test kills too early"
    assert killed_in_the_middle > 0, "no save was ever interrupted: the test shows nothing"
