"""The config.json of a folder; telling such a folder from other ones. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from megatron.core.errors import CheckpointError

CONFIG = "config.json"


def is_hf_folder(path: Path) -> bool:
    """Tell whether a folder looks like a model of Hugging Face's."""
    return (path / CONFIG).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder.

    Raises:
        CheckpointError: It is not there, or no JSON object.
    """
    file = path / CONFIG
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG}: it is no folder of Hugging Face's (a model's folder has "
            "config.json and .safetensors files)"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found
