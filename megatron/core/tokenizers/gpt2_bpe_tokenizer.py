"""GPT-2's byte-level BPE from its two files, vocab.json and merges.txt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer, existing_file
from megatron.core.tokenizers.huggingface_tokenizer import tokenizers_package

EOD_TOKEN = "<|endoftext|>"


class GPT2BPETokenizer(Tokenizer):
    """Byte-level BPE; ``eod`` is ``<|endoftext|>``, which text never turns into.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """

    def __init__(self, vocab_file: str | Path, merge_file: str | Path) -> None:
        vocab = existing_file(vocab_file, "--vocab-file")
        merges = existing_file(merge_file, "--merge-file")
        super().__init__("GPT2BPETokenizer", files={"vocab_file": vocab, "merge_file": merges})
        ids = _read_vocab(vocab)
        pairs = _read_merges(merges, ids)
        if EOD_TOKEN not in ids:
            raise DataError(f"--vocab-file {vocab} has no end of document {EOD_TOKEN}")
        self._eod = ids[EOD_TOKEN]
        self._vocab_size = 1 + max(ids.values())
        self._model = _byte_level_bpe(tokenizers_package(self.name), ids, pairs)

    @property
    def vocab_size(self) -> int:
        """See Tokenizer.vocab_size."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.tokenize."""
        return self._model.encode_batch_fast([text])[0].ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))


def _byte_level_bpe(package: Any, ids: dict[str, int], pairs: list[tuple[str, str]]) -> Any:
    model = package.Tokenizer(package.models.BPE(vocab=ids, merges=pairs))
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = package.decoders.ByteLevel()
    return model


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"--vocab-file {path} is not JSON: {error}") from error
    numbers = content.values() if isinstance(content, dict) else [None]
    if not content or not all(isinstance(number, int) for number in numbers):
        raise DataError(f"--vocab-file {path} must map each token to its id, as vocab.json does")
    return content


def _read_merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"--merge-file {path} is not text in UTF-8: {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        words = line.rstrip("\r").split(" ")
        if len(words) != 2:
            raise DataError(f"--merge-file {path}:{number} must hold two tokens and a space")
        left, right = words
        for token in (left, right, left + right):
            if token not in ids:
                raise DataError(
                    f"--merge-file {path}:{number} uses {token!r}, which is not in --vocab-file"
                )
        pairs.append((left, right))
    return pairs
