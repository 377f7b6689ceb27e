"""Folders and files of an object store, through fsspec: as much of pathlib as checkpoints need.

An object appears whole when its stream is closed. There is no rename and nothing to flush, and a
folder is what the names of objects begin with. Whatever a driver raises becomes an OSError that
names the URL. The package fsspec is imported when it is used, never with this file.
"""

import errno
import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

from megatron.core.extensions.range_requests import RangeStream, Request, requests_for

EXTRA = "pip install 'megatron-moe[object-store]'"
_IN_EXTRA = ("fsspec", "gcsfs", "s3fs")


class ObjectStat(NamedTuple):
    """What ``Path.stat`` is asked for."""

    st_size: int
    """In bytes."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A place in an object store; methods of pathlib's names mean what they mean there.

    Plain data: a process that was forked, or got it from another rank, connects by itself.
    """

    url: str

    def __post_init__(self) -> None:
        """Write equal places alike."""
        scheme, rest = self.url.split("://", 1)
        root = "/" if rest.startswith("/") else ""
        names = "/".join(name for name in rest.split("/") if name)
        object.__setattr__(self, "url", f"{scheme.lower()}://{root}{names}")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(f"{self.url}/{name}")

    @property
    def scheme(self) -> str:
        """Of the URL: ``s3``."""
        return self.url.split("://", 1)[0]

    @property
    def name(self) -> str:
        """Last component; empty for the store itself."""
        return self._below.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """End of the name, from its last dot."""
        _, dot, end = self.name.rpartition(".")
        return dot + end if dot else ""

    @property
    def parent(self) -> "ObjectPath":
        """The place above."""
        return ObjectPath(f"{self.scheme}://{self._below.rpartition('/')[0]}")

    def resolve(self) -> "ObjectPath":
        """Return the place itself: a store has no links."""
        return self

    def is_file(self) -> bool:
        """Return whether an object has this name."""
        return self._looked_up().get("type") == "file"

    def is_dir(self) -> bool:
        """Return whether any object lies below this name."""
        return any(True for _ in self.iterdir())

    def stat(self) -> ObjectStat:
        """Return the size of the object.

        Raises:
            OSError: There is none.
        """
        found = self._looked_up()
        if found.get("type") != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object", self.url)
        return ObjectStat(int(found["size"]))

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Yield what lies directly below; nothing where nothing does."""
        with self._store() as (store, path):
            store.invalidate_cache()
            try:
                found = store.ls(path, detail=False)
            except FileNotFoundError:
                found = []
        names = {str(entry).rstrip("/") for entry in found} - {path.rstrip("/")}
        yield from (self / name.rpartition("/")[2] for name in sorted(names))

    def sizes(self) -> dict[str, int]:
        """Return relative name -> bytes of every object below, however deep."""
        with self._store() as (store, path):
            store.invalidate_cache()
            found = store.find(path, detail=True)
        start = len(path.rstrip("/")) + 1
        return {
            name[start:]: int(facts["size"])
            for name, facts in found.items()
            if facts["type"] == "file" and name[start:]
        }

    def read_bytes(self) -> bytes:
        """Return the content of the object."""
        with self._store() as (store, path):
            return bytes(store.cat_file(path))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the content of the object as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> None:
        """Make or replace the object; readers see the old content or the new, never a part."""
        with self._store() as (store, path):
            store.pipe_file(path, data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Make or replace the object; readers see the old content or the new, never a part."""
        self.write_bytes(text.encode(encoding))

    @overload
    def open(self, mode: Literal["rb"], buffering: int = -1) -> RangeStream: ...
    @overload
    def open(self, mode: Literal["wb"], buffering: int = -1) -> io.RawIOBase: ...
    def open(self, mode: Literal["rb", "wb"], buffering: int = -1) -> io.RawIOBase:
        """Open the object: ``rb`` reads it in large requests, ``wb`` uploads it in parts.

        Args:
            mode: One of these two.
            buffering: For pathlib's sake; drivers choose the size of their parts.
        """
        if mode == "rb":
            return self.open_ranges([(0, self.stat().st_size)])
        with self._store() as (store, path):
            return _Upload(self, store.open(path, "wb"))

    def open_ranges(self, ranges: list[tuple[int, int]]) -> RangeStream:
        """Open the object to read these ranges of bytes (begin, end), and no others."""
        return RangeStream(requests_for(ranges), self._fetch)

    def unlink(self) -> None:
        """Delete the object."""
        with self._store() as (store, path):
            store.rm_file(path)

    def remove_all(self) -> None:
        """Delete every object below, if there is any."""
        if self.is_dir():
            with self._store() as (store, path):
                store.rm(path, recursive=True)

    @property
    def _below(self) -> str:
        return self.url.split("://", 1)[1]

    def _looked_up(self) -> dict[str, Any]:
        # not the drivers' isfile(): it says no where it was not allowed to look
        with self._store() as (store, path):
            store.invalidate_cache()
            try:
                return dict(store.info(path))
            except FileNotFoundError:
                return {}

    def _fetch(self, requests: list[Request]) -> list[bytes]:
        with self._store() as (store, path):
            begins, ends = [r.begin for r in requests], [r.end for r in requests]
            pieces = store.cat_ranges([path] * len(requests), begins, ends)
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
            return [bytes(piece) for piece in pieces]

    @contextmanager
    def _store(self) -> Iterator[tuple[Any, str]]:
        """Give the driver, and this place in its words; what it raises becomes an OSError."""
        with errors_of(self.url):
            # looked up each time: fsspec keeps one driver a process, none survives a fork
            yield importlib.import_module("fsspec.core").url_to_fs(self.url)


