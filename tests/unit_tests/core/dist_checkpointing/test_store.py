import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.store import (
    COMMON,
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)
from megatron.core.errors import CheckpointError
from tests.helpers.ranks import run_ranks


def content(value: float = 1.0, size: int = 10) -> CheckpointContent:
    return CheckpointContent(
        tensors={"model.a": torch.full((size,), value)}, common={"step": value}
    )


def test_what_was_written_is_opened(tmp_path: Path) -> None:
    path, size = write_checkpoint(tmp_path, 5, content(), None)
    opened = open_checkpoint(tmp_path, None)
    assert opened is not None
    assert opened.path == path == tmp_path / "iter_0000005"
    assert opened.common["step"] == 1.0
    files = [entry for entry in path.iterdir() if entry.name != folders.MANIFEST]
    assert size == sum(entry.stat().st_size for entry in files)


def test_small_files_travel_with_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_text("words")
    files = {"tokenizer/t.model": tmp_path / "t.model"}
    write_checkpoint(tmp_path, 5, CheckpointContent(tensors={}, common={}, files=files), None)
    assert (tmp_path / "iter_0000005" / "tokenizer" / "t.model").read_text() == "words"


def test_an_empty_folder_opens_as_none(tmp_path: Path) -> None:
    assert open_checkpoint(tmp_path, None) is None


def test_an_iteration_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, content(), None)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of iteration 6.*here: 5"):
        open_checkpoint(tmp_path, None, iteration=6)


def test_an_older_iteration_can_be_asked_for(tmp_path: Path) -> None:
    for step in (5, 10):
        write_checkpoint(tmp_path, step, content(step), None)
    opened = open_checkpoint(tmp_path, None, iteration=5)
    assert opened is not None
    assert opened.common["step"] == 5


def test_keep_last_deletes_the_oldest_after_success(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, content(step), None, keep_last=2)
    assert folders.complete_iterations(tmp_path) == [10, 15]


def test_later_checkpoints_of_another_run_stay_and_are_told_once(tmp_path: Path, caplog) -> None:
    write_checkpoint(tmp_path, 300, content(300), None)
    for step in (20, 40, 60):
        write_checkpoint(tmp_path, step, content(step), None, keep_last=2)
    assert folders.complete_iterations(tmp_path) == [40, 60, 300]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "iter_0000300 is of a later iteration" in told[0]


def test_a_checkpoint_that_is_being_replaced_is_read_where_it_lies(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, 5, content(), None)
    hidden = path.rename(tmp_path / ".iter_0000005.old")
    opened = open_checkpoint(tmp_path, None)
    assert opened is not None
    assert opened.path == hidden
    assert opened.common["step"] == 1.0


def test_a_format_of_another_version_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron.core.dist_checkpointing.store.FORMAT_VERSION", 99)
    write_checkpoint(tmp_path, 5, content(), None)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99; this version reads format 2"):
        open_checkpoint(tmp_path, None)


def test_a_damaged_common_file_is_named(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, 5, content(), None)
    (path / COMMON).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{COMMON} has 2 bytes"):
        open_checkpoint(tmp_path, None)


def _disk_of_rank_1_is_full(folder: str) -> None:
    group, path = dist.group.WORLD, Path(folder)
    mine = {"model.a": torch.zeros(10), f"model.own{dist.get_rank()}": torch.zeros(200_000)}
    write_checkpoint(path, 5, CheckpointContent(tensors=mine, common={}), group)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(path, 10, CheckpointContent(tensors=mine, common={}), group)
    assert gather(str(caught.value), group) == ["rank 1: File too large"] * 2
    dist.barrier()
    assert sorted(os.listdir(path)) == ["iter_0000005", folders.TRACKER]
    opened = open_checkpoint(path, group)
    assert opened is not None
    assert opened.path.name == "iter_0000005"


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run_ranks(_disk_of_rank_1_is_full, 2, str(tmp_path))


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Not a directory|File exists"):
        write_checkpoint(tmp_path / "file" / "sub", 5, content(), None)
