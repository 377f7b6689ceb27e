"""Byte-pair vocabularies of the tiktoken package: JSON lists (Tekken) and ``.tiktoken`` files.

In a JSON vocabulary the special tokens come first (ids 0 to 999 by default), as in Megatron; in
a ``.tiktoken`` file ids are the ranks of the file and the end of document is one more.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.errors import ConfigError, DataError
from megatron.core.tokenizers.base import Tokenizer, existing_file, optional_package

DEFAULT_VOCAB_SIZE = 2**17
NAMED_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
EOD_OF_JSON = "</s>"
EOD_OF_RANKS = "<|endoftext|>"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s+(?!\S)|\s+"
# How text is cut before merging: v1 and v2 belong to Tekken vocabularies, cl100k to OpenAI's and
# Llama 3's. A vocabulary gives its published ids only with its own pattern.
PATTERNS = {
    "v1": rf"{_LEAD}+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|{_SPACES}",
    "v2": rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}",
    "cl100k": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
}


class _Vocabulary(NamedTuple):
    ranks: dict[bytes, int]
    special: dict[str, int]
    eod: int
    default_pattern: str


class TikTokenizer(Tokenizer):
    """A tiktoken vocabulary.

    Args:
        model: A JSON list of ``{"rank", "token_bytes" (base64), ...}``, or a ``.tiktoken`` file
            with a base64 token and its rank in each line.
        vocab_size: Ids in all; a longer JSON vocabulary is cut, 131072 when not given.
        pattern: ``v1``, ``v2`` or ``cl100k``; v2 for JSON and cl100k for ``.tiktoken`` if None.
        num_special_tokens: Ids kept free in front of a JSON vocabulary.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        vocab_size: int | None = None,
        pattern: str | None = None,
        num_special_tokens: int = 1000,
    ) -> None:
        path = existing_file(model, "--tokenizer-model")
        vocabulary = _read(path, vocab_size, num_special_tokens)
        pattern = pattern or vocabulary.default_pattern
        settings = {
            "vocab_size": len(vocabulary.ranks) + len(vocabulary.special),
            "tiktoken_pattern": pattern,
            "tiktoken_num_special_tokens": num_special_tokens,
        }
        super().__init__("TikTokenizer", files={"tokenizer_model": path}, settings=settings)
        package = optional_package(
            "tiktoken",
            tokenizer=self.name,
            install="'megatron-moe[tiktoken]'",
            instead="--tokenizer-type SentencePieceTokenizer",
        )
        self._vocabulary = vocabulary
        self._model: Any = package.Encoding(
            name=path.stem,
            pat_str=PATTERNS[pattern],
            mergeable_ranks=vocabulary.ranks,
            special_tokens=vocabulary.special,
        )

    @property
    def vocab_size(self) -> int:
        """See Tokenizer.vocab_size."""
        return len(self._vocabulary.ranks) + len(self._vocabulary.special)

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        return self._vocabulary.eod

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.tokenize."""
        return self._model.encode_ordinary(text)

    def _decode(self, ids: Sequence[int]) -> str:
        special = set(self._vocabulary.special.values())
        return self._model.decode([token for token in ids if token not in special])


def _read(path: Path, vocab_size: int | None, num_special_tokens: int) -> _Vocabulary:
    content = path.read_bytes()
    if content.lstrip()[:1] in (b"[", b"{"):
        return _from_json(path, content, vocab_size or DEFAULT_VOCAB_SIZE, num_special_tokens)
    return _from_ranks(path, content, vocab_size)


def _from_json(path: Path, content: bytes, vocab_size: int, num_special: int) -> _Vocabulary:
    if not len(NAMED_SPECIAL_TOKENS) <= num_special < vocab_size:
        raise ConfigError(
            f"--tiktoken-num-special-tokens {num_special} must lie between "
            f"{len(NAMED_SPECIAL_TOKENS)} and --vocab-size {vocab_size}"
        )
    try:
        entries = json.loads(content)
        entries = entries["vocab"] if isinstance(entries, dict) else entries
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in entries]
        in_order = [entry["rank"] for entry in entries] == list(range(len(entries)))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--tokenizer-model {path} is not a tiktoken vocabulary: {error!r}"
        ) from error
    tokens = tokens[: vocab_size - num_special]
    ranks = {token: num_special + rank for rank, token in enumerate(tokens)}
    _check_ranks(path, ranks, len(tokens), in_order)
    filler = [f"<SPECIAL_{n}>" for n in range(len(NAMED_SPECIAL_TOKENS), num_special)]
    special = {token: n for n, token in enumerate([*NAMED_SPECIAL_TOKENS, *filler])}
    return _Vocabulary(ranks, special, special[EOD_OF_JSON], "v2")


def _from_ranks(path: Path, content: bytes, vocab_size: int | None) -> _Vocabulary:
    ranks: dict[bytes, int] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"--tokenizer-model {path}:{number} must hold a base64 token and its rank, "
                "as .tiktoken files do; or give the JSON list of a Tekken vocabulary"
            ) from error
    in_order = sorted(ranks.values()) == list(range(len(ranks)))
    _check_ranks(path, ranks, len(ranks), in_order)
    if vocab_size not in (None, len(ranks) + 1):
        raise DataError(
            f"--vocab-size {vocab_size} is not the {len(ranks) + 1} ids of {path}; "
            "leave --vocab-size out"
        )
    return _Vocabulary(ranks, {EOD_OF_RANKS: len(ranks)}, len(ranks), "cl100k")


def _check_ranks(path: Path, ranks: dict[bytes, int], count: int, in_order: bool) -> None:
    if not in_order or len(ranks) != count:
        raise DataError(f"--tokenizer-model {path}: ranks must be 0, 1, 2 ... with distinct tokens")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"--tokenizer-model {path} lacks the single byte {missing[0]}")
