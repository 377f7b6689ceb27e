"""A folder as Hugging Face hands models on: config.json and weights in safetensors, read by name.

One tensor, or some of its rows, at a time, mapped from the file. Nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.tensor_file import dtype_of
from megatron.core.errors import BackendError, CheckpointError
from megatron.core.models.huggingface.config_file import read_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn}
"""Formats that are read and never written."""
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass
class HfFolder:
    """An open folder. A context; files are mapped when first needed."""

    path: Path
    config: Mapping[str, Any]
    """Its config.json."""
    files: Mapping[str, Path]
    """Tensor -> file."""
    facts: Mapping[str, TensorFacts]
    """Tensor -> shape and dtype."""
    _open: dict[Path, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, path: Path) -> "HfFolder":
        """Look at every file's header.

        Raises:
            CheckpointError: What is missing, damaged, or of a kind that is not read.
            BackendError: The package safetensors is missing.
        """
        config = read_config(path)
        folder = cls(path, config, {}, {})
        named = _named_files(path)
        listed = sorted(set(named.values())) if named else _single(path)
        if missing := [file.name for file in listed if not file.is_file()]:
            raise CheckpointError(
                f"{path}: {INDEX} names files that are not there: {', '.join(missing)}"
            )
        files: dict[str, Path] = {}
        facts: dict[str, TensorFacts] = {}
        for file in listed:
            handle = folder._handle(file)
            for key in handle.keys():  # noqa: SIM118
                if key in files:
                    raise CheckpointError(f"{path}: {key} is in {files[key].name} and {file.name}")
                files[key], facts[key] = file, _facts(handle, key, file)
        wrong = [key for key in named if files.get(key) != named[key]]
        if wrong:
            raise CheckpointError(
                f"{path}: {INDEX} names tensors that are not in their files: "
                f"{_some([f'{key} ({named[key].name})' for key in wrong])}"
            )
        folder.files, folder.facts = files, facts
        return folder

    def __enter__(self) -> "HfFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a tensor, or its rows from ``rows[0]`` to before ``rows[1]``."""
        handle = self._handle(self.files[key])
        if rows is None:
            whole: Tensor = handle.get_tensor(key)
            return whole
        part: Tensor = handle.get_slice(key)[rows[0] : rows[1]]
        return part

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                from safetensors import SafetensorError, safe_open
            except ImportError as error:
                raise BackendError(
                    "files of Hugging Face need the package safetensors: "
                    "pip install 'megatron-moe[huggingface]'"
                ) from error
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is damaged or cannot be read: {error}") from error
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]


def _facts(handle: Any, key: str, file: Path) -> TensorFacts:
    part = handle.get_slice(key)
    code = part.get_dtype()
    if code in _QUANTIZED:
        return TensorFacts(tuple(part.get_shape()), _QUANTIZED[code])
    try:
        return TensorFacts(tuple(part.get_shape()), dtype_of(code))
    except ValueError as error:
        raise CheckpointError(f"{file}: {key} has numbers of kind {code}") from error


def _named_files(path: Path) -> dict[str, Path]:
    """Return tensor -> file as the index says; nothing where there is no index."""
    index = path / INDEX
    if not index.is_file():
        return {}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: path / name for key, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error


def _single(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(
            f"{path} has {len(others)} .safetensors files, and no {INDEX} says which are the model"
        )
    if any((path / name).exists() for name in _PICKLED):
        raise CheckpointError(
            f"{path} has its weights as pytorch_model.bin, a pickle, which may run any code when "
            "it is read and is not read here. The way round: save it as safetensors in a place "
            "that you trust it in, AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{path} holds no {SINGLE} and no {INDEX}")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
