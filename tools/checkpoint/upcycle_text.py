"""Real text for a receipt, as rows of token ids: the quickstart's corpus, or a file of the user's.

The corpus is the source of Python's standard library, which every machine has.
"""

import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer
from tools import make_stdlib_corpus

_SEED = 1234
"""Of the order of documents, as in the quickstart."""


class Rows(NamedTuple):
    """Text to compare two models on."""

    tokens: Tensor
    """[rows, length + 1], int64: each row predicts its last ``length`` tokens."""
    source: str
    """Where it is from and how it became ids, in words."""


def rows_of(
    data: Path | None, tokenizer: Tokenizer | None, vocab_size: int, *, length: int, num_tokens: int
) -> Rows:
    """Return rows of about ``num_tokens`` tokens together.

    Args:
        data: A .jsonl with ``text``, a text file, or the prefix of preprocessed .bin and .idx; the
            standard library when None.
        tokenizer: Of the checkpoint; when it has none, bytes modulo ``vocab_size`` are the ids.
        vocab_size: Ids that the model knows.
        length: Tokens of a row that are predicted.
        num_tokens: Of all rows.

    Raises:
        DataError: There is not one row of text, or ids that the model does not know.
        OSError: The file cannot be read.
    """
    needed = max(1, num_tokens // length) * (length + 1)
    if data is not None and IndexedDataset.exists(data):
        ids, how = _taken(_stored_ids(data), needed), f"{data}, as it was tokenised"
    else:
        encode, how_encoded = _encoder(tokenizer, vocab_size)
        ids = _taken((encode(text) for text in _documents(data)), needed)
        where = data or "the source text of Python's standard library"
        how = f"{where}, {how_encoded}"
    number = len(ids) // (length + 1)
    if not number:
        raise DataError(f"{how}: {len(ids)} tokens are less than one row of {length + 1}")
    tokens = torch.tensor(ids[: number * (length + 1)], dtype=torch.int64)
    if int(tokens.max()) >= vocab_size:
        raise DataError(
            f"{how}: id {int(tokens.max())} is outside of the model's {vocab_size} ids; it is of "
            "another tokenizer"
        )
    return Rows(tokens.view(number, length + 1), how)


def _encoder(
    tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[Callable[[str], list[int]], str]:
    if tokenizer is None:
        return lambda text: [byte % vocab_size for byte in text.encode()], "its bytes as ids"
    return lambda text: [*tokenizer.tokenize(text), tokenizer.eod], f"by {tokenizer.name}"


def _taken(parts: Iterator[list[int]], needed: int) -> list[int]:
    ids: list[int] = []
    for part in parts:
        ids += part
        if len(ids) >= needed:
            break
    return ids[:needed]


def _stored_ids(prefix: Path) -> Iterator[list[int]]:
    stored = IndexedDataset(prefix)
    for number in range(len(stored)):
        yield stored[number].tolist()


def _documents(data: Path | None) -> Iterator[str]:
    if data is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        documents = make_stdlib_corpus.source_files(library, with_tests=False)
        key = make_stdlib_corpus.shuffle_key
        for document in sorted(documents, key=lambda found: key(found.path, _SEED)):
            yield document.text
        return
    try:
        text = data.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"--receipt-data {data} is no UTF-8: {error}") from error
    if data.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"--receipt-data {data}, line {number} is no JSON with text") from None
