"""Names and atomic changes in a folder of checkpoints, without collectives; one rank changes.

A checkpoint is complete as soon as it has its final name: it is written under a hidden name in
the same folder, flushed, and renamed; the tracker file that names the newest follows last.
Readers change nothing: folders may be read-only, or a writer at work in them.

Functions that dispatch have another version for object stores, in object_folders.py.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import singledispatch
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, TypeAlias

from megatron.core.dist_checkpointing.foreign import refuse_foreign
from megatron.core.errors import CheckpointError
from megatron.core.extensions.object_store import ObjectPath

Place: TypeAlias = Path | ObjectPath
"""A folder or file that holds checkpoints or is one; ``object_folders.place`` reads a user's."""

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
COMMON = "common.json"
"""Everything of a checkpoint that is no tensor."""
_NUMBERED = re.compile(r"\.?iter_(\d{7,})")
_HIDDEN = re.compile(r"\.iter_\d{7,}\.(tmp|old|pruned)")


def checkpoint_path(folder: Place, iteration: int) -> Place:
    """Return the place of the checkpoint of ``iteration`` (which need not exist)."""
    return folder / checkpoint_name(iteration)


def checkpoint_name(iteration: int) -> str:
    """Return the name of the checkpoint of ``iteration``."""
    return f"iter_{iteration:07d}"


def temporary_path(folder: Path, iteration: int) -> Path:
    """Return the hidden place in which the checkpoint of ``iteration`` is written."""
    return _hidden(folder, iteration, "tmp")


def iteration_of(name: str) -> int | None:
    """Return the iteration of which ``name`` is a checkpoint's, hidden or not; None for others."""
    return int(m[1]) if (m := _NUMBERED.match(name)) else None


def complete_iterations(folder: Place) -> list[int]:
    """List the iterations that have a checkpoint in ``folder``, in ascending order."""
    if not folder.is_dir():
        return []
    found = {iteration_of(entry.name) for entry in folder.iterdir()} - {None}
    return sorted(n for n in found if n is not None and find_checkpoint(folder, n) is not None)


def find_checkpoint(folder: Place, iteration: int) -> Place | None:
    """Return where the complete checkpoint of ``iteration`` lies, or None."""
    found = places(folder, iteration)
    return next((place for place in found if (place / MANIFEST).is_file()), None)


@singledispatch
def places(folder: Place, iteration: int) -> tuple[Place, ...]:
    """Return where the checkpoint of ``iteration`` may lie: the first that is complete counts.

    Between the two renames of a replacement it has only its hidden name; the next save renames it
    back if that one was killed there.
    """
    folder = _local(folder)
    final = checkpoint_path(folder, iteration)
    # the last look is for a writer that published between the first two
    return final, _hidden(folder, iteration, "old"), final


def latest_iteration(folder: Place) -> int | None:
    """Return the iteration that the tracker file names, or None in a folder without checkpoints.

    A folder whose first save was killed just before the tracker was written has a complete
    checkpoint and no tracker; the newest complete one counts then.

    Raises:
        CheckpointError: The tracker is unreadable or names a checkpoint that is not there, or
            Megatron-LM wrote the folder.
    """
    complete = complete_iterations(folder)
    if not complete:
        refuse_foreign(folder)
    tracker = folder / TRACKER
    if not tracker.is_file():
        return complete[-1] if complete else None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise CheckpointError(f"{tracker} holds {text[:40]!r}, not the number of an iteration")
    if int(text) not in complete:
        there = ", ".join(map(str, complete)) or "none"
        raise CheckpointError(
            f"{tracker} names iteration {text}, but {checkpoint_path(folder, int(text))} is "
            f"missing or incomplete; complete here: {there}; choose one with --ckpt-step"
        )
    return int(text)


