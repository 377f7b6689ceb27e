import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron.core.dist_checkpointing import folders
from megatron.core.errors import CheckpointError


def save(folder: Path, iteration: int, text: str = "{}") -> None:
    temporary = folders.begin(folder, iteration)
    (temporary / folders.MANIFEST).write_text(text)
    folders.publish(temporary, folder, iteration)


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_published_checkpoint_is_the_latest(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    assert folders.latest_iteration(tmp_path) == 10
    assert visible(tmp_path) == ["iter_0000005", "iter_0000010", folders.TRACKER]


def test_an_empty_or_missing_folder_has_no_latest(tmp_path: Path) -> None:
    assert folders.latest_iteration(tmp_path) is None
    assert folders.latest_iteration(tmp_path / "nothing") is None


def test_a_checkpoint_without_tracker_counts_when_it_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / folders.TRACKER).unlink()
    (tmp_path / "iter_0000009").mkdir()
    assert folders.latest_iteration(tmp_path) == 5


def test_a_tracker_that_names_nothing_is_refused_with_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / folders.TRACKER).write_text("7")
    with pytest.raises(CheckpointError, match=r"iteration 7.*complete here: 5.*--ckpt-step"):
        folders.latest_iteration(tmp_path)


def test_a_damaged_tracker_is_named(tmp_path: Path) -> None:
    (tmp_path / folders.TRACKER).write_text("ten\n")
    with pytest.raises(CheckpointError, match=f"{folders.TRACKER} holds 'ten'"):
        folders.latest_iteration(tmp_path)


def test_what_a_killed_run_left_goes_at_the_next_save(tmp_path: Path) -> None:
    folders.begin(tmp_path, 5).joinpath("half").write_text("x")
    (tmp_path / ".iter_0000003.pruned").mkdir()
    (tmp_path / ".keep").mkdir()
    save(tmp_path, 10)
    assert visible(tmp_path) == [".keep", "iter_0000010", folders.TRACKER]


def test_what_cannot_be_deleted_stops_no_save(tmp_path: Path, monkeypatch) -> None:
    right = os.rmdir

    def busy(path: str, **how: Any) -> None:
        """As on NFS, while a reader has a file of the folder open."""
        if str(path).endswith((".pruned", ".old")):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        right(path, **how)

    monkeypatch.setattr(os, "rmdir", busy)
    save(tmp_path, 5)
    save(tmp_path, 10)
    with pytest.raises(OSError, match="not empty"):
        folders.prune(tmp_path, 1, 10)
    save(tmp_path, 10, "again")
    save(tmp_path, 15)
    assert folders.complete_iterations(tmp_path) == [10, 15]
    monkeypatch.undo()
    save(tmp_path, 20)
    assert [name for name in visible(tmp_path) if name.startswith(".")] == []


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    save(tmp_path, 5, "new")
    assert (tmp_path / "iter_0000005" / folders.MANIFEST).read_text() == "new"
    assert visible(tmp_path) == ["iter_0000005", folders.TRACKER]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    (tmp_path / "iter_0000005").rename(tmp_path / ".iter_0000005.old")
    assert folders.latest_iteration(tmp_path) == 5
    save(tmp_path, 10)
    assert visible(tmp_path) == ["iter_0000005", "iter_0000010", folders.TRACKER]


def test_readers_find_a_checkpoint_that_is_being_replaced_and_change_nothing(
    tmp_path: Path,
) -> None:
    save(tmp_path, 5)
    hidden = (tmp_path / "iter_0000005").rename(tmp_path / ".iter_0000005.old")
    before = visible(tmp_path)
    assert folders.latest_iteration(tmp_path) == 5
    assert folders.complete_iterations(tmp_path) == [5]
    assert folders.find_checkpoint(tmp_path, 5) == hidden
    assert visible(tmp_path) == before
    (hidden / folders.MANIFEST).unlink()
    assert folders.find_checkpoint(tmp_path, 5) is None


def test_pruning_keeps_the_newest_and_the_one_just_written(tmp_path: Path) -> None:
    for iteration in (5, 10, 15, 20):
        save(tmp_path, iteration)
    assert folders.prune(tmp_path, 2, 20) == [5, 10]
    assert folders.prune(tmp_path, 2, 20) == []
    assert folders.complete_iterations(tmp_path) == [15, 20]


def test_pruning_counts_no_later_checkpoints_which_an_earlier_run_left(tmp_path: Path) -> None:
    for iteration in (100, 200, 300, 20, 40):
        save(tmp_path, iteration)
        assert folders.prune(tmp_path, 2, iteration) == ([100] if iteration == 300 else [])
    save(tmp_path, 60)
    assert folders.prune(tmp_path, 2, 60) == [20]
    assert folders.complete_iterations(tmp_path) == [40, 60, 200, 300]
