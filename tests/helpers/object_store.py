"""An object store of tests, ``teststore://FOLDER/...``: the least that real ones promise.

An object is one file of a flat folder on this machine, and appears whole, when its stream is
closed. There are no folders, no renames and no copies. What is asked of it can be counted, and
writing can be made to fail.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

SCHEME = "teststore"
BUCKET = "_bucket_"
"""Of a URL: what comes before is a folder of this machine, which must be there."""


class Forbidden(Exception):
    """Not an OSError: drivers raise what their clients raise."""


class ObjectStore(AbstractFileSystem):
    protocol = SCHEME
    cachable = True
    fails: Callable[[str], bool] = staticmethod(lambda path: False)
    """Whether an upload to a path fails."""
    asked: list[tuple[str, int, int]] = []
    """Path and range of every read."""
    uploads: list[tuple[str, int]] = []
    """Path and bytes of every part that was uploaded."""

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix(f"{SCHEME}://").rstrip("/")

    def _home(self, path: str) -> Path:
        folder, _, _ = path.partition(f"/{BUCKET}")
        found = Path(folder) / BUCKET
        if not found.is_dir():
            raise FileNotFoundError("The specified bucket does not exist")
        return found

    def _file(self, path: str) -> Path:
        home = self._home(path)
        return home / quote(path.removeprefix(f"{home}/"), safe="")

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        home = self._home(path)
        found = {}
        for entry in os.scandir(home):
            name = f"{home}/{unquote(entry.name)}"
            if entry.name.startswith("."):
                continue
            if name == path or name.rpartition("/")[0] == path:
                size = entry.stat().st_size
                found[name] = {"name": name, "size": size, "type": "file"}
            elif name.startswith(f"{path}/"):
                below = f"{path}/{name.removeprefix(f'{path}/').partition('/')[0]}"
                found[below] = {"name": below, "size": 0, "type": "directory"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        assert mode == "wb", "objects are read by ranges"
        return _Upload(self, path, mode, block_size=1 << 20)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        with self._open(self._strip_protocol(path), "wb") as upload:
            try:
                upload.write(value)
                upload.flush(force=True)
            except Forbidden:
                upload.closed = True
                upload.discard()
                raise

    def cat_file(self, path, start=None, end=None, **kwargs):
        path = self._strip_protocol(path)
        with self._file(path).open("rb") as stream:
            stream.seek(start or 0)
            data = stream.read() if end is None else stream.read(end - (start or 0))
        self.asked.append((path.rpartition("/")[2], start or 0, len(data)))
        return data

    def _rm(self, path):
        self._file(self._strip_protocol(path)).unlink(missing_ok=True)

    def mv(self, *args, **kwargs):
        raise NotImplementedError("an object store has no rename")

    rename = move = cp_file = copy = mv


class _Upload(AbstractBufferedFile):
    def _initiate_upload(self):
        target = self.fs._file(self.path)
        self._parts = target.with_name(f".{os.getpid()}.{threading.get_ident()}.{target.name}")
        self._parts.write_bytes(b"")

    def _upload_chunk(self, final=False):
        if self.fs.fails(self.path):
            raise Forbidden("no more room in this bucket")
        data = self.buffer.getvalue()
        self.fs.uploads.append((self.path.rpartition("/")[2], len(data)))
        with self._parts.open("ab") as stream:
            stream.write(data)
        if final:
            self._parts.replace(self.fs._file(self.path))  # now it is there

    def discard(self):
        self._parts.unlink(missing_ok=True)


def make_store(folder: Path) -> str:
    """Make an empty bucket below ``folder``; return the URL of a run in it."""
    (folder / BUCKET).mkdir(parents=True)
    fsspec.register_implementation(SCHEME, ObjectStore, clobber=True)
    return f"{SCHEME}://{folder}/{BUCKET}/run"


def objects(url: str) -> list[str]:
    """List the names of all objects below ``url``."""
    folder, prefix = _folder(url)
    found = [unquote(entry) for entry in os.listdir(folder) if not entry.startswith(".")]
    return sorted(name.removeprefix(f"{prefix}/") for name in found)


def unfinished(url: str) -> list[str]:
    """List uploads that were neither ended nor given up; a real store does not show them."""
    return [entry for entry in os.listdir(_folder(url)[0]) if entry.startswith(".")]


def _folder(url: str) -> tuple[str, str]:
    folder, _, prefix = ObjectStore._strip_protocol(url).partition(f"/{BUCKET}/")
    return f"{folder}/{BUCKET}", prefix
