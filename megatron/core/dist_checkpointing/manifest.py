"""Size of every file of a checkpoint, SHA-256 of the small ones; written last and checked first.

The bytes of tensors are checked block by block as they are read (see tensor_file.py), so that a
checkpoint is read once, and what is damaged is called by its name.
"""

import hashlib
import json
from typing import TypedDict

from megatron.core.dist_checkpointing.folders import MANIFEST, Place, file_sizes, write_file
from megatron.core.dist_checkpointing.index import keys_by_file, read_index
from megatron.core.errors import CheckpointError

_SHOWN = 5
TENSOR_SUFFIX = ".safetensors"


class FileFacts(TypedDict):
    """What the manifest says about one file."""

    bytes: int
    sha256: str | None
    """None for a file of tensors: the index has a hash of each block."""


def write_manifest(folder: Place) -> int:
    """Write the manifest of all files under ``folder``; one rank calls this.

    Returns:
        Bytes of the files in the manifest.

    Raises:
        OSError: A file cannot be read or the manifest cannot be written.
    """
    sizes = sorted(file_sizes(folder).items())
    facts = {name: _facts(folder / name, size) for name, size in sizes if name != MANIFEST}
    write_file(folder / MANIFEST, json.dumps({"files": facts}, indent=1) + "\n")
    return sum(fact["bytes"] for fact in facts.values())


def verify_manifest(folder: Place) -> None:
    """Compare the files with the manifest, but for the bytes of tensors; one rank calls this.

    Raises:
        CheckpointError: Files are missing or damaged; all are named, and some of their tensors.
    """
    facts, sizes = read_manifest(folder), file_sizes(folder)
    found = {name: _problem(folder / name, fact, sizes.get(name)) for name, fact in facts.items()}
    problems = {name: problem for name, problem in found.items() if problem}
    if not problems:
        return
    held = {} if any(not n.endswith(TENSOR_SUFFIX) for n in problems) else _held(folder)
    lines = [f"{name} {problem}{held.get(name, '')}" for name, problem in problems.items()]
    more = f"\n  ... and {len(lines) - _SHOWN} more" if lines[_SHOWN:] else ""
    listed = "".join(f"\n  - {line}" for line in lines[:_SHOWN])
    raise CheckpointError(f"{folder} is damaged:{listed}{more}")


def read_manifest(folder: Place) -> dict[str, FileFacts]:
    """Return file name -> facts.

    Raises:
        CheckpointError: The manifest is missing or unreadable.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            str(name): {
                "bytes": int(fact["bytes"]),
                "sha256": None if name.endswith(TENSOR_SUFFIX) else str(fact["sha256"]),
            }
            for name, fact in files.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a complete checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def hash_file(path: Place) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _facts(path: Place, size: int) -> FileFacts:
    sha = None if path.suffix == TENSOR_SUFFIX else hash_file(path)
    return {"bytes": size, "sha256": sha}


def _problem(path: Place, fact: FileFacts, size: int | None) -> str:
    if size is None:
        return "is missing"
    if size != fact["bytes"]:
        return f"has {size} bytes instead of {fact['bytes']}"
    if fact["sha256"] is None or hash_file(path) == fact["sha256"]:
        return ""
    return "is not what was written (SHA-256)"


def _held(folder: Place) -> dict[str, str]:
    """Return file -> which tensors it holds, for messages."""
    return {
        name: f"; it holds {len(keys)} tensors: {', '.join(keys[:_SHOWN])}"
        + (", ..." if keys[_SHOWN:] else "")
        for name, keys in keys_by_file(read_index(folder)).items()
    }
