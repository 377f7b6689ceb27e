"""--save-hf: the trained model as Hugging Face has it, out of the last checkpoint, at the end.

The first rank writes, tensor by tensor; the others wait.
"""

import logging
from pathlib import Path

from megatron.core.dist_checkpointing.agreement import attempt, rank_in
from megatron.core.dist_checkpointing.folders import Place
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.models.huggingface.config_file import is_hf_folder
from megatron.training.checkpointing import world_group
from megatron.training.config.checkpoint import CheckpointConfig

log = logging.getLogger(__name__)


def save_huggingface(checkpoint: Place, options: CheckpointConfig) -> None:
    """Write the folder of --save-hf; on every rank.

    Args:
        checkpoint: The last one, ``iter_0000010``.
        options: Say where to, and whether the run began with a folder of Hugging Face's.

    Raises:
        CheckpointError: It could not be written; the same on all ranks.
    """
    group = world_group()
    attempt(lambda: _write(checkpoint, options) if rank_in(group) == 0 else None, group)


def reference_of(options: CheckpointConfig) -> Path | None:
    """Return the folder of Hugging Face's that a run began with, if it did."""
    for text in (options.load, options.pretrained_checkpoint):
        if text is not None and is_hf_folder(Path(text)):
            return Path(text)
    return None


def _write(checkpoint: Place, options: CheckpointConfig) -> None:
    from megatron.training.huggingface import export_checkpoint

    assert options.save_hf is not None, "nothing was asked for"
    target = Path(options.save_hf)
    assert isinstance(checkpoint, Path), f"{checkpoint} is in an object store"
    try:
        done = export_checkpoint(checkpoint, target, reference=reference_of(options))
    except (ConfigError, OSError) as error:
        raise CheckpointError(f"--save-hf {target}: {error}") from error
    log.info(
        "saved the model to %s as Hugging Face has it (%s, %d tensors, read back and bit-equal)",
        target,
        done.family.name,
        done.num_tensors,
    )
