"""Non-persistent checkpoints of which one node, or another user or run, has made something else."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from megatron.core.dist_checkpointing import folders
from megatron.training import non_persistent
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import wrong_keys
from tests.unit_tests.training.test_non_persistent import Node, _flip


def _one_is_damaged(folder: Path) -> None:
    node = Node(folder, "local", sharded=True)
    node.save(1)
    assert node.keep(2).error == ""
    dist.barrier()
    if dist.get_rank() == 1:
        _flip(node.between.folder(node.config.checkpoint.save))
    dist.barrier()
    again = Node(folder, "local", sharded=True)
    assert again.load().iteration == 1
    assert wrong_keys(again.tensors()) == []
    # a node that had read its own would have sent its weights to the others by now
    weights = [param.detach().clone() for param in again.model.module.parameters()]
    again.model.start_param_sync()
    again.model.finish_param_sync()
    for param, weight in zip(again.model.module.parameters(), weights, strict=True):
        assert param.equal(weight)


def test_with_a_sharded_optimizer_no_node_gathers_before_all_have_read(tmp_path: Path) -> None:
    run_ranks(_one_is_damaged, 2, tmp_path)


def _one_cannot_look(folder: Path) -> None:
    """A disk of rank 1 that answers no longer: neither loading nor saving may end on it alone."""
    node = Node(folder, "local")
    node.save(1)
    assert node.keep(2).error == ""
    mine = node.between.folder(node.config.checkpoint.save)

    def broken(place: Path) -> list[int]:
        if place == mine and dist.get_rank() == 1:
            raise OSError(5, "Input/output error", str(place))
        return folders.complete_iterations(place)

    real = non_persistent.folders
    non_persistent.folders = SimpleNamespace(complete_iterations=broken, delete=folders.delete)
    try:
        assert node.keep(3).error == ""
        loaded = Node(folder, "local").load()
    finally:
        non_persistent.folders = real
    assert loaded.iteration == 1
    assert f"rank 1: Input/output error ({mine.parent}/node00001)" in loaded.notices[0]


def test_a_node_whose_folder_cannot_be_read_has_none(tmp_path: Path) -> None:
    run_ranks(_one_cannot_look, 2, tmp_path)


def _planted(folder: Path) -> None:
    node = Node(folder, "in_memory")
    mine = node.between.folder(node.config.checkpoint.save).parent
    assert node.keep(2).error == ""
    theirs = Path(shutil.copytree(mine, folder / "theirs"))
    node.between.clean()
    mine.symlink_to(theirs)
    try:
        found = node.between.newest(str(folder / "run"))
    finally:
        mine.unlink()
    assert found.iteration is None
    assert "is not of this user" in found.why


def test_what_someone_else_left_in_memory_is_not_loaded(tmp_path: Path) -> None:
    run_ranks(_planted, 1, tmp_path)


def _two_runs(folder: Path) -> None:
    first, second = (Node(folder / name, "global", together=folder / "all") for name in "ab")
    assert first.keep(5).error == ""
    assert second.keep(3).error == ""
    assert first.kept() == [5]
    assert second.kept() == [3]
    assert first.load().iteration == 5


def test_runs_that_share_a_folder_keep_a_checkpoint_each(tmp_path: Path) -> None:
    run_ranks(_two_runs, 1, tmp_path)
