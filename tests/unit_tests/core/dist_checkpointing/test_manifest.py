from pathlib import Path

import pytest

from megatron.core.dist_checkpointing.folders import MANIFEST
from megatron.core.dist_checkpointing.manifest import verify_manifest, write_manifest
from megatron.core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "__0_0.distcp").write_bytes(b"weights of rank 0")
    (tmp_path / "__1_0.distcp").write_bytes(b"weights of rank 1")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "t.model").write_bytes(b"words")
    assert write_manifest(tmp_path, None) == 39
    return tmp_path


def test_a_whole_checkpoint_passes(folder: Path) -> None:
    verify_manifest(folder, None)


def test_a_changed_byte_is_found_and_the_file_named(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes(b"weights of rank 2")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is not what was written"):
        verify_manifest(folder, None)


def test_all_damaged_files_are_named_at_once(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    (folder / "tokenizer" / "t.model").write_bytes(b"word")
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(folder, None)
    assert "__0_0.distcp is missing" in str(caught.value)
    assert "tokenizer/t.model has 4 bytes instead of 5" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": 1}}', '{"files": {"a": {}}}'])
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
        verify_manifest(folder, None)


def test_a_missing_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is missing"):
        verify_manifest(folder, None)