@singledispatch
def begin(folder: Place, iteration: int) -> Place:
    """Clear what killed runs left and make the hidden folder that ``publish`` will rename.

    What cannot be deleted now, such as files that a reader holds open on NFS, waits for a later
    save: it is in nobody's way.
    """
    folder = _local(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary = temporary_path(folder, iteration)
    for entry in list(folder.iterdir()):
        if _HIDDEN.fullmatch(entry.name):
            _discard(entry)
    temporary.mkdir()
    return temporary


@singledispatch
def publish(temporary: Place, folder: Place, iteration: int) -> Place:
    """Give a finished checkpoint its name, then let the tracker name it. Returns its path.

    Raises:
        OSError: The disk is full, say; names are as they were before, unless the tracker was
            written and could not be flushed.
    """
    temporary, folder = _local(temporary), _local(folder)
    flush_folder(temporary)
    final = folder / checkpoint_name(iteration)
    replaced = _hidden(folder, iteration, "old")
    tracker = _prepared(folder / TRACKER, str(iteration))  # takes room before anything is named
    try:
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        flush_folder(folder)
        tracker.replace(folder / TRACKER)
    except OSError:
        with suppress(OSError):  # what cannot be undone now, the next save undoes
            tracker.unlink(missing_ok=True)
            if final.exists() and not temporary.exists():
                final.rename(temporary)
            if replaced.exists():
                replaced.rename(final)
        raise
    flush_folder(folder)
    _discard(replaced)  # what stays, the next save clears
    return final


@singledispatch
def discard(temporary: Place) -> None:
    """Remove what a failed save made, as far as that can be done."""
    shutil.rmtree(_local(temporary), ignore_errors=True)


def prune(
    folder: Place, keep_last: int | None, current: int, *, retain_interval: int | None = None
) -> list[int]:
    """Delete checkpoints that the one of ``current``, just saved, makes superfluous.

    Later ones are not of this run, which has not come so far: they neither count nor go.

    Args:
        folder: Holds the checkpoints.
        keep_last: This many of the newest stay. None: only the one before ``current`` may go, and
            only with a ``retain_interval``.
        current: Iteration of the newest checkpoint of this run.
        retain_interval: Multiples of it stay for good and are not counted.

    Returns:
        The iterations that were deleted.
    """
    doomed = superfluous(complete_iterations(folder), keep_last, current, retain_interval)
    delete(folder, doomed)
    return doomed


def delete(folder: Place, iterations: Iterable[int]) -> None:
    """Delete complete checkpoints."""
    for iteration in iterations:
        remove(folder, iteration)


def superfluous(
    complete: list[int], keep_last: int | None, current: int, retain_interval: int | None
) -> list[int]:
    """Return which of the ``complete`` iterations, in ascending order, ``prune`` deletes."""
    own = [iteration for iteration in complete if iteration <= current]
    passing = [i for i in own if retain_interval is None or i % retain_interval]
    if keep_last is not None:
        return passing[:-keep_last]
    if retain_interval is None:
        return []
    return [iteration for iteration in own[-2:-1] if iteration in passing]


@singledispatch
def remove(folder: Place, iteration: int) -> None:
    """Delete one checkpoint; at no moment is there half of one by its name."""
    folder = _local(folder)
    hidden = _hidden(folder, iteration, "pruned")
    (folder / checkpoint_name(iteration)).rename(hidden)
    shutil.rmtree(hidden)


@singledispatch
def prove_writable(folder: Place) -> None:
    """Raise OSError if this process cannot write; of folders the options' rules say it."""


@singledispatch
def file_sizes(folder: Place) -> dict[str, int]:
    """Return relative name -> bytes of every file below ``folder``."""
    folder = _local(folder)
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@singledispatch
def open_ranges(path: Place, ranges: list[tuple[int, int]]) -> BinaryIO | RawIOBase:
    """Open a file of which these ranges (begin, end) will be read, and nothing else."""
    return _local(path).open("rb", buffering=0)


@singledispatch
@contextmanager
def local_copies(folder: Place, names: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """Give files of a checkpoint, by role, to code that opens paths; only within the context.

    Args:
        folder: The checkpoint.
        names: Role -> name in the checkpoint.
    """
    yield {role: _local(folder) / name for role, name in names.items()}


@singledispatch
def write_file(path: Place, text: str) -> None:
    """Write ``text`` so that a reader sees the old content or the new, never a part."""
    path = _local(path)
    prepared = _prepared(path, text)
    try:
        prepared.replace(path)
    except OSError:
        prepared.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _prepared(path: Path, text: str) -> Path:
    """Write what ``path`` shall hold beside it, flushed to the disk; return that file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


@singledispatch
def add_file(target: Place, source: Path) -> None:
    """Copy the file ``source`` into a checkpoint, flushed to the disk."""
    target = _local(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Make names that were created or renamed in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _recover(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    for entry in list(folder.iterdir()):
        if entry.name.endswith(".old") and _HIDDEN.fullmatch(entry.name):
            final = folder / entry.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                entry.rename(final)


def _discard(hidden: Path) -> None:
    """Delete as much as goes, the manifest first: what stays is no checkpoint."""
    with suppress(OSError):
        (hidden / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)


def _hidden(folder: Path, iteration: int, suffix: str) -> Path:
    return folder / f".{checkpoint_name(iteration)}.{suffix}"


def _local(place: Place) -> Path:
    assert isinstance(place, Path), f"no steps are known for {place}: import object_folders"
    return place
