"""Is there room for a checkpoint in the memory of this node? Asked before it is written."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import attempt, gather
from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards
from megatron.core.errors import CheckpointError

_MEMINFO = Path("/proc/meminfo")
_GIB = 2**30


def check_room(folder: Path, tensors: Mapping[str, Storable], group: ProcessGroup) -> None:
    """Refuse to fill the memory of a node.

    Args:
        folder: Exists, on the file system in memory.
        tensors: What this rank would write; what several ranks offer is written once.
        group: The ranks of the node; every one calls this.

    Raises:
        CheckpointError: There is not enough; the same on every rank of the node.
    """
    blocks: dict[str, int] = {}
    for part in gather(dict(_blocks(tensors)), group):
        blocks |= part
    needed = sum(blocks.values())

    def check() -> None:
        free = free_bytes(folder)
        if needed > free:
            raise CheckpointError(
                f"an in-memory checkpoint of this node takes {needed / _GIB:.2f} GiB more for a "
                f"while, and {free / _GIB:.2f} GiB are free in {folder}: use "
                "--non-persistent-ckpt-type local with a folder on a disk of the node"
            )

    attempt(check, group)


def free_bytes(folder: Path, meminfo: Path = _MEMINFO) -> int:
    """Return how much a file system in memory can still take: of its own size, and of memory."""
    free = shutil.disk_usage(folder).free
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            free = min(free, int(rest.split()[0]) * 1024)
    return free


def _blocks(tensors: Mapping[str, Storable]) -> list[tuple[str, int]]:
    """Return name and bytes of each block that this rank holds."""
    found = []
    for key, tensor in tensors.items():
        if isinstance(tensor, TensorShards):
            found += [(f"{key}@{s.offset}", _nbytes(s.tensor)) for s in tensor.shards]
        else:
            found.append((key, _nbytes(tensor)))
    return found


def _nbytes(tensor: object) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize  # type: ignore[attr-defined]
