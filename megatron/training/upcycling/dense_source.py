"""Where a dense model comes from: a checkpoint of ours, or a folder of Hugging Face's."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.training.huggingface import import_checkpoint


@contextmanager
def dense_source(
    folder: Place, iteration: int | None = None, *, scratch: Path
) -> Iterator[StoredCheckpoint]:
    """Open the dense model; what is imported for it is gone afterwards.

    Args:
        folder: Folder of checkpoints, one of them, or a folder with config.json and safetensors.
        iteration: Which checkpoint; the latest when None.
        scratch: Folder with room for the imported model, made if it is not there.

    Raises:
        CheckpointError: Nothing there, or damaged.
        ConfigError: A model that cannot be built here.
    """
    if not (isinstance(folder, Path) and is_huggingface(folder)):
        yield StoredCheckpoint.open(folder, iteration)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".imported-", dir=scratch) as imported:
        import_checkpoint(folder, Path(imported))
        yield StoredCheckpoint.open(Path(imported))


def is_huggingface(folder: Path) -> bool:
    """Tell whether a folder is one of Hugging Face's."""
    return (folder / "config.json").is_file()
