"""Input files to chunks of records, one after the other, in bounded memory.

A chunk of lines is cut at the end of a line after about CHUNK_BYTES; only a longer line makes a
longer chunk. Lines are counted here and taken apart in `records.py`, on the worker's core.
"""

import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron.core.errors import BackendError, DataError

CHUNK_BYTES = 1 << 19
ROWS_AT_ONCE = 256
FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "rows"}
COMPRESSIONS = (".gz", ".zst")
GZIP_MAGIC = b"\x1f\x8b"

Format = Literal["json", "text", "lines", "rows"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of one file."""

    path: Path
    format: Format
    """json: lines of JSON; text: one document; lines: a document per line; rows: tuples."""

    first: int
    """Number of the first line or row, from 1."""

    content: bytes | list[tuple[Any, ...]]
    """Whole lines, the whole document, or rows."""

    num_bytes: int
    """Size of the content."""

    position: int
    """Bytes of the file, as it is on disk, that have been read up to here."""


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and globs name, in the order given, each glob sorted.

    Raises:
        DataError: A path does not exist, a glob matches nothing, or a file is of a kind that is
            not supported.
    """
    paths: list[Path] = []
    for pattern in patterns:
        there = Path(pattern).exists()
        found = [pattern] if there else sorted(glob.glob(pattern, recursive=True))
        if not found:
            glob_like = any(c in pattern for c in "*?[")
            reason = "matches no file" if glob_like else "does not exist"
            raise DataError(f"--input {pattern} {reason}")
        paths += [Path(name) for name in found]
    for path in paths:
        if path.is_dir():
            raise DataError(f"--input {path} is a folder; use {path}/*.jsonl")
        format_of(path)
        if paths.count(path) > 1:
            raise DataError(f"--input names {path} twice")
    return paths


def format_of(path: Path) -> Format:
    """Return the format that the name of a file says.

    Raises:
        DataError: It says none that is supported.
    """
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = FORMATS.get(suffixes[-2] if compressed and len(suffixes) > 1 else path.suffix)
    if kind is None or (compressed and kind == "rows"):
        raise DataError(
            f"--input {path}: unknown kind of file; known are .jsonl, .json (one record per line) "
            "and .txt, each also with .gz or .zst, and .parquet"
        )
    return kind  # type: ignore[return-value]


def read_chunks(path: Path, keys: Sequence[str], *, document_per_line: bool) -> Iterator[Chunk]:
    """Read one file.

    Args:
        path: A file of a known format.
        keys: Columns of interest of a parquet file.
        document_per_line: Take each line of a text file as a document, not the whole file.

    Raises:
        DataError: The file is empty, damaged, or lacks a column.
        BackendError: A package it needs is not installed.
    """
    kind = format_of(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is an empty file")
    if kind == "rows":
        yield from _row_chunks(path, keys)
    elif kind == "text" and not document_per_line:
        yield _whole_file(path)
    else:
        yield from _line_chunks(path, "lines" if kind == "text" else kind)


def _whole_file(path: Path) -> Chunk:
    with _opened(path) as (stream, _), _damage_named(path, 1):
        content = stream.read()
    size = path.stat().st_size
    return Chunk(
        path=path, format="text", first=1, content=content, num_bytes=len(content), position=size
    )


def _line_chunks(path: Path, kind: Format) -> Iterator[Chunk]:
    first = 1
    with _opened(path) as (stream, raw):
        while True:
            with _damage_named(path, first):
                content = stream.read(CHUNK_BYTES)
                content += stream.readline() if content and not content.endswith(b"\n") else b""
            if not content:
                return
            yield Chunk(
                path=path,
                format=kind,
                first=first,
                content=content,
                num_bytes=len(content),
                position=raw.tell(),
            )
            first += content.count(b"\n")


@contextmanager
def _damage_named(path: Path, line: int) -> Iterator[None]:
    """Say which file is damaged when unpacking fails."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, *_zstd_errors()) as error:
        raise DataError(f"{path} is damaged after line {line - 1} or cut short: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file; the second stream is the file as it is on disk, to tell how far reading is."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            _check_gzip(path, raw)
            yield gzip.GzipFile(fileobj=raw), raw  # type: ignore[misc]
        elif path.suffix == ".zst":
            reader = _zstandard(path).ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield io.BufferedReader(reader, CHUNK_BYTES), raw  # type: ignore[misc]
        else:
            yield raw, raw


def _check_gzip(path: Path, raw: IO[bytes]) -> None:
    if raw.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
        raise DataError(f"{path} is no gzip file; if it is plain text, take .gz off its name")
    raw.seek(0)


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise BackendError(
            f"{path} needs the package zstandard: pip install 'megatron-moe[zstd]', "
            "or recompress it as .gz"
        ) from error
    return zstandard


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _row_chunks(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(
            f"{path} needs the package pyarrow: pip install 'megatron-moe[parquet]', "
            "or convert it to .jsonl"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    missing = [key for key in keys if key not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {file.schema_arrow.names}")
    total, first, size = file.metadata.num_rows, 1, path.stat().st_size
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(keys)):
        rows = list(zip(*(batch.column(key).to_pylist() for key in keys), strict=True))
        yield Chunk(
            path=path,
            format="rows",
            first=first,
            content=rows,
            num_bytes=batch.nbytes,
            position=size * (first + len(rows) - 1) // total,
        )
        first += len(rows)
