import math
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.tensor_file import (
    PIECE_BYTES,
    BlockFacts,
    BlockOutline,
    DamagedBlockError,
    TensorFileWriter,
    in_file_order,
    read_block,
    verify_block,
)

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
SHAPES = ((), (0,), (3,), (2, 5), (2, 0, 3), (PIECE_BYTES // 8 + 3,))


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(math.prod(shape)).view(shape).remainder(97).to(dtype)


def write(path: Path, tensors: list[torch.Tensor]) -> list[BlockFacts]:
    outlines = [BlockOutline(str(n), t.dtype, tuple(t.shape)) for n, t in enumerate(tensors)]
    with TensorFileWriter(path, outlines) as writer:
        return [writer.add(tensor) for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = [values(shape, dtype) for dtype in DTYPES]
    facts = write(tmp_path / "file", tensors)
    with (tmp_path / "file").open("rb", buffering=0) as stream:
        for tensor, fact in zip(tensors, facts, strict=True):
            found = torch.zeros_like(tensor)
            read_block(stream, fact, found)
            verify_block(stream, fact)
            assert torch.equal(found, tensor)


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    view = torch.arange(12.0).view(3, 4)[:, 1:3]
    (fact,) = write(tmp_path / "file", [view])
    found = torch.zeros(3, 2)
    with (tmp_path / "file").open("rb") as stream:
        read_block(stream, fact, found)
    assert torch.equal(found, view)


def test_blocks_begin_at_multiples_of_their_elements(tmp_path: Path) -> None:
    tensors = [values((3,), dtype) for dtype in reversed(DTYPES)]
    outlines = [BlockOutline(str(n), t.dtype, tuple(t.shape)) for n, t in enumerate(tensors)]
    ordered = [tensors[number] for number in in_file_order(outlines)]
    for tensor, fact in zip(ordered, write(tmp_path / "file", ordered), strict=True):
        assert fact.begin % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("check", ["load", "verify"])
@pytest.mark.parametrize("damage", ["flip", "exchange", "cut"])
def test_damage_is_seen(tmp_path: Path, damage: str, check: str) -> None:
    path, tensors = tmp_path / "file", [torch.full((1000,), 1.0), torch.full((1000,), 2.0)]
    facts = write(path, tensors)
    content = bytearray(path.read_bytes())
    first, second = (slice(fact.begin, fact.begin + fact.nbytes) for fact in facts)
    if damage == "flip":
        content[facts[0].begin + 3001] ^= 1
    elif damage == "exchange":
        content[first], content[second] = content[second], content[first]
    else:
        del content[-1:]
    path.write_bytes(content)
    bad = facts[1 if damage == "cut" else 0]
    look = verify_block if check == "verify" else partial(read_block, target=torch.zeros(1000))
    with path.open("rb") as stream, pytest.raises(DamagedBlockError):
        look(stream, bad)


def test_the_second_half_of_the_hash_sees_what_the_first_may_miss(tmp_path: Path) -> None:
    (fact,) = write(tmp_path / "file", [torch.ones(7)])
    wrong = BlockFacts(fact.begin, fact.nbytes, fact.crc32, fact.xor64 ^ 1)
    assert wrong.hash != fact.hash
    with (tmp_path / "file").open("rb") as stream, pytest.raises(DamagedBlockError, match="hash"):
        verify_block(stream, wrong)


def test_equal_bytes_have_equal_hashes_and_order_counts(tmp_path: Path) -> None:
    a, b = torch.arange(64.0), torch.arange(64.0).flip(0)
    hashes = [fact.hash for fact in write(tmp_path / "file", [a, b, a.clone()])]
    assert hashes[0] == hashes[2] != hashes[1]
    assert all(len(text) == 24 for text in hashes)


def test_a_file_that_was_not_finished_is_an_error_at_once(tmp_path: Path) -> None:
    outlines = [BlockOutline(name, torch.float32, (2,)) for name in "ab"]
    with (
        pytest.raises(AssertionError, match="blocks are missing"),
        TensorFileWriter(tmp_path / "file", outlines) as writer,
    ):
        writer.add(torch.ones(2))
