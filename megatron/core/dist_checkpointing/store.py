"""One checkpoint, written or opened by all ranks together: the order of steps is here.

Write: hidden folder, tensors, documents, manifest, rename, tracker, pruning. A failure at any
step removes the hidden folder and leaves every earlier checkpoint as it was. An object store has no
rename; what is done there is in object_folders.py.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.agreement import attempt, broadcast, rank_in
from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.manifest import verify_manifest, write_manifest
from megatron.core.dist_checkpointing.save_plan import SavePlans
from megatron.core.dist_checkpointing.serialization import write_tensors
from megatron.core.dist_checkpointing.tensor_shards import Storable
from megatron.core.errors import CheckpointError

log = logging.getLogger(__name__)

COMMON = folders.COMMON
FORMAT_VERSION = 2
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """What goes into one checkpoint."""

    tensors: Mapping[str, Storable]
    """Global key -> tensor of this rank, or its blocks of one."""
    common: Mapping[str, Any]
    """Plain JSON data, the same on every rank."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Relative name in the checkpoint -> small file to copy, such as the tokenizer's."""
    plans: SavePlans | None = None
    """Who wrote what at the save before, by the same ranks; None to plan anew."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose files were found whole."""

    path: Place
    common: dict[str, Any]


def write_checkpoint(
    folder: Place,
    iteration: int,
    content: CheckpointContent,
    group: ProcessGroup | None,
    *,
    keep_last: int | None = None,
    retain_interval: int | None = None,
    is_complete: bool = True,
) -> tuple[Place, int]:
    """Add a checkpoint to ``folder`` and make it the latest; every rank must call this.

    Args:
        folder: Holds the checkpoints of a run, on a file system that all ranks share.
        iteration: Names the checkpoint; one of the same iteration is replaced.
        content: Its content.
        group: The ranks that take part; None for one process without torch.distributed.
        keep_last: Keep this many checkpoints up to this iteration, after success; later ones, of
            a run that was given up, stay and are told once.
        retain_interval: Iterations that are multiples of it stay and are not counted; without
            ``keep_last`` the one before goes; see ``folders.prune``.
        is_complete: The ranks hold every element of every tensor; see ``write_tensors``.

    Returns:
        Path and size in bytes.

    Raises:
        CheckpointError: Some rank could not write; all ranks raise the same, the hidden folder is
            gone and the latest checkpoint is the same as before.
    """
    temporary = _on_first(lambda: folders.begin(folder, iteration), group)
    try:
        attempt(lambda: _must_see(temporary), group)
        write_tensors(temporary, content.tensors, group, complete=is_complete, plans=content.plans)
        _on_first(lambda: write_documents(temporary, content), group)
        size = _on_first(lambda: write_manifest(temporary), group)
        final = _on_first(lambda: folders.publish(temporary, folder, iteration), group)
    except CheckpointError:
        if rank_in(group) == 0:
            folders.discard(temporary)
        raise
    if (keep_last or retain_interval) and rank_in(group) == 0:
        _prune(folder, keep_last, iteration, retain_interval)
    return final, size


def open_checkpoint(
    folder: Place, group: ProcessGroup | None, *, iteration: int | None = None
) -> OpenCheckpoint | None:
    """Find a checkpoint, compare it with its manifest, read its common data; on every rank.

    Args:
        folder: Holds checkpoints.
        group: The ranks that take part.
        iteration: The one to open; the latest when None.

    Returns:
        None when ``folder`` holds no checkpoint at all and no iteration was asked for.

    Raises:
        CheckpointError: The iteration is not there, or files are missing or damaged; the same
            message on every rank.
    """
    path = _on_first(lambda: _find(folder, iteration), group)
    if path is None:
        return None
    attempt(lambda: _must_see(path), group)
    return OpenCheckpoint(path, _on_first(lambda: _checked_common(path), group))


def _must_see(path: Place) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} was found by the first rank but is not visible on {os.uname().nodename}; "
            "checkpoints need a folder on a file system that all nodes share"
        )


def write_documents(temporary: Place, content: CheckpointContent) -> None:
    """Write everything of ``content`` that is no tensor into ``temporary``, flushed to the disk."""
    for name, source in content.files.items():
        folders.add_file(temporary / name, source)
    common = {"format_version": FORMAT_VERSION, **content.common}
    folders.write_file(temporary / COMMON, json.dumps(common, indent=1) + "\n")


def _prune(
    folder: Place, keep_last: int | None, iteration: int, retain_interval: int | None
) -> None:
    try:
        folders.prune(folder, keep_last, iteration, retain_interval=retain_interval)
        newest = max(folders.complete_iterations(folder), default=iteration)
    except OSError as error:
        log.warning("could not delete old checkpoints in %s: %s", folder, error)
        return
    if newest > iteration and keep_last is not None:
        _tell_later(folders.checkpoint_path(folder, newest))


@functools.cache  # every save would say it again
def _tell_later(path: Place) -> None:
    log.warning(
        "%s is of a later iteration than this run has saved: --keep-last leaves it and others like "
        "it alone; delete them if they are not needed",
        path,
    )


def _find(folder: Place, iteration: int | None) -> Place | None:
    found = folders.latest_iteration(folder) if iteration is None else iteration
    if found is None:
        return None
    path = folders.find_checkpoint(folder, found)
    if path is None:
        complete = folders.complete_iterations(folder)
        raise CheckpointError(
            f"{folder} has no complete checkpoint of iteration {found}; "
            f"complete here: {', '.join(map(str, complete)) or 'none'}"
        )
    return path


def _checked_common(path: Place) -> dict[str, Any]:
    verify_manifest(path)
    try:
        common = json.loads((path / COMMON).read_text(encoding="utf-8"))
        version = common["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / COMMON} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}; this version reads format {FORMAT_VERSION}"
        )
    return common


def _on_first(work: Callable[[], ResultT], group: ProcessGroup | None) -> ResultT:
    """Do ``work`` on the first rank only; all ranks get its result or its error."""
    result = attempt(lambda: work() if rank_in(group) == 0 else None, group)
    return broadcast(result, group)  # type: ignore[return-value]
