from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.offline import (
    OfflineWriter,
    StoredCheckpoint,
    shared_out,
    verify_checkpoint,
)
from megatron.core.dist_checkpointing.save_plan import PlannedBlock
from megatron.core.errors import CheckpointError

TENSORS = {
    "model.small": torch.arange(3, dtype=torch.uint8),
    "model.wide": torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "model.wider": torch.randn(5, 7, dtype=torch.float64),
    "model.scalar": torch.tensor(2.5),
}
FACTS = {key: TensorFacts(tuple(t.shape), t.dtype) for key, t in TENSORS.items()}


def halves(key: str, at: int = 2) -> list[list[PlannedBlock]]:
    """Cut the columns of a tensor in two, a file for each."""
    facts = FACTS[key]
    rows, columns = facts.shape
    return [
        [PlannedBlock(key, facts, (0, at), (rows, columns - at))],
        [PlannedBlock(key, facts, (0, 0), (rows, at))],
    ]


def write(folder: Path, files: list[list[PlannedBlock]], iteration: int = 5) -> StoredCheckpoint:
    with OfflineWriter(folder, iteration, files) as writer:
        for key in writer.order:
            writer.add(key, TENSORS[key])
        writer.finish({"iteration": iteration}, {})
    return StoredCheckpoint.open(folder)


@pytest.mark.parametrize("num_files", [1, 2, 9])
def test_what_was_written_is_read(tmp_path: Path, num_files: int) -> None:
    stored = write(tmp_path, shared_out(FACTS, num_files))
    assert stored.common["iteration"] == 5
    assert sorted(stored.keys) == sorted(TENSORS)
    assert all(torch.equal(stored.read(key), tensor) for key, tensor in TENSORS.items())
    assert stored.verify() == []
    files = {block.file for tensor in stored.index.values() for block in tensor.blocks}
    assert len(files) == min(num_files, len(TENSORS))
    assert (tmp_path / folders.TRACKER).read_text() == "5"


def test_a_tensor_in_blocks_is_read_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", shared_out({"model.wide": FACTS["model.wide"]}, 1))
    cut = write(tmp_path / "cut", halves("model.wide"))
    again = write(tmp_path / "again", halves("model.wide"))
    assert len(cut.index["model.wide"].blocks) == 2
    assert torch.equal(cut.read("model.wide"), TENSORS["model.wide"])
    assert cut.block_hashes("model.wide") == again.block_hashes("model.wide")
    assert cut.block_hashes("model.wide").keys() != whole.block_hashes("model.wide").keys()


def test_files_have_about_equal_size() -> None:
    facts = {f"model.{n}": TensorFacts((n + 1, 8), torch.float32) for n in range(20)}
    files = shared_out(facts, 4)
    sizes = [sum(block.whole.nbytes for block in file) for file in files]
    assert sum(map(len, files)) == 20
    assert max(sizes) - min(sizes) <= 96, "three rows of the smallest"


def test_damage_is_named_by_tensor_and_block(tmp_path: Path) -> None:
    stored = write(
        tmp_path, [*halves("model.wider"), *shared_out({"model.wide": FACTS["model.wide"]}, 1)]
    )
    block = stored.index["model.wider"].blocks[1]
    path = stored.path / block.file
    data = bytearray(path.read_bytes())
    data[block.facts.begin + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"model\.wider \(in {block.file}\) is not what"):
        stored.read("model.wider")
    assert torch.equal(stored.read("model.wide"), TENSORS["model.wide"])
    found, problems = verify_checkpoint(tmp_path)
    assert found == stored.path
    place = f"{list(block.offset)} on (in {block.file})"
    assert problems == [f"model.wider from {place} is not what was written (hash)"]


def test_a_missing_and_a_short_file_are_told_with_their_tensors(tmp_path: Path) -> None:
    stored = write(tmp_path, shared_out(FACTS, 4))
    files = {key: stored.path / tensor.blocks[0].file for key, tensor in stored.index.items()}
    files["model.wide"].unlink()
    with files["model.wider"].open("r+b") as stream:
        stream.truncate(100)
    problems = "\n".join(verify_checkpoint(tmp_path, 5)[1])
    assert f"model.wide (in {files['model.wide'].name}) cannot be read" in problems
    assert f"model.wider (in {files['model.wider'].name}) is cut off" in problems
    assert "model.small (" not in problems
    with pytest.raises(CheckpointError, match="is missing"):
        StoredCheckpoint.open(tmp_path)


def test_a_damaged_small_file_is_told(tmp_path: Path) -> None:
    stored = write(tmp_path, shared_out(FACTS, 1))
    (stored.path / "common.json").write_text("{}")
    assert any("common.json" in line for line in verify_checkpoint(tmp_path)[1])
    (stored.path / "index.json").write_text("{")
    assert any("index.json" in line for line in verify_checkpoint(tmp_path)[1])


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, shared_out(FACTS, 1))

    def fail() -> None:
        with OfflineWriter(tmp_path, 6, shared_out(FACTS, 2)) as writer:
            writer.add(writer.order[0], TENSORS[writer.order[0]])
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert folders.complete_iterations(tmp_path) == [5]
    assert not list(tmp_path.glob(".iter*"))
    assert StoredCheckpoint.open(tmp_path).verify() == []


def test_tensors_out_of_order_and_other_tensors_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="not next"),
        OfflineWriter(tmp_path, 6, shared_out(FACTS, 1)) as writer,
    ):
        writer.add(writer.order[1], TENSORS[writer.order[1]])
    with pytest.raises(AssertionError, match="do not hold all"):
        OfflineWriter(tmp_path, 6, halves("model.wide")[:1])


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    for work in (StoredCheckpoint.open, verify_checkpoint):
        with pytest.raises(CheckpointError, match=f"{tmp_path} holds no checkpoint"):
            work(tmp_path)


def test_one_checkpoint_of_a_folder_can_be_named(tmp_path: Path) -> None:
    for iteration in (5, 6):
        write(tmp_path, shared_out(FACTS, 1), iteration)
    assert StoredCheckpoint.open(tmp_path / "iter_0000005").common["iteration"] == 5
    assert StoredCheckpoint.open(tmp_path, 5).common["iteration"] == 5
    assert StoredCheckpoint.open(tmp_path).common["iteration"] == 6
