"""Blocks of tensors in one file and back, checked byte by byte: a plain safetensors file.

Any reader of safetensors opens it. The bytes go straight from a tensor's memory to the file and
from the file into a tensor's memory; on the way each block gets a CRC-32, which loading compares,
and the exclusive or of its words. The two are the hash by which tools compare checkpoints: 96 bits,
at a sixth of the price of SHA-256, which would double the time of a save. It is no seal: who may
write the files may write the index. Nothing in a file is code.

Format: https://huggingface.co/docs/safetensors (8 bytes with the length of a JSON header, the
header, then the blocks one behind the other).
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron.core.dist_checkpointing.folders import Place

PIECE_BYTES = 1 << 20
"""Read, checked and written at a time: still in the cache for the second look at it."""
_ALIGNMENT = 64
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class BlockOutline(NamedTuple):
    """What a header says about a block before its bytes are there."""

    name: str
    """Unique in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BlockFacts:
    """Where a block lies in its file, and what its bytes must be."""

    begin: int
    """First byte, from the start of the file."""
    nbytes: int
    crc32: int
    xor64: int
    """Exclusive or of the little-endian words of 8 bytes, the last one filled up with zeros."""

    @property
    def hash(self) -> str:
        """Both, in hexadecimal; equal for equal bytes, and as good as only then."""
        return f"{self.crc32:08x}{self.xor64:016x}"


def dtype_code(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` in safetensors, such as ``BF16``."""
    assert dtype in _CODES, f"{dtype} has no place in a checkpoint"
    return _CODES[dtype]


def dtype_of(code: str) -> torch.dtype:
    """Return the dtype that ``dtype_code`` names.

    Raises:
        ValueError: No dtype has this name.
    """
    if code not in _DTYPES:
        raise ValueError(f"{code!r} is no dtype of a checkpoint")
    return _DTYPES[code]


class TensorFileWriter:
    """Writes one file, block after block, in the order of its outline. A context.

    The file is flushed to the disk when the context ends without an error.
    """

    def __init__(self, path: Place, outlines: Iterable[BlockOutline]) -> None:
        self._path = path
        self._outlines = tuple(outlines)
        self._header = _header(self._outlines)
        self._next = 0
        self._at = len(self._header)
        self._stream: BinaryIO | RawIOBase | None = None

    def __enter__(self) -> "TensorFileWriter":
        self._stream = self._path.open("wb", buffering=PIECE_BYTES // 4)
        self._stream.write(self._header)
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        stream, self._stream = self._stream, None
        assert stream is not None, "left twice"
        try:
            if kind is None:
                assert self._next == len(self._outlines), f"{self._path}: blocks are missing"
                flush(stream)
        finally:
            stream.close()

    def add(self, tensor: Tensor) -> BlockFacts:
        """Write the next block; on a GPU it is copied to the CPU first."""
        assert self._stream is not None, "add() belongs into the context"
        outline = self._outlines[self._next]
        assert (tensor.dtype, tuple(tensor.shape)) == outline[1:], f"not the block {outline}"
        data = bytes_of(tensor.detach().cpu().contiguous())
        crc = xor = 0
        for piece in _pieces(data):
            crc, xor = zlib.crc32(piece, crc), xor ^ _xor64(piece)
            self._stream.write(piece)
        facts = BlockFacts(self._at, len(data), crc, xor)
        self._next, self._at = self._next + 1, self._at + len(data)
        return facts


class DamagedBlockError(Exception):
    """The bytes of a block are not those that were written, or not all there."""


def read_block(stream: BinaryIO | RawIOBase, facts: BlockFacts, target: Tensor) -> None:
    """Read one block into ``target``: contiguous, on the CPU, of as many bytes.

    Raises:
        DamagedBlockError: The file ends too early, or the CRC-32 differs; ``target`` is
            garbage then.
        OSError: The file cannot be read.
    """
    data = bytes_of(target)
    assert len(data) == facts.nbytes, f"{len(data)} bytes for a block of {facts.nbytes}"
    stream.seek(facts.begin)
    crc = 0
    for piece in _pieces(data):
        _fill(stream, piece)
        crc = zlib.crc32(piece, crc)
    if crc != facts.crc32:
        raise DamagedBlockError("is not what was written (CRC-32)")


def verify_block(stream: BinaryIO | RawIOBase, facts: BlockFacts) -> None:
    """Compare a block as it lies in the file with its whole hash.

    Raises:
        DamagedBlockError: The file ends too early, or the hash differs.
    """
    stream.seek(facts.begin)
    crc, xor, buffer = 0, 0, memoryview(bytearray(PIECE_BYTES))
    for start in range(0, facts.nbytes, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, facts.nbytes - start)]
        _fill(stream, piece)
        crc, xor = zlib.crc32(piece, crc), xor ^ _xor64(piece)
    if (crc, xor) != (facts.crc32, facts.xor64):
        raise DamagedBlockError("is not what was written (hash)")


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor; writing to it writes the tensor."""
    array = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]


def flush(stream: BinaryIO | RawIOBase) -> None:
    """Write what ``stream`` holds to the disk, where it has one (an object store has none)."""
    stream.flush()
    try:
        number = stream.fileno()
    except OSError:
        return
    os.fsync(number)


def in_file_order(outlines: Sequence[BlockOutline]) -> list[int]:
    """Return the order in which every block begins at a multiple of its element size."""
    return sorted(range(len(outlines)), key=lambda number: -outlines[number].dtype.itemsize)


def _header(outlines: Iterable[BlockOutline]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for outline in outlines:
        assert outline.name not in entries, f"two blocks are named {outline.name}"
        entries[outline.name] = {
            "dtype": dtype_code(outline.dtype),
            "shape": list(outline.shape),
            "data_offsets": [at, at + outline.nbytes],
        }
        at += outline.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _pieces(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def _xor64(piece: memoryview) -> int:
    whole = len(piece) // 8 * 8
    words = np.frombuffer(piece[:whole], dtype="<u8")
    return int(np.bitwise_xor.reduce(words)) ^ int.from_bytes(piece[whole:], "little")


def _fill(stream: BinaryIO | RawIOBase, piece: memoryview) -> None:
    done = 0
    readinto: Callable[[memoryview], int | None] = stream.readinto  # type: ignore[union-attr]
    while done < len(piece):
        count = readinto(piece[done:])
        if not count:
            raise DamagedBlockError("is cut off: the file ends too early")
        done += count
