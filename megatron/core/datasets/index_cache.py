"""Keep index arrays as .npy files that all ranks map into memory.

Any rank that finds no valid set builds one. Files get temporary names, are synced and renamed;
the description comes last and holds a checksum of each array, so a set is whole or not there.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
_STALE_SECONDS = 3600.0


def cache_folder(data_cache_path: str | None, prefix: str) -> Path:
    """Return ``--data-cache-path``, or ``cache/GPTDataset_indices`` beside the data."""
    if data_cache_path is not None:
        return Path(data_cache_path)
    return Path(prefix).parent / "cache" / "GPTDataset_indices"


def array_digest(array: NDArray[Any]) -> str:
    """Return a hash of the values, for a description."""
    raw = np.ascontiguousarray(array).view(np.uint8)
    return hashlib.md5(raw.data, usedforsecurity=False).hexdigest()


def description_digest(description: Mapping[str, Any]) -> str:
    """Return the hash that names the files: equal descriptions mean equal arrays."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def load_or_build(
    folder: Path | None,
    kind: str,
    description: Mapping[str, Any],
    build: Callable[[], Arrays],
) -> Arrays:
    """Return the arrays, from valid files or by ``build()``, which is then written.

    Args:
        folder: Of the files; None keeps the arrays in memory only.
        kind: Part of the file names, such as ``GPTDataset-train``.
        description: Everything that the arrays depend on; its hash names the files.
        build: Makes the arrays; equal descriptions must give equal arrays, since several ranks
            may build and write at the same time.

    A folder that cannot be written costs a warning, not the run: each rank then builds for itself.
    """
    if folder is None:
        return build()
    stem = f"{description_digest(description)}-{kind}"
    found = _load(folder, stem)
    if found is not None:
        return found
    arrays = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder, stem)
        _save(folder, stem, description, arrays)
    except OSError as error:
        log.warning(
            "cannot keep the index of the samples (%s): every process builds its own; "
            "give a folder that can be written with --data-cache-path",
            error,
        )
        return arrays
    return _load(folder, stem) or arrays


def _description_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}-description.txt"


def _load(folder: Path, stem: str) -> Arrays | None:
    """Map the arrays; None when there are none, or when they are damaged (with a warning)."""
    try:
        noted = json.loads(_description_path(folder, stem).read_text(encoding="utf-8"))
        return {name: _map(folder, stem, name, fact) for name, fact in noted["arrays"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "index files %s/%s-* are damaged (%s): building them again", folder, stem, error
        )
        return None


def _map(folder: Path, stem: str, name: str, fact: Mapping[str, Any]) -> NDArray[Any]:
    path = folder / f"{stem}-{name}.npy"
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    found = _fact(array)
    if found != dict(fact):
        raise ValueError(f"{path.name} holds {found}, written was {dict(fact)}")
    return array


def _fact(array: NDArray[Any]) -> dict[str, Any]:
    """Return what the description notes of an array."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": zlib.crc32(raw.data)}


def _save(folder: Path, stem: str, description: Mapping[str, Any], arrays: Arrays) -> None:
    facts = {}
    for name, array in arrays.items():
        _write(folder / f"{stem}-{name}.npy", partial(np.save, arr=array))
        facts[name] = _fact(array)
    text = json.dumps({"made_from": dict(description), "arrays": facts}, indent=1, sort_keys=True)
    _write(_description_path(folder, stem), lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[Any], object]) -> None:
    """Write under a name of this process, sync, rename: a reader sees all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path, stem: str) -> None:
    """Remove what killed processes left behind; an hour old, so that no living one writes it."""
    for path in folder.glob(f"{stem}-*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue
