"""Where a dense model comes from: a checkpoint of ours, or a folder of Hugging Face's."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.models.huggingface.config_file import is_hf_folder
from megatron.training.huggingface import import_checkpoint


@contextmanager
def dense_source(
    folder: Place,
    iteration: int | None = None,
    *,
    scratch: Path,
    dtype: str | None = None,
    vocab_size: int | None = None,
) -> Iterator[StoredCheckpoint]:
    """Open the dense model; what is imported for it is gone afterwards.

    Args:
        folder: Folder of checkpoints, one of them, or a folder with config.json and safetensors.
        iteration: Which checkpoint; the latest when None. Nothing to a folder of Hugging Face's.
        scratch: Folder with room for the imported model, made if it is not there.
        dtype: Number format of an imported model, as in ``import_checkpoint``.
        vocab_size: Rows of the vocabulary of an imported model, filled up with zeros.

    Raises:
        CheckpointError: Nothing there, or damaged.
        ConfigError: A model that cannot be built here.
    """
    if not (isinstance(folder, Path) and is_hf_folder(folder)):
        yield StoredCheckpoint.open(folder, iteration)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".imported-", dir=scratch) as imported:
        unit = vocab_size or 1
        import_checkpoint(folder, Path(imported), dtype=dtype, make_vocab_size_divisible_by=unit)
        yield StoredCheckpoint.open(Path(imported))