@contextmanager
def errors_of(url: str) -> Iterator[None]:
    """Turn what a driver raises, which may be of any class, into an OSError that names ``url``."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else known or errno.EIO
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OSError(number, text or type(error).__name__, url) from error


def problem_of(path: ObjectPath) -> str:
    """Say what keeps this process from looking into ``path``, to complete a sentence; or ''."""
    if "::" in path.url:
        return "is a chain of stores, which is not offered"
    if not path.name:
        return "names no bucket"
    if problem := _missing_driver(path.scheme):
        return problem
    try:
        path.is_dir()
    except OSError as error:
        return f"cannot be reached: {error.strerror}"
    return ""


def _missing_driver(scheme: str) -> str:
    if importlib.util.find_spec("fsspec") is None:
        return f"needs the package fsspec: {EXTRA}"
    registry = importlib.import_module("fsspec.registry")
    try:
        registry.get_filesystem_class(scheme)
    except ValueError:
        return f"is of no kind that fsspec knows ({scheme}://)"
    except ImportError as error:
        package = registry.known_implementations[scheme]["class"].split(".")[0]
        how = f"the package {package}: {EXTRA}" if package in _IN_EXTRA else f"a package: {error}"
        return f"needs {how}"
    return ""


class _Upload(io.RawIOBase):
    """An object on its way up. It appears when the stream is closed, unless a write failed."""

    def __init__(self, path: ObjectPath, file: Any) -> None:
        super().__init__()
        self._path, self._file = path, file
        self._failed = False

    def writable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def write(self, data: Any) -> int:
        """See io.RawIOBase; all is taken."""
        self._guard(lambda: self._file.write(data))
        return len(data)

    def close(self) -> None:
        """Let the object appear.

        Raises:
            OSError: The store did not take all of it.
        """
        if self.closed:
            return
        try:
            if not self._failed:
                self._guard(self._file.close)
        finally:
            super().close()

    def _guard(self, step: Callable[[], object]) -> None:
        try:
            with errors_of(self._path.url):
                step()
        except OSError:
            self._failed = True
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Make the driver forget the parts that it sent; the error that led here is told."""
        self._file.closed = True  # or it is completed when it is collected
        try:
            with errors_of(self._path.url):
                self._file.discard()
        except OSError:
            return  # parts that were sent wait for the bucket's own rule of clearing them
