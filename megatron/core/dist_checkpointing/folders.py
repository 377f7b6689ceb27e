"""Names and atomic changes in a folder of checkpoints, without collectives; one rank changes.

A checkpoint is complete as soon as it has its final name: it is written under a hidden name in
the same folder, flushed, and renamed; the tracker file that names the newest follows last.
Readers change nothing: folders may be read-only, or a writer at work in them.
"""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron.core.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
COMMON = "common.json"
"""Everything of a checkpoint that is no tensor."""
_NUMBERED = re.compile(r"\.?iter_(\d{7,})")
_HIDDEN = re.compile(r"\.iter_\d{7,}\.(tmp|old|pruned)")


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Return the place of the checkpoint of ``iteration`` (which need not exist)."""
    return folder / f"iter_{iteration:07d}"


def temporary_path(folder: Path, iteration: int) -> Path:
    """Return the hidden place in which the checkpoint of ``iteration`` is written."""
    return _hidden(folder, iteration, "tmp")


def complete_iterations(folder: Path) -> list[int]:
    """List the iterations that have a checkpoint in ``folder``, in ascending order."""
    if not folder.is_dir():
        return []
    found = {int(m[1]) for entry in folder.iterdir() if (m := _NUMBERED.match(entry.name))}
    return sorted(number for number in found if find_checkpoint(folder, number) is not None)


def find_checkpoint(folder: Path, iteration: int) -> Path | None:
    """Return where the complete checkpoint of ``iteration`` lies, or None.

    Between the two renames of a replacement it has only its hidden name; the next save renames it
    back if that one was killed there.
    """
    final = checkpoint_path(folder, iteration)
    # the last look is for a writer that published between the first two
    places = (final, _hidden(folder, iteration, "old"), final)
    return next((place for place in places if (place / MANIFEST).is_file()), None)


def latest_iteration(folder: Path) -> int | None:
    """Return the iteration that the tracker file names, or None in a folder without checkpoints.

    A folder whose first save was killed just before the tracker was written has a complete
    checkpoint and no tracker; the newest complete one counts then.

    Raises:
        CheckpointError: The tracker is unreadable or names a checkpoint that is not there.
    """
    complete = complete_iterations(folder)
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


def begin(folder: Path, iteration: int) -> Path:
    """Clear what killed runs left and make the hidden folder that ``publish`` will rename.

    What cannot be deleted now, such as files that a reader holds open on NFS, waits for a later
    save: it is in nobody's way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary = temporary_path(folder, iteration)
    for entry in list(folder.iterdir()):
        if _HIDDEN.fullmatch(entry.name):
            _discard(entry)
    temporary.mkdir()
    return temporary


def publish(temporary: Path, folder: Path, iteration: int) -> Path:
    """Give a finished checkpoint its name, then let the tracker name it. Returns its path.

    Raises:
        OSError: The disk is full, say; names are as they were before, unless the tracker was
            written and could not be flushed.
    """
    flush_folder(temporary)
    final = checkpoint_path(folder, iteration)
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


def prune(
    folder: Path, keep_last: int | None, current: int, *, retain_interval: int | None = None
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


def delete(folder: Path, iterations: Iterable[int]) -> None:
    """Delete complete checkpoints."""
    for iteration in iterations:
        hidden = _hidden(folder, iteration, "pruned")
        checkpoint_path(folder, iteration).rename(hidden)  # never half a checkpoint by its name
        shutil.rmtree(hidden)


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


def write_file(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old content or the new, never a part."""
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


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and flush it to the disk."""
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


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
    return folder / f".{checkpoint_path(folder, iteration).name}.{suffix}"
