"""Writes a folder of Hugging Face's: weights in shards of safetensors, tensor by tensor, at once.

Everything goes into a hidden folder beside the wanted one, which gets its name when all is there.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.core.dist_checkpointing.folders import flush_folder
from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.tensor_file import BlockOutline, TensorFileWriter
from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.config_file import CONFIG
from megatron.core.models.huggingface.folder import INDEX, SINGLE

GENERATION = "generation_config.json"


def shards_of(facts: Mapping[str, TensorFacts], max_bytes: int) -> list[list[str]]:
    """Share tensors out over files of at most ``max_bytes``, in their order.

    A tensor that is larger than that has a file of its own.
    """
    shards: list[list[str]] = []
    room = 0
    for key, fact in facts.items():
        if fact.nbytes > room or not shards:
            shards.append([])
            room = max_bytes
        shards[-1].append(key)
        room -= fact.nbytes
    return shards


def refuse_target(path: Path) -> None:
    """Refuse a folder that holds something already.

    Raises:
        CheckpointError: With the reason.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already and not empty; delete it or give another")


def write_folder(
    path: Path,
    facts: Mapping[str, TensorFacts],
    make: Callable[[str], Tensor],
    *,
    documents: Mapping[str, Any],
    copies: Mapping[str, Path],
    max_shard_bytes: int,
    check: Callable[[Path], None] = lambda _: None,
) -> int:
    """Write a folder and give it its name when it is whole.

    Args:
        path: The folder; not there yet, or empty.
        facts: Tensor -> shape and dtype.
        make: Makes one tensor.
        documents: Name -> what is written as JSON, config.json among them.
        copies: Name -> file that is copied.
        max_shard_bytes: Of one file of tensors.
        check: Called with what was written, before it gets its name; raises what is wrong with it.

    Returns:
        Bytes of all tensors.

    Raises:
        CheckpointError: Something is there already.
        OSError: It could not be written; nothing is left then.
    """
    refuse_target(path)
    assert CONFIG in documents, "a folder without config.json is none"
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.parent / f".{path.name}.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        total = _write_tensors(hidden, facts, make, max_shard_bytes)
        for name, content in documents.items():
            _write_json(hidden / name, content)
        for name, file in copies.items():
            shutil.copyfile(file, hidden / name)
        check(hidden)
        flush_folder(hidden)
        if path.exists():
            path.rmdir()
        os.rename(hidden, path)
        flush_folder(path.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return total


def _write_tensors(
    folder: Path, facts: Mapping[str, TensorFacts], make: Callable[[str], Tensor], most: int
) -> int:
    shards = shards_of(facts, most)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    for name, keys in zip(names, shards, strict=True):
        aligned = sorted(keys, key=lambda key: -facts[key].dtype.itemsize)
        outlines = [BlockOutline(key, facts[key].dtype, facts[key].shape) for key in aligned]
        with TensorFileWriter(folder / name, outlines) as writer:
            for key in aligned:
                writer.add(make(key))
    total = sum(fact.nbytes for fact in facts.values())
    if len(shards) > 1:
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write_json(folder / INDEX, content)
    return total


def _write_json(file: Path, content: Any) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
