"""Hugging Face ``tokenizer.json`` files, through the ``tokenizers`` package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer, existing_file, optional_package

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Looked for, in this order, where no tokenizer_config.json names the end of document.
USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, or the folder that holds one.

    Special tokens that the file's template adds (such as a begin of text) are added, as Megatron
    does; detokenize leaves special tokens out. ``eod`` is ``eos_token`` of the
    ``tokenizer_config.json`` beside the file, else the first known name among its tokens.
    """

    def __init__(self, model: str | Path) -> None:
        path = _find_file(model)
        _check_kind(path)
        super().__init__("HuggingFaceTokenizer", files={"tokenizer_model": path})
        config = path.with_name(CONFIG_FILE)
        self.beside = {"tokenizer_model": (config,)} if config.is_file() else {}
        package = tokenizers_package(self.name)
        self._model = package.Tokenizer.from_file(str(path))
        self._model.no_padding()
        self._model.no_truncation()
        self._vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
        self._eod = _find_eod(self._model, path)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.tokenize."""
        return self._model.encode_batch_fast([text])[0].ids

    def tokenize_array(self, text: str) -> np.ndarray:
        """See Tokenizer.tokenize_array."""
        return np.array(self.tokenize(text), dtype=np.int64)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)


def tokenizers_package(tokenizer: str) -> Any:
    """Return the ``tokenizers`` package.

    Raises:
        BackendError: It is not installed.
    """
    return optional_package(
        "tokenizers",
        tokenizer=tokenizer,
        install="'megatron-moe[tokenizers]'",
        instead="--tokenizer-type SentencePieceTokenizer",
    )


def _find_file(model: str | Path) -> Path:
    path = Path(model)
    if not path.is_dir():
        return existing_file(path, "--tokenizer-model")
    if not (path / TOKENIZER_FILE).is_file():
        raise DataError(f"--tokenizer-model {path} is a folder without a {TOKENIZER_FILE}")
    return path / TOKENIZER_FILE


def _check_kind(path: Path) -> None:
    """Refuse what is not a tokenizer.json: the package's own error is of no particular type."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"--tokenizer-model {path} is not a {TOKENIZER_FILE}: {error}; "
            "a .model file goes with --tokenizer-type SentencePieceTokenizer"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f'--tokenizer-model {path} is JSON, but without the "model" of a tokenizer')


def _find_eod(model: Any, path: Path) -> int:
    named = _named_eod(path.with_name(CONFIG_FILE))
    for token in [named] if named else USUAL_EOD:
        found = model.token_to_id(token)
        if found is not None:
            return int(found)
    if named:
        raise DataError(f"{path} has no token {named}, which {CONFIG_FILE} calls its eos_token")
    raise DataError(
        f"{path} has none of the usual ends of document {', '.join(USUAL_EOD)}; "
        f'put a {CONFIG_FILE} with "eos_token" beside it'
    )


def _named_eod(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    return token.get("content") if isinstance(token, dict) else token
