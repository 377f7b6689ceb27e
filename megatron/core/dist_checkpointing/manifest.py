"""Size and SHA-256 of every file of a checkpoint, written last and checked first.

Hashing is shared out: the rank that wrote a file hashes it (it is in that machine's page cache),
and at load the ranks take turns.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TypedDict

from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import attempt, gather, rank_in, size_of
from megatron.core.dist_checkpointing.folders import MANIFEST, write_file
from megatron.core.errors import CheckpointError

_WRITER = re.compile(r"__(\d+)_\d+\.distcp")
_SHOWN = 5


class FileFacts(TypedDict):
    """What the manifest says about one file."""

    bytes: int
    sha256: str


def write_manifest(folder: Path, group: ProcessGroup | None) -> int:
    """Hash all files under ``folder`` and write its manifest; every rank must call this.

    Returns:
        Bytes of the files in the manifest.

    Raises:
        CheckpointError: A file cannot be read or the manifest cannot be written.
    """
    facts: dict[str, FileFacts] = {}
    for part in gather(attempt(lambda: _own_facts(folder, group), group), group):
        facts.update(part)

    def write() -> None:
        if rank_in(group) == 0:
            text = json.dumps({"files": dict(sorted(facts.items()))}, indent=1)
            write_file(folder / MANIFEST, text + "\n")

    attempt(write, group)
    return sum(fact["bytes"] for fact in facts.values())


def verify_manifest(folder: Path, group: ProcessGroup | None) -> None:
    """Compare every file with the manifest; every rank must call this.

    Raises:
        CheckpointError: Files are missing or damaged; all are named.
    """
    facts = attempt(lambda: read_manifest(folder), group)
    mine = sorted(facts)[rank_in(group) :: size_of(group)]
    found = attempt(
        lambda: [p for name in mine if (p := _problem(folder, name, facts[name]))], group
    )
    problems = [problem for part in gather(found, group) for problem in part]
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else ""
        listed = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
        raise CheckpointError(f"{folder} is damaged:{listed}{more}")


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """Return file name -> facts.

    Raises:
        CheckpointError: The manifest is missing or unreadable.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            str(name): {"bytes": int(fact["bytes"]), "sha256": str(fact["sha256"])}
            for name, fact in files.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a complete checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_facts(folder: Path, group: ProcessGroup | None) -> dict[str, FileFacts]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
        for name in names
        if name != MANIFEST and _writer(name) % size_of(group) == rank_in(group)
    }


def _writer(name: str) -> int:
    match = _WRITER.fullmatch(name)
    return int(match[1]) if match else 0


def _problem(folder: Path, name: str, fact: FileFacts) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != fact["bytes"]:
        return f"{name} has {size} bytes instead of {fact['bytes']}"
    return "" if hash_file(path) == fact["sha256"] else f"{name} is not what was written (SHA-256)"
