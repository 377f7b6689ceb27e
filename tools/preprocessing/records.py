"""One chunk to its texts: what a good record is, and what is said of a bad one. Pure."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tools.preprocessing.sources import Chunk

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadRecord(Exception):  # noqa: N818 - a finding, which may be skipped, rather than an error
    """A record without usable text.

    Attributes:
        kind: The same few words for all records of this kind, to count them.
        detail: More about this one, or "".
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class Record(NamedTuple):
    """A record and where it is."""

    where: str  # file:line, for messages
    texts: tuple[str, ...] | BadRecord  # one per key


def records_of(chunk: Chunk, keys: Sequence[str]) -> Iterator[Record]:
    """Yield every record of a chunk, good or bad.

    A record is bad if it is a blank line, not JSON or not UTF-8, or if the text of a key is
    missing, null, not a string, empty, or holds half of a surrogate pair. Lines may end in LF or
    CRLF, and a file may start with a byte order mark.
    """
    if chunk.format == "text":
        yield Record(str(chunk.path), _texts_or_problem(chunk.format, chunk.content, keys))
        return
    for number, item in enumerate(_items(chunk), start=chunk.first):
        yield Record(f"{chunk.path}:{number}", _texts_or_problem(chunk.format, item, keys))


def _items(chunk: Chunk) -> Sequence[Any]:
    if not isinstance(chunk.content, bytes):
        return chunk.content
    content = chunk.content
    if chunk.first == 1:
        content = content.removeprefix(BYTE_ORDER_MARK)
    lines = content.split(b"\n")
    if not lines[-1]:  # after the last end of line
        lines.pop()
    return lines


def _texts_or_problem(kind: str, item: Any, keys: Sequence[str]) -> tuple[str, ...] | BadRecord:
    try:
        values = _values(kind, item, keys)
        return tuple(_checked(key, value) for key, value in zip(keys, values, strict=True))
    except BadRecord as problem:
        return problem


def _values(kind: str, item: Any, keys: Sequence[str]) -> Sequence[Any]:
    if kind == "rows":
        return item
    if kind == "text":
        return [_decoded(item.removeprefix(BYTE_ORDER_MARK))]
    if not item.strip():
        raise BadRecord("blank line")
    line = _decoded(item)
    if kind == "lines":
        return [line.removesuffix("\r")]
    return _json_values(line, keys)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            "not UTF-8", f"byte 0x{content[error.start]:02x} at offset {error.start}"
        ) from error


def _json_values(line: str, keys: Sequence[str]) -> list[Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord("not JSON", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadRecord("not JSON", "nested too deeply") from error
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", f"found {type(record).__name__}, need one per line")
    for key in keys:
        if key not in record:
            raise BadRecord("missing key", f"no {key!r} among {sorted(record)[:8]}")
    return [record[key] for key in keys]


def _checked(key: str, value: Any) -> str:
    if value is None:
        raise BadRecord("null text", repr(key))
    if not isinstance(value, str):
        raise BadRecord("text is not a string", f"{key!r} is {type(value).__name__}")
    if not value:
        raise BadRecord("empty text", repr(key))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord("half a surrogate pair", f"in {key!r} at {error.start}") from error
    return value
