"""From a plan of tensors to a new checkpoint, one tensor in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.offline import (
    OfflineWriter,
    StoredCheckpoint,
    shared_out,
)
from megatron.core.dist_checkpointing.save_plan import PlannedBlock
from megatron.core.errors import CheckpointError

HISTORY = "history"
"""Entry of common.json: one line for each tool that changed the checkpoint since training."""


@dataclass(frozen=True)
class Made:
    """A tensor of the new checkpoint."""

    facts: TensorFacts
    make: Callable[[], Tensor]
    """Reads and computes it, of this shape and dtype."""


def copied(source: StoredCheckpoint, key: str) -> Made:
    """Return a tensor as it is."""
    return Made(source.facts(key), lambda: source.read(key))


def num_files_of(source: StoredCheckpoint) -> int:
    """Return the number of files with tensors of a checkpoint."""
    return len({block.file for tensor in source.index.values() for block in tensor.blocks}) or 1


def refuse_target(source: StoredCheckpoint, folder: Path, iteration: int) -> None:
    """Refuse to write where a checkpoint would be replaced, or beside the one that is read.

    Raises:
        CheckpointError: With the reason.
    """
    if folder.resolve() in (source.path.resolve(), source.path.parent.resolve()):
        raise CheckpointError(f"--save {folder} is where {source.path} lies; give another folder")
    if (there := folders.find_checkpoint(folder, iteration)) is not None:
        raise CheckpointError(f"{there} is there already; delete it or give another --save")


def write(
    source: StoredCheckpoint,
    folder: Path,
    tensors: Mapping[str, Made],
    *,
    common: Mapping[str, Any],
    files: Sequence[Sequence[PlannedBlock]] | None = None,
) -> tuple[Path, int]:
    """Write a checkpoint made from ``source`` and publish it.

    Args:
        source: Its small files, such as the tokenizer's, are copied.
        folder: Gets the checkpoint and the tracker file.
        tensors: Key -> how it is made.
        common: Its ``common.json``; says the iteration.
        files: What goes into which file; whole tensors in as many files as the source has when
            None.

    Returns:
        Path and size in bytes.
    """
    iteration = common["iteration"]
    refuse_target(source, folder, iteration)
    if files is None:
        facts = {key: made.facts for key, made in tensors.items()}
        files = shared_out(facts, num_files_of(source))
    documents = source.documents
    with OfflineWriter(folder, iteration, files) as writer:
        for key in writer.order:
            writer.add(key, tensors[key].make())
        return writer.finish(common, documents)


def with_history(common: Mapping[str, Any], line: str) -> dict[str, Any]:
    """Return ``common`` with one more line of what was done to the checkpoint."""
    return {**common, HISTORY: [*common.get(HISTORY, []), line]}
