"""Non-persistent checkpoints: the newest alone is kept, and taken only where all nodes have it."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.tensor_shards import TensorShards
from megatron.core.errors import CheckpointError
from megatron.core.param_role import LogicalShard
from megatron.training import memory_room
from megatron.training.checkpoint_state import LoadedState, SaveResult, TrainState
from megatron.training.checkpointing import (
    checkpoint_content,
    load_checkpoint,
    save_checkpoint,
)
from megatron.training.config.run_config import RunConfig
from megatron.training.initialize import Launch
from megatron.training.memory_room import check_room, free_bytes
from megatron.training.non_persistent import Found, NonPersistent, agreed
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import build, fill, wrong_keys

KINDS = ("global", "local", "in_memory")


class Node:
    """A rank that thinks that it has a node of its own, or shares one."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        *,
        ep: int = 1,
        alone: bool = True,
        together: Path | None = None,
        **how: Any,
    ) -> None:
        values = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "lr": 1e-3}
        values |= {"num_moe_experts": 4, "train_iters": 99, "lr_decay_iters": 99}
        values |= {"global_batch_size": 8, "expert_model_parallel_size": ep}
        values |= {"save": str(folder / "run"), "load": str(folder / "run")}
        values |= {"non_persistent_ckpt_type": kind, "non_persistent_save_interval": 1}
        if kind == "local":
            values["non_persistent_local_ckpt_dir"] = str(folder / "disks")
        if together is not None:  # with other runs
            values["non_persistent_global_ckpt_dir"] = str(together)
        self.config = RunConfig.from_flat(values)
        size, rank = dist.get_world_size(), dist.get_rank()
        launch = Launch(rank, size, 0 if alone else rank, 1 if alone else size)
        between = NonPersistent.create(self.config, launch)
        assert between is not None
        self.between = between
        self.model, self.optimizer = build(ep, **how)
        self.optimizer.step_count = 3

    @property
    def parts(self) -> dict[str, Any]:
        return {"config": self.config, "model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        weights, moments = self.model.module, self.optimizer.named_state()
        return model_tensors(weights) | optimizer_tensors(moments)

    def state(self, iteration: int) -> TrainState:
        return TrainState(iteration=iteration, consumed_samples=8 * iteration, dropout_seed=7)

    def keep(self, iteration: int) -> SaveResult:
        fill(self.tensors())
        content = checkpoint_content(self.state(iteration), **self.parts)
        return self.between.save(iteration, content)

    def save(self, iteration: int) -> None:
        fill(self.tensors())
        result = save_checkpoint(self.config.checkpoint.save, self.state(iteration), **self.parts)
        assert result.error == ""

    def load(self) -> LoadedState:
        def reader(folder: str | None, **options: Any) -> LoadedState:
            return load_checkpoint(folder, **(self.parts | options))

        return self.between.load(self.config, reader)

    def kept(self) -> list[int]:
        return folders.complete_iterations(self.between.folder(self.config.checkpoint.save))


def _the_newest_is_kept_and_loaded(folder: Path, kind: str, ep: int) -> None:
    node = Node(folder, kind, ep=ep)
    node.save(1)
    for iteration in (2, 3):
        result = node.keep(iteration)
        assert result.error == ""
        assert result.line().startswith(f"saved {kind} checkpoint of iteration {iteration} to ")
        dist.barrier()
        assert node.kept() == [iteration]
        dist.barrier()
    again = Node(folder, kind, ep=ep)
    torch.manual_seed(dist.get_rank())
    loaded = again.load()
    assert (loaded.iteration, loaded.consumed_train_samples, loaded.dropout_seed) == (3, 24, 7)
    assert wrong_keys(again.tensors()) == []
    assert loaded.notices[0] == (
        f"the {kind} checkpoint of iteration 3 is taken, since it is newer than iteration 1 of "
        f"--load {folder}/run"
    )
    again.save(4)
    assert Node(folder, kind, ep=ep).load().iteration == 4  # the persistent one is newer now
    again.between.clean()
    dist.barrier()
    assert again.kept() == ([] if kind == "in_memory" else [3])
    assert not Path("/dev/shm", again.between.folder(folder).parent.name).exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2)])
def test_the_newest_is_kept_and_taken_while_it_is_newer(
    tmp_path: Path, kind: str, world_size: int, ep: int
) -> None:
    run_ranks(_the_newest_is_kept_and_loaded, world_size, tmp_path, kind, ep)


