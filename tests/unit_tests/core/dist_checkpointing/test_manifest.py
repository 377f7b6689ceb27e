from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.folders import MANIFEST
from megatron.core.dist_checkpointing.index import INDEX
from megatron.core.dist_checkpointing.manifest import verify_manifest, write_manifest
from megatron.core.dist_checkpointing.serialization import tensor_file_name, write_tensors
from megatron.core.errors import CheckpointError

WEIGHTS = [f"model.layers.1.mlp.experts.local_experts.{number}.fc" for number in range(9)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tensors(tmp_path, {name: torch.ones(4) for name in WEIGHTS}, None)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "t.model").write_bytes(b"words")
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert write_manifest(tmp_path) == sum(sizes)
    return tmp_path


def test_a_whole_checkpoint_passes(folder: Path) -> None:
    verify_manifest(folder)


def test_a_missing_file_of_tensors_is_named_with_some_that_it_held(folder: Path) -> None:
    (folder / tensor_file_name(0)).unlink()
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(folder)
    text = f"{tensor_file_name(0)} is missing; it holds 9 tensors: {WEIGHTS[0]}"
    assert text in str(caught.value)


def test_a_truncated_file_of_tensors_is_named(folder: Path) -> None:
    path = folder / tensor_file_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"bytes instead of .*local_experts\.0"):
        verify_manifest(folder)


def test_a_changed_byte_in_a_document_is_found_and_the_file_named(folder: Path) -> None:
    (folder / "tokenizer" / "t.model").write_bytes(b"wards")
    with pytest.raises(CheckpointError, match=r"t\.model is not what was written"):
        verify_manifest(folder)


def test_all_damaged_files_are_named_at_once(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "tokenizer" / "t.model").write_bytes(b"word")
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(folder)
    assert f"{INDEX} is missing" in str(caught.value)
    assert "tokenizer/t.model has 4 bytes instead of 5" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": 1}}', '{"files": {"a": {}}}'])
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
        verify_manifest(folder)


def test_a_missing_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is missing"):
        verify_manifest(folder)
