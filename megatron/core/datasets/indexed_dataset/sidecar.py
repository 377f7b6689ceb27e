"""What preprocessing notes beside the data: ``{prefix}.json``.

It lets training find the tokenizer again and refuse another one. Datasets without a sidecar
(written by Megatron-LM) are fine; then the user names the tokenizer.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer, sha256_of
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """Where a file of the tokenizer was."""

    relative: str
    """Path from the folder of the sidecar."""

    absolute: str
    """Path on the machine that preprocessed."""

    sha256: str
    """Hash of its content, in hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """How the ids of a dataset came about."""

    tokenizer_type: str
    """A --tokenizer-type."""

    tokenizer_files: dict[str, TokenizerFile] = field(default_factory=dict)
    """Option (tokenizer_model, vocab_file, merge_file) to file."""

    tokenizer_settings: dict[str, Any] = field(default_factory=dict)
    """Further options that change the ids."""

    fingerprint: str
    """Tokenizer.fingerprint()."""

    vocab_size: int
    """Number of ids."""

    eod_id: int
    """Id that ends a document."""

    append_eod: bool
    """Whether each document ends with it."""

    documents: int
    """Number of documents."""

    sequences: int
    """Number of sequences."""

    tokens: int
    """Number of tokens."""

    dtype: str
    """Of the tokens, by numpy's name."""

    json_key: str | None
    """Key of the input records that held the text."""

    format_version: int = FORMAT_VERSION
    """Version of this file."""


def sidecar_path(prefix: str | Path) -> Path:
    """Return the sidecar of the dataset at ``prefix``."""
    return Path(f"{prefix}.json")


def describe_tokenizer(prefix: str | Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the fields of a sidecar at ``prefix`` that tell of the tokenizer."""
    folder = sidecar_path(prefix).resolve().parent
    files = {}
    for role, path in tokenizer.files.items():
        absolute = path.resolve()
        files[role] = TokenizerFile(
            relative=os.path.relpath(absolute, folder),
            absolute=str(absolute),
            sha256=sha256_of(absolute),
        )
    return {
        "tokenizer_type": tokenizer.name,
        "tokenizer_files": files,
        "tokenizer_settings": tokenizer.settings,
        "fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod,
    }


def write_sidecar(prefix: str | Path, sidecar: Sidecar) -> Path:
    """Write ``{prefix}.json``; it appears complete or not at all."""
    path = sidecar_path(prefix)
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """Return the sidecar of the dataset at ``prefix``; None if there is none.

    Raises:
        DataError: It is damaged, or of another version.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        files = {k: TokenizerFile(**v) for k, v in content.pop("tokenizer_files").items()}
        if version == FORMAT_VERSION:
            return Sidecar(**content, tokenizer_files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not the sidecar of a dataset ({error!r}); "
            "preprocess again, or remove it and name the tokenizer with --tokenizer-type"
        ) from error
    raise DataError(f"{path} is of version {version}; this program reads version {FORMAT_VERSION}")


def tokenizer_settings(prefix: str | Path, sidecar: Sidecar) -> TokenizerSettings:
    """Return the options that build the tokenizer of a dataset again.

    Raises:
        DataError: A file of the tokenizer is gone or has changed; names all places and hashes.
    """
    folder = sidecar_path(prefix).resolve().parent
    options: dict[str, Any] = {"tokenizer_type": sidecar.tokenizer_type}
    for role, file in sidecar.tokenizer_files.items():
        options[role] = _find_file(folder, role, file)
    return TokenizerSettings(**options, **sidecar.tokenizer_settings)


def check_tokenizer(prefix: str | Path, sidecar: Sidecar, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that did not make the data.

    Raises:
        DataError: It gives other ids; names both.
    """
    now, then = tokenizer.fingerprint(), sidecar.fingerprint
    if now == then:
        return
    made_by = [sidecar.tokenizer_type, *(f.absolute for f in sidecar.tokenizer_files.values())]
    given = [tokenizer.name, *(str(path) for path in tokenizer.files.values())]
    raise DataError(
        f"{sidecar_path(prefix)}: the data was made with {' '.join(made_by)} "
        f"({sidecar.vocab_size} ids, eod {sidecar.eod_id}, "
        f"fingerprint {then[:12]}), not with {' '.join(given)} "
        f"({tokenizer.vocab_size} ids, eod {tokenizer.eod}, "
        f"fingerprint {now[:12]}); leave the tokenizer flags out to use the first"
    )


def check_ids(prefix: str | Path, first_document: int, ids: np.ndarray, vocab_size: int) -> None:
    """Refuse an id that the embedding does not have.

    Raises:
        DataError: An id is negative or not below ``vocab_size``; names dataset and document.
    """
    if len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        wrong = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise DataError(
            f"{prefix}: document {first_document} holds the id {wrong}, but the vocabulary "
            f"has {vocab_size} ids; the data was made with another tokenizer"
        )


def _find_file(folder: Path, role: str, file: TokenizerFile) -> str:
    places = [folder / file.relative, Path(file.absolute)]
    flag = "--" + role.replace("_", "-")
    hashes = {place: sha256_of(place) for place in places if place.is_file()}
    for place, found in hashes.items():
        if found == file.sha256:
            return str(place)
    if hashes:
        place, found = next(iter(hashes.items()))
        raise DataError(
            f"{place} has changed since the data was preprocessed with it: "
            f"sha256 {found[:12]} now, {file.sha256[:12]} then; "
            "put the old file back or preprocess again"
        )
    raise DataError(
        f"the tokenizer of the data is gone; looked for {places[0]} and {places[1]}; "
        f"name it with {flag}"
    )


def moved_file(file: TokenizerFile, source: str | Path, target: str | Path) -> TokenizerFile:
    """Return ``file`` of the sidecar at prefix ``source`` as seen from the prefix ``target``."""
    folder = sidecar_path(source).resolve().parent
    place = os.path.normpath(folder / file.relative)
    relative = os.path.relpath(place, sidecar_path(target).resolve().parent)
    return dataclasses.replace(file, relative=relative)
