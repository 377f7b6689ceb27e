"""From a dense checkpoint to an upcycled one, one tensor in memory at a time."""

from dataclasses import asdict
from typing import Any

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.offline import (
    OfflineWriter,
    StoredCheckpoint,
    shared_out,
)
from megatron.core.errors import CheckpointError
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import architecture, config_data
from megatron.training.starting_point import WEIGHTS_ONLY
from megatron.training.upcycling.expert_tensors import upcycled_tensors
from megatron.training.upcycling.preservation import Recipe

ITERATION = 0
UPCYCLING = "upcycling"
"""Entry of common.json: which dense checkpoint it was made of, and the recipe."""


def write_upcycled(
    source: StoredCheckpoint,
    folder: Place,
    config: RunConfig,
    recipe: Recipe,
    *,
    history: str,
    origin: Place | None = None,
) -> tuple[Place, int]:
    """Write the upcycled model as the checkpoint of iteration 0 and publish it.

    Args:
        source: The dense model.
        folder: Gets the checkpoint; holds none.
        config: Of the upcycled model, see ``upcycled_config``.
        recipe: How experts are made.
        history: A line of what was done.
        origin: Where the dense model is from, to be noted; the path of ``source`` when None.

    Returns:
        Path and size in bytes.

    Raises:
        CheckpointError: The folder holds checkpoints, or the dense one is not understood.
    """
    refuse_used(folder)
    tensors = upcycled_tensors(source, config.model, recipe)
    num_files = len({block.file for stored in source.index.values() for block in stored.blocks})
    files = shared_out({key: made.facts for key, made in tensors.items()}, num_files or 1)
    with OfflineWriter(folder, ITERATION, files) as writer:
        for key in writer.order:
            writer.add(key, tensors[key].make())
        common = _common(source, config) | {
            UPCYCLING: {"dense": str(origin or source.path), **asdict(recipe)},
            "history": [*source.common.get("history", []), history],
        }
        return writer.finish(common, source.documents)


def refuse_used(folder: Place) -> None:
    """Refuse a folder that holds checkpoints.

    Raises:
        CheckpointError: It does.
    """
    if there := folders.complete_iterations(folder):
        raise CheckpointError(
            f"--save {folder} holds checkpoints already (newest: iteration {there[-1]}); a model "
            "is upcycled once: go on from there, or choose another folder"
        )


def _common(source: StoredCheckpoint, config: RunConfig) -> dict[str, Any]:
    old = source.common
    huggingface = dict(old.get("huggingface") or {})
    huggingface.pop("family", None)  # a mixture is of another one
    return {
        **old,
        "huggingface": huggingface or None,
        "iteration": ITERATION,
        "consumed_train_samples": 0,
        "data_fingerprint": None,
        "dropout_seed": None,
        "optimizer": None,
        "loss_scale": None,
        WEIGHTS_ONLY: True,
        "architecture": architecture(config.model),
        "config": config_data(config),
    }
