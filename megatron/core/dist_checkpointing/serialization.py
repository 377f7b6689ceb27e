"""Tensors to files and back, by torch.distributed.checkpoint (DCP): every key is global.

DCP stores a block that several ranks offer once, on the rank with the least to write, and on
loading gives each rank the blocks it asks for; that is all that resharding takes.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.core.dist_checkpointing.agreement import (
    attempt,
    broadcast,
    describe,
    gather,
    os_error_behind,
    raise_if_any,
    rank_in,
)
from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards
from megatron.core.dist_checkpointing.validation import TensorFacts, mismatch_problem
from megatron.core.errors import CheckpointError

ResultT = TypeVar("ResultT")
_NOISE = "torch.distributed is disabled, unavailable or uninitialized"


def write_tensors(
    folder: Path, tensors: Mapping[str, Storable], group: ProcessGroup | None
) -> None:
    """Write the tensors of all ranks into ``folder``, flushed to the disk.

    Args:
        folder: Exists, and every rank sees it.
        tensors: Key -> tensor of this rank, or its blocks of one. What several ranks offer is
            written once; the blocks of all ranks must make up the whole.
        group: The ranks that take part; every one must call this.

    Raises:
        CheckpointError: Some rank could not write; the same message on every rank.
    """
    _on_all_ranks(
        lambda: save(
            dict(tensors),
            storage_writer=_Writer(folder),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    )


def stored_tensors(folder: Path) -> dict[str, TensorFacts]:
    """Return key -> shape and dtype of every tensor in a checkpoint, from this rank's view.

    Raises:
        CheckpointError: The folder has no readable metadata.
    """
    entries = _SafeReader(folder).read_metadata().state_dict_metadata
    return {
        key: TensorFacts(tuple(entry.size), entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(
    folder: Path,
    tensors: dict[str, Storable],
    group: ProcessGroup | None,
    *,
    prefixes: tuple[str, ...],
) -> None:
    """Fill ``tensors`` in place; nothing is changed unless everything fits.

    Args:
        folder: A checkpoint that ``write_tensors`` wrote at any number of ranks.
        tensors: Key -> tensor of this rank, or its blocks of one, of the shape and dtype on disk.
        group: The ranks that take part; every one must call this.
        prefixes: Every stored key that begins with one of these must be wanted by some rank.

    Raises:
        CheckpointError: Missing or unexpected keys, other shapes or dtypes, or unreadable files;
            the same message on every rank.
    """
    stored = attempt(lambda: stored_tensors(folder), group)
    wanted = gather({key: TensorFacts.of(tensor) for key, tensor in tensors.items()}, group)
    problem = ""
    if rank_in(group) == 0:
        kept = {key: facts for key, facts in stored.items() if key.startswith(prefixes)}
        problem = mismatch_problem(kept, wanted)
    if problem := broadcast(problem, group):
        raise CheckpointError(f"{folder} does not fit this run:\n{problem}")
    _on_all_ranks(
        lambda: load(
            dict(tensors),
            storage_reader=_SafeReader(folder),
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    )


def _on_all_ranks(work: Callable[[], ResultT]) -> ResultT:
    """Do a DCP call; it fails on all ranks when it fails on one, as a CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_NOISE)
            return work()
    except CheckpointException as error:
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        if not all(isinstance(f, OSError | RuntimeError | EOFError) for f in failures.values()):
            raise  # a bug of ours, with the stacks of all ranks
        raise_if_any({rank: describe(failure) for rank, failure in failures.items()})
        raise


class _SavePlanner(DefaultSavePlanner):
    """Finds blocks too."""

    def lookup_object(self, index: MetadataIndex) -> object:
        """See DefaultSavePlanner."""
        found = self.state_dict[index.fqn]
        return found.block_at(index.offset) if isinstance(found, TensorShards) else found


class _LoadPlanner(DefaultLoadPlanner):
    """Finds blocks too."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """See DefaultLoadPlanner, which looks for tensors on the meta device and loses blocks."""
        super().set_up_planner({}, metadata, is_coordinator)
        self.state_dict = self.original_state_dict = state_dict

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """See DefaultLoadPlanner."""
        found = self.state_dict[index.fqn]
        return found.block_at(index.offset) if isinstance(found, TensorShards) else found


class _Writer(FileSystemWriter):
    """Reports a full disk as what it is: torch.save hides the OSError in a RuntimeError."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """See StorageWriter.write_data."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if (cause := os_error_behind(error)) is None:
                raise
            raise cause from error


class _SafeReader(FileSystemReader):
    """Reads DCP's pickled index without running anything that a stranger put into it."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """See StorageReader.read_metadata; refuses what is not part of DCP's own index."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                metadata = _IndexUnpickler(stream).load()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or not ours: {error}") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} is not the index of a checkpoint")
        metadata.storage_meta = None
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Finds only the plain classes that DCP's index is made of."""

    def find_class(self, module: str, name: str) -> object:
        """See pickle.Unpickler.find_class."""
        if name in _INDEX_CLASSES.get(module, ()) or isinstance(
            getattr(torch, name, None) if module == "torch" else None, torch.dtype
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")


_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    _METADATA: {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
