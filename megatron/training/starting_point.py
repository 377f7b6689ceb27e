"""Which checkpoint a run begins with: that of --load, else that of --pretrained-checkpoint.

Looks at folders and at common.json, changes nothing and imports no torch: options are taken from
the checkpoint, and mistakes told, before anything is set up.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.folders import (
    COMMON,
    Place,
    complete_iterations,
    find_checkpoint,
    latest_iteration,
)
from megatron.core.dist_checkpointing.object_folders import place, store_problem
from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.config_file import is_hf_folder
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.huggingface_start import facts_of_folder

WEIGHTS_ONLY = "weights_only"
"""Entry of common.json, true where a checkpoint is not of a run: --load begins anew with it."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """A checkpoint, not opened yet."""

    folder: Place
    """Holds it, and perhaps others."""
    iteration: int
    weights_only: bool = False
    """Whether the run begins anew with its weights, as --finetune does: because it was found by
    --pretrained-checkpoint, or because there is nothing else in it."""
    is_huggingface: bool = False
    """Whether ``folder`` itself is a model of Hugging Face's."""

    @property
    def path(self) -> Place:
        """Where it lies.

        Raises:
            CheckpointError: It is not there.
        """
        if self.is_huggingface:
            return self.folder
        found = find_checkpoint(self.folder, self.iteration)
        if found is None:
            complete = complete_iterations(self.folder)
            raise CheckpointError(
                f"{self.folder} has no complete checkpoint of iteration {self.iteration}; "
                f"complete here: {', '.join(map(str, complete)) or 'none'}"
            )
        return found


def starting_point(options: CheckpointConfig) -> StartingPoint | None:
    """Return the checkpoint that a run with these options begins with; None for a fresh run.

    Raises:
        CheckpointError: A tracker file is damaged, or names what is not there.
    """
    if options.load is not None:
        start = _found_in(_usable("--load", options.load), options.ckpt_step)
        if start is not None:
            return start
    if options.pretrained_checkpoint is None:
        return None
    start = _found_in(
        *folder_and_iteration(_usable("--pretrained-checkpoint", options.pretrained_checkpoint))
    )
    return None if start is None else replace(start, weights_only=True)


def _found_in(folder: Place, iteration: int | None) -> StartingPoint | None:
    if iteration is None:
        iteration = latest_iteration(folder)
    if iteration is None:
        if not isinstance(folder, Path) or not is_hf_folder(folder):
            return None
        return StartingPoint(folder=folder, iteration=0, weights_only=True, is_huggingface=True)
    start = StartingPoint(folder=folder, iteration=iteration)
    is_first = iteration == 0 and find_checkpoint(folder, 0) is not None
    if is_first and stored_facts(start).get(WEIGHTS_ONLY):
        return replace(start, weights_only=True)
    return start


def _usable(flag: str, text: str) -> Place:
    """Return the place that ``text`` names; a CheckpointError if it cannot be looked into."""
    found = place(text)
    if problem := store_problem(found):
        raise CheckpointError(f"{flag} {text} {problem}")
    return found


def takes_newer(options: CheckpointConfig) -> bool:
    """Tell whether a newer non-persistent checkpoint is taken instead of ``starting_point``."""
    is_fixed = options.load is None or options.finetune or options.ckpt_step is not None
    return options.non_persistent_ckpt_type is not None and not is_fixed


def folder_and_iteration(path: Place) -> tuple[Place, int | None]:
    """Read ``path`` as one checkpoint, such as ``iter_0000010``, or a folder of them (None)."""
    if path.name.startswith("iter_") and path.name[5:].isdecimal():
        return path.parent, int(path.name[5:])
    return path, None


def stored_facts(start: StartingPoint) -> dict[str, Any]:
    """Read what a checkpoint says of the run that saved it.

    Raises:
        CheckpointError: It is not there or damaged.
    """
    if start.is_huggingface:
        assert isinstance(start.folder, Path), f"{start.folder} is in an object store"
        return facts_of_folder(start.folder)
    file = start.path / COMMON
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise CheckpointError(f"{file} is damaged: it holds no configuration")
    return facts
