"""What every tokenizer offers, and the errors they share.

Tokenizers turn text into ids and back; they know nothing of files of tokens or of training.
No module of this package imports torch, and optional packages are imported only when used.
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron.core.errors import BackendError, DataError


class Tokenizer(ABC):
    """Text to ids and back.

    Law: ``detokenize(tokenize(text)) == text`` for every text when the vocabulary covers all
    bytes. Ids lie in ``range(vocab_size)``. Text never turns into ``eod``: whoever writes
    documents appends it.

    Attributes:
        name: The ``--tokenizer-type`` that builds it.
        files: Flag name (``tokenizer_model``, ``vocab_file``, ``merge_file``) to the file it read.
        settings: Options besides files that change the ids, by flag name; plain JSON values.
        beside: Flag name to files that are read because they lie beside the file of that flag.
    """

    def __init__(
        self, name: str, files: Mapping[str, Path], settings: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.files = dict(files)
        self.settings = dict(settings or {})
        self.beside: dict[str, tuple[Path, ...]] = {}

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, the end of document included."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends a document."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without the end of document."""

    def tokenize_array(self, text: str) -> np.ndarray:
        """Return ``tokenize(text)`` as an integer array [tokens]."""
        ids = self.tokenize(text)
        return np.fromiter(ids, dtype=np.int64, count=len(ids))

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; ends of document are left out, broken UTF-8 becomes U+FFFD.

        Raises:
            DataError: An id is not in the vocabulary.
        """
        wanted = [int(token) for token in ids]
        for token in wanted:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"id {token} is not in the vocabulary of {self.name}, "
                    f"which has {self.vocab_size} ids"
                )
        return self._decode([token for token in wanted if token != self.eod])

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str:
        """Return the text of valid ids."""

    def fingerprint(self) -> str:
        """Return a hash of all that decides the ids: kind, files' contents, settings."""
        digest = hashlib.sha256()
        kind = type(self).__name__
        digest.update(
            f"{kind} {self.vocab_size} {self.eod} {sorted(self.settings.items())}".encode()
        )
        for role in sorted(self.files):
            digest.update(f" {role} {sha256_of(self.files[role])}".encode())
        return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_file(path: str | Path, flag: str) -> Path:
    """Return ``path`` if it is a readable, non-empty file.

    Raises:
        DataError: There is no such file, it is a folder, or it is empty; names ``flag``.
    """
    found = Path(path)
    if found.is_dir():
        raise DataError(f"{flag} {path} is a folder, a file is needed")
    if not found.is_file():
        raise DataError(f"{flag} {path} does not exist")
    if found.stat().st_size == 0:
        raise DataError(f"{flag} {path} is an empty file")
    return found


def optional_package(package: str, *, tokenizer: str, install: str, instead: str) -> ModuleType:
    """Import ``package``.

    Raises:
        BackendError: It is not installed; says what to install and what to use instead.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BackendError(
            f"--tokenizer-type {tokenizer} needs the package {package}, which cannot be imported "
            f"({error}): pip install {install}, or use {instead}"
        ) from error
