"""Training over saves that fail: a full disk, a folder that is gone or closed."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron.core.dist_checkpointing import folders, tensor_file
from megatron.core.dist_checkpointing.folders import TRACKER
from megatron.training import saver
from tests.helpers.dying_runs import LAYERS, steps, tensors
from tests.helpers.forked_training import train
from tests.helpers.ranks import run_ranks

ITERATIONS = 8
FLAGS = (
    f"{LAYERS} --expert-model-parallel-size 2 --train-iters {ITERATIONS} --save-interval 2 "
    "--save {0} --log-dir {0}.log"
)
ROOM_BYTES = 50_000
"""What fits on the full disk: documents, and a part of the tensors."""
BAD_ITERATIONS = (2, 6)
"""The first save fails, the second goes well, the third fails, the last one goes well."""


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Let this process write no file larger than ``ROOM_BYTES``: the kernel cuts it off."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_on_rank_1(rank: int) -> Iterator[None]:
    with full_disk(rank) if rank == 1 else pytest.MonkeyPatch.context():
        yield


@contextmanager
def no_room_left(rank: int) -> Iterator[None]:
    """Answer each flush of a file as a full disk does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file.os, "fsync", refusing(errno.ENOSPC))
        yield


@contextmanager
def read_only(rank: int) -> Iterator[None]:
    """Permissions would not stop a test that runs as root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", refusing(errno.EROFS))
        yield


@contextmanager
def folder_gone_in_mid_save(rank: int) -> Iterator[None]:
    right = folders.begin

    def begin(folder: Path, iteration: int) -> Path:
        temporary = right(folder, iteration)
        shutil.rmtree(temporary)
        return temporary

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "begin", begin)
        yield


def refusing(number: int) -> Callable:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


TROUBLES = {
    "full": (full_disk, "File too large"),
    "full on one rank": (full_on_rank_1, "rank 1: File too large"),
    "no space": (no_room_left, "No space left on device"),
    "read-only": (read_only, "Read-only file system"),
    "gone": (folder_gone_in_mid_save, "is not visible on"),
}


def train_with_trouble(flags: list[str], name: str, bad: tuple[int, ...]) -> None:
    right, rank = saver.publish, int(os.environ["RANK"])

    def publish(folder: Path, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if iteration not in bad:
            return right(folder, iteration, *args, **kwargs)
        with TROUBLES[name][0](rank):
            return right(folder, iteration, *args, **kwargs)

    saver.publish = publish
    train(flags)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(train, 2, FLAGS.format(folder).split())
    return folder


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("full", ""),
        ("full on one rank", "--async-save"),
        slow("full", "--async-save"),
        slow("full on one rank", ""),
        *(slow(name, flag) for name in list(TROUBLES)[2:] for flag in ("", "--async-save")),
    ],
)
def test_training_goes_on_over_saves_that_fail(
    name: str, flag: str, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = f"{FLAGS.format(folder)} {flag}".split()
    run_ranks(train_with_trouble, 2, words, name, BAD_ITERATIONS)
    out = capfd.readouterr().out
    told = [line for line in out.splitlines() if "NOT saved" in line]
    assert len(told) == len(BAD_ITERATIONS), "one line for a save, whatever the ranks"
    for line, iteration in zip(told, BAD_ITERATIONS, strict=True):
        assert line.startswith("warning [rank 0]: checkpoint of iteration"), line
        assert f"iteration {iteration} was NOT saved: " in line
        assert TROUBLES[name][1] in line
        assert line.endswith("earlier checkpoints are untouched; training goes on")
    assert sorted(os.listdir(folder)) == ["iter_0000004", "iter_0000008", TRACKER]
    logs = [Path(f"{path}.log") for path in (folder, undisturbed)]
    assert steps(logs[0]) == steps(logs[1]), "training does not notice"
    found, expected = tensors(folder), tensors(undisturbed)
    assert all(found[key].equal(tensor) for key, tensor in expected.items())


def stop_with_trouble(flags: list[str], name: str) -> None:
    """Train, the last save failing."""
    with pytest.raises(SystemExit) as ended:
        train_with_trouble(flags, name, (ITERATIONS,))
    assert ended.value.code == 2


@pytest.mark.parametrize("flag", ["", slow("--async-save")])
def test_a_last_save_that_fails_ends_the_run_with_an_error_and_the_one_before_loads(
    flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_ranks(stop_with_trouble, 2, f"{FLAGS.format(folder)} {flag}".split(), "full")
    told = [line for line in capfd.readouterr().err.splitlines() if "NOT saved" in line]
    assert "checkpoint of iteration 8 was NOT saved: File too large" in told[0]
    left = ["iter_0000002", "iter_0000004", "iter_0000006", TRACKER]
    assert sorted(os.listdir(folder)) == left
    assert (folder / TRACKER).read_text() == "6"
    assert tensors(folder)