def _parts_of_tensors(folder: Path, how: dict[str, Any]) -> None:
    node = Node(folder, "local", **how)
    assert node.keep(2).error == ""
    index = node.between.folder(f"{folder}/run") / "iter_0000002" / "index.json"
    stored = json.loads(index.read_text())
    there = {
        key: sum(math.prod(block["shape"]) for block in entry["blocks"]) / math.prod(entry["shape"])
        for key, entry in stored.items()
        if not key.startswith("rng.")
    }
    all_there = gather(there, dist.group.WORLD)
    is_part = min(share for part in all_there for share in part.values()) < 1
    assert is_part or all_there[0] != all_there[1]  # some tensors are elsewhere
    again = Node(folder, "local", **how)
    assert again.load().iteration == 2
    assert wrong_keys(again.tensors()) == []


@pytest.mark.parametrize("how", [{"etp": 2}, {"sharded": True}], ids=["ETP 2", "ZeRO"])
def test_a_node_that_holds_parts_of_tensors_keeps_those(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    run_ranks(_parts_of_tensors, 2, tmp_path, how)


def _nodes_share_nothing(folder: Path) -> None:
    node = Node(folder, "local", ep=2)
    node.keep(2)
    dist.barrier()
    mine = node.between.folder(node.config.checkpoint.save) / "iter_0000002"
    held = (mine / "index.json").read_text()
    first = 2 * dist.get_rank()  # of the four experts two are here
    for expert in range(4):
        assert (f"local_experts.{expert}." in held) == (first <= expert < first + 2)
    assert len(list(mine.glob("*.safetensors"))) == 1


def test_a_node_writes_what_its_own_ranks_hold(tmp_path: Path) -> None:
    run_ranks(_nodes_share_nothing, 2, tmp_path)


def _damage(folder: Path, kind: str, how: Callable[[Path], None], words: str) -> None:
    node = Node(folder, kind, ep=2)
    node.save(1)
    node.keep(2)
    dist.barrier()
    if dist.get_rank() == 1:
        how(node.between.folder(node.config.checkpoint.save))
    dist.barrier()
    again = Node(folder, kind, ep=2)
    loaded = again.load()
    assert loaded.iteration == 1
    assert wrong_keys(again.tensors()) == []
    if words:
        assert words in loaded.notices[0]


def _flip(folder: Path) -> None:
    (file, *_) = sorted((folder / "iter_0000002").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def _older(folder: Path) -> None:
    (folder / "iter_0000002").rename(folder / "iter_0000001")


def _of_another_save(folder: Path) -> None:
    file = folder / "iter_0000002" / "common.json"
    file.write_text(file.read_text().replace('"mark": "', '"mark": "x'))


def _unreadable(folder: Path) -> None:
    (folder / "iter_0000002" / "common.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (shutil.rmtree, "iteration 2 is not on every node: the node of rank 1 has none"),
        (_older, "iteration 2 is not on every node: the node of rank 1 has none"),
        (_of_another_save, "iteration 2 is not on every node: saves differ"),
        (_unreadable, "is not readable"),
        (_flip, ""),
    ],
    ids=["gone", "older", "of another save", "unreadable", "a flipped bit"],
)
def test_where_one_node_has_lost_it_all_fall_back(
    tmp_path: Path, how: Callable[[Path], None], words: str
) -> None:
    run_ranks(_damage, 2, tmp_path, "local", how, words)


def test_a_damaged_shared_one_is_not_taken(tmp_path: Path) -> None:
    run_ranks(_damage, 2, tmp_path, "global", _flip, "")


def _keep(folder: Path, kind: str, ep: int, persistent: int | None) -> None:
    node = Node(folder, kind, ep=ep)
    if persistent is not None:
        node.save(persistent)
    assert node.keep(5).error == ""


def _load(folder: Path, kind: str, ep: int, iteration: int, words: str) -> None:
    node = Node(folder, kind, ep=ep)
    loaded = node.load()
    assert loaded.iteration == iteration
    assert wrong_keys(node.tensors()) == []
    assert words in loaded.notices[0]
    node.between.clean()


def test_another_layout_takes_a_shared_one_and_no_nodes_own(tmp_path: Path) -> None:
    for kind, iteration, words in (
        ("global", 5, "is taken"),
        ("local", 2, "is of another layout (expert_model_parallel_size was 2 and is 1)"),
    ):
        run_ranks(_keep, 2, tmp_path / kind, kind, 2, 2)
        run_ranks(_load, 2, tmp_path / kind, kind, 1, iteration, words)
        run_ranks(_load, 1, tmp_path / kind, kind, 1, iteration, words.split(" (")[0])


def test_a_killed_run_without_persistent_checkpoint_goes_on(tmp_path: Path) -> None:
    run_ranks(_keep, 2, tmp_path, "local", 2, None)
    run_ranks(_load, 2, tmp_path, "local", 2, 5, "newer than iteration 0")


def _one_node_cannot_write(folder: Path) -> None:
    node = Node(folder, "local", ep=2)
    assert node.keep(2).error == ""
    mine = node.between.folder(node.config.checkpoint.save)
    if dist.get_rank() == 1:
        mine.rename(mine.with_suffix(".away"))
        mine.write_text("no folder")
    dist.barrier()
    result = node.keep(3)
    assert "NOT saved" in result.line()
    assert str(mine.with_name("node00001")) in result.error
    if dist.get_rank() == 1:
        mine.unlink()
        mine.with_suffix(".away").rename(mine)
    dist.barrier()
    assert node.kept() == [2]  # also on the node that could
    assert Node(folder, "local", ep=2).between.newest(f"{folder}/run") == Found(2, "")


def test_where_one_node_cannot_write_all_keep_the_one_before(tmp_path: Path) -> None:
    run_ranks(_one_node_cannot_write, 2, tmp_path)


def _no_room(folder: Path) -> None:
    node = Node(folder, "in_memory", ep=2)
    assert node.keep(2).error == ""
    real, memory_room.free_bytes = memory_room.free_bytes, lambda _: dist.get_rank()
    result = node.keep(3)
    memory_room.free_bytes = real
    assert "0.00 GiB are free" in result.error
    assert "--non-persistent-ckpt-type local" in result.error
    assert node.kept() == [2]
    node.between.clean()


def test_memory_is_not_filled(tmp_path: Path) -> None:
    run_ranks(_no_room, 2, tmp_path)


def test_free_memory_is_the_smaller_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9 kB\nMemAvailable:       2 kB\n")
    assert free_bytes(tmp_path, file) == 2048
    file.write_text("MemAvailable:       9 kB\n")
    assert free_bytes(tmp_path, file) == 5000
    assert free_bytes(tmp_path, tmp_path / "none") == 5000


def _room_for_shared_blocks(folder: Path) -> None:
    whole = torch.zeros(8, dtype=torch.float64)
    half = whole[4 * dist.get_rank() :][:4]
    shard = LogicalShard("split", half, (8,), (4 * dist.get_rank(),))
    tensors = {"same": torch.zeros(16), "split": TensorShards([shard])}
    assert dist.group.WORLD is not None
    real = memory_room.free_bytes
    try:
        memory_room.free_bytes = lambda _: 128  # 64 that both hold, and two halves of 32
        check_room(folder, tensors, dist.group.WORLD)
        memory_room.free_bytes = lambda _: 127
        with pytest.raises(CheckpointError):
            check_room(folder, tensors, dist.group.WORLD)
    finally:
        memory_room.free_bytes = real


def test_what_several_ranks_hold_is_counted_once(tmp_path: Path) -> None:
    run_ranks(_room_for_shared_blocks, 2, tmp_path)


def _a_folder_of_someone_else(folder: Path) -> None:
    node = Node(folder, "in_memory", alone=False)
    theirs = node.between.folder(node.config.checkpoint.save).parent
    if dist.get_rank() == 0:
        theirs.symlink_to(folder)
    dist.barrier()
    result = node.keep(2)
    dist.barrier()
    if dist.get_rank() == 0:
        theirs.unlink()
    assert "is not of this user" in result.error


def test_a_planted_folder_in_memory_is_not_used(tmp_path: Path) -> None:
    run_ranks(_a_folder_of_someone_else, 2, tmp_path)


def test_memory_is_this_users_alone(tmp_path: Path) -> None:
    run_ranks(_private, 1, tmp_path)


def _private(folder: Path) -> None:
    node = Node(folder, "in_memory")
    assert node.keep(2).error == ""
    mine = node.between.folder(node.config.checkpoint.save).parent
    assert mine.stat().st_mode & 0o077 == 0
    assert f"-{os.getuid()}-" in mine.name
    node.between.clean()
    assert not mine.exists()


@pytest.mark.parametrize(
    ("offers", "found"),
    [
        ([(0, {}, "")], Found(None, "")),
        ([(0, {3: "a"}, ""), (4, {3: "a"}, "")], Found(3, "")),
        ([(0, {3: "a", 5: "b"}, ""), (4, {5: "b", 3: "a"}, "")], Found(5, "")),
        (
            [(0, {3: "a", 5: "b"}, ""), (4, {3: "a"}, "")],
            Found(
                3,
                "no newer non-persistent checkpoint is taken (iteration 5 is not on every node: "
                "the node of rank 4 has none)",
            ),
        ),
        (
            [(0, {}, "iteration 5 in x is of another run")],
            Found(
                None,
                "no newer non-persistent checkpoint is taken "
                "(rank 0: iteration 5 in x is of another run)",
            ),
        ),
    ],
)
def test_nodes_agree_on_the_newest_that_all_have(offers: list, found: Found) -> None:
    assert agreed(offers) == found
