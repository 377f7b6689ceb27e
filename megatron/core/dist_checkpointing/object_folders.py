"""Checkpoints in an object store: the steps of folders.py where nothing can be renamed.

Tensors and documents go straight under the final name; the manifest, written last, is what makes
them a checkpoint. Readers ignore what has none, and the next save clears it away. A checkpoint that
is replaced stays whole until its successor is: that one has another name, AGAIN, for the time
being. Whatever is deleted loses its manifest first.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.folders import MANIFEST, TRACKER, Place
from megatron.core.extensions.object_store import ObjectPath, problem_of
from megatron.core.extensions.range_requests import RangeStream

AGAIN = ".again"
BEGUN = ".begun"
"""An object by which the other ranks see that they write to the same store as the first one."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def place(text: str | Path | ObjectPath) -> Place:
    """Return what ``--save`` or ``--load`` names: a folder, or for a URL a place in a store."""
    if not isinstance(text, str):
        return text
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return ObjectPath(text) if _URL.match(text) else Path(text)


def store_problem(where: Place) -> str:
    """Say what keeps this process from looking into an object store, or ''; folders have rules."""
    return problem_of(where) if isinstance(where, ObjectPath) else ""


@folders.places.register
def _places(folder: ObjectPath, iteration: int) -> tuple[ObjectPath, ...]:
    final = folder / folders.checkpoint_name(iteration)
    # the last look is for a writer that finished between the first two
    return final, folder / (final.name + AGAIN), final


@folders.begin.register
def _(folder: ObjectPath, iteration: int) -> ObjectPath:
    for entry in folder.iterdir():
        number = folders.iteration_of(entry.name)
        if number is not None and folders.find_checkpoint(folder, number) != entry:
            _remove(entry)
    final, again, _ = _places(folder, iteration)
    target = again if (final / MANIFEST).is_file() else final
    (target / BEGUN).write_text(os.uname().nodename)
    return target


@folders.publish.register
def _(written: ObjectPath, folder: ObjectPath, iteration: int) -> ObjectPath:
    (folder / TRACKER).write_text(str(iteration))
    (written / BEGUN).unlink()
    for other in set(_places(folder, iteration)) - {written}:
        _remove(other)
    return written


@folders.discard.register
def _(written: ObjectPath) -> None:
    with suppress(OSError):  # the store may be what failed; the next save tries again
        if not (written / MANIFEST).is_file():  # else whole, and perhaps the only one
            _remove(written)


@folders.remove.register
def _(folder: ObjectPath, iteration: int) -> None:
    for found in set(_places(folder, iteration)):
        _remove(found)


@folders.write_file.register
def _(path: ObjectPath, text: str) -> None:
    path.write_text(text)


@folders.add_file.register
def _(target: ObjectPath, source: Path) -> None:
    target.write_bytes(source.read_bytes())


@folders.file_sizes.register
def _(folder: ObjectPath) -> dict[str, int]:
    return {name: size for name, size in folder.sizes().items() if name != BEGUN}


@folders.open_ranges.register
def _(path: ObjectPath, ranges: list[tuple[int, int]]) -> RangeStream:
    return path.open_ranges(ranges)


@folders.prove_writable.register
def _(folder: ObjectPath) -> None:
    probe = folder / f".probe.{os.uname().nodename}.{os.getpid()}"
    probe.write_text("may be deleted")
    probe.unlink()


@folders.local_copies.register
@contextmanager
def _(folder: ObjectPath, names: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="checkpoint_files_") as temporary:
        copies = {}
        parents = list(dict.fromkeys(Path(name).parent for name in names.values()))
        for role, name in names.items():  # what lay beside each other does so again
            number = parents.index(Path(name).parent)
            copies[role] = Path(temporary) / str(number) / Path(name).name
            copies[role].parent.mkdir(exist_ok=True)
            copies[role].write_bytes((folder / name).read_bytes())
        yield copies


def _remove(checkpoint: ObjectPath) -> None:
    if (checkpoint / MANIFEST).is_file():
        (checkpoint / MANIFEST).unlink()
    checkpoint.remove_all()
