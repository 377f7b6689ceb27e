import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.index import INDEX, read_index, write_index
from megatron.core.dist_checkpointing.serialization import (
    read_tensors,
    stored_tensors,
    tensor_file_name,
    write_tensors,
)
from megatron.core.errors import CheckpointError
from tests.helpers.ranks import run_ranks


def test_a_view_of_a_large_buffer_is_stored_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.zeros(1_000_000)[:10]}, None)
    assert (tmp_path / "tensors_00000.safetensors").stat().st_size < 10_000


def test_a_file_that_is_not_what_a_rank_wrote_is_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    write = serialization._write_blocks

    def cut_by_another_run(path: Path, *rest: Any) -> Any:
        written = write(path, *rest)
        path.write_bytes(path.read_bytes()[:-1])
        return written

    monkeypatch.setattr(serialization, "_write_blocks", cut_by_another_run)
    with pytest.raises(
        CheckpointError, match=r"bytes, and \d+ were written: does another run save"
    ):
        write_tensors(tmp_path, {"model.a": torch.ones(3)}, None)
    assert not (tmp_path / INDEX).exists()


def test_nothing_is_written_into_tensors_that_do_not_fit(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.ones(3), "model.b": torch.ones(3)}, None)
    wanted = {"model.a": torch.zeros(3), "model.b": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"model.b is float32 \[3\] on disk"):
        read_tensors(tmp_path, wanted, None, prefixes=("model.",))
    assert wanted["model.a"].eq(0).all()


def test_other_prefixes_are_left_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.ones(3), "optimizer.a": torch.ones(3)}, None)
    wanted = {"model.a": torch.zeros(3)}
    read_tensors(tmp_path, wanted, None, prefixes=("model.",))
    assert wanted["model.a"].eq(1).all()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"[1]",
        b"\x80\x04\x95",
        b'{"model.a": {}}',
        b'{"model.a": {"dtype": "F33", "shape": [1], "blocks": []}}',
        b'{"model.a": {"dtype": "F32", "shape": [Infinity], "blocks": []}}',
        b'{"model.a": {"dtype": "F32", "shape": [1], "blocks": [{"offset": [0, 0], "shape": [1], '
        b'"file": "a", "begin": 0, "bytes": 4, "crc32": 0, "xor64": 0}]}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged"):
        stored_tensors(tmp_path)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{INDEX} is missing"):
        stored_tensors(tmp_path)


def test_a_block_that_the_index_does_not_cover_is_never_left_as_it_was(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.ones(4, 3)}, None)
    index = read_index(tmp_path)
    block = index["model.a"].blocks[0]
    half = replace(block, shape=(2, 3), facts=replace(block.facts, nbytes=24))
    write_index(tmp_path, {"model.a": replace(index["model.a"], blocks=(half,))})
    with pytest.raises(CheckpointError, match=r"does not cover model\.a"):
        read_tensors(tmp_path, {"model.a": torch.zeros(4, 3)}, None, prefixes=("model.",))


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    """The format in words: length of the header, header, bytes."""
    write_tensors(tmp_path, {"model.a": torch.arange(6, dtype=torch.int16).view(2, 3)}, None)
    content = (tmp_path / tensor_file_name(0)).read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])["model.a"]
    begin, end = entry["data_offsets"]
    assert (entry["dtype"], entry["shape"]) == ("I16", [2, 3])
    data = content[8 + length :][begin:end]
    assert [int.from_bytes(data[at : at + 2], "little") for at in range(0, 12, 2)] == [*range(6)]


@pytest.mark.parametrize("flipped", [0, 4_000_003, -1])
def test_one_flipped_bit_is_found_and_the_tensor_named(tmp_path: Path, flipped: int) -> None:
    names = [f"model.layers.2.mlp.experts.local_experts.{number}.fc" for number in range(3)]
    write_tensors(tmp_path, {name: torch.rand(1_000_001) for name in names}, None)
    facts = read_index(tmp_path)[names[1]].blocks[0].facts
    place = facts.begin + flipped % facts.nbytes
    with (tmp_path / tensor_file_name(0)).open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 16]))
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path, {n: torch.empty(1_000_001) for n in names}, None, prefixes=("m",))
    assert str(caught.value).count("local_experts") == 1
    assert names[1] in str(caught.value)


def _write_shared_and_own(folder: str) -> None:
    rank = dist.get_rank()
    tensors = {f"model.dense{i}": torch.zeros(50_000) for i in range(16)}
    tensors[f"model.expert{rank}"] = torch.zeros(100_000)
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def test_shared_tensors_are_stored_once_and_spread_evenly(tmp_path: Path) -> None:
    run_ranks(_write_shared_and_own, 2, str(tmp_path))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    unique = 4 * (16 * 50_000 + 2 * 100_000)
    assert len(sizes) == 2
    assert unique < sum(sizes) < 1.05 * unique
    assert max(sizes) < 1.2 * min(sizes)


def _want_something_else(folder: str) -> None:
    wanted = {f"model.expert{dist.get_rank() + 1}": torch.zeros(100_000)}
    with pytest.raises(CheckpointError) as caught:
        read_tensors(Path(folder), wanted, dist.group.WORLD, prefixes=("model.expert",))
    messages = gather(str(caught.value), dist.group.WORLD)
    assert messages[0] == messages[1]
    assert "missing in the checkpoint:\n  - model.expert2" in messages[0]
    assert "no rank of this run wants them:\n  - model.expert0" in messages[0]


def test_all_ranks_raise_the_same_when_keys_of_one_rank_are_missing(tmp_path: Path) -> None:
    run_ranks(_write_shared_and_own, 2, str(tmp_path))
    run_ranks(_want_something_else, 2, str(tmp_path))


def _write_own(folder: str) -> None:
    rank = dist.get_rank()
    write_tensors(Path(folder), {f"model.a{rank}": torch.ones(3)}, dist.group.WORLD)


def test_files_are_opened_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may open a thousand files; a checkpoint of a large run has more."""
    run_ranks(_write_own, 4, str(tmp_path))
    opened: list = []
    right = serialization.open_ranges

    def watched(*args):
        assert all(stream.closed for stream in opened)
        opened.append(right(*args))
        return opened[-1]

    monkeypatch.setattr(serialization, "open_ranges", watched)
    wanted = {f"model.a{rank}": torch.zeros(3) for rank in range(4)}
    read_tensors(tmp_path, wanted, None, prefixes=("model.",))
    assert len(opened) == 4
    assert all(tensor.eq(1).all() for tensor in wanted.values())
