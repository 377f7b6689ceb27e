"""SentencePiece models (.model files), for text whose whitespace must survive.

A model trained by tools/train_tokenizer.py gives every text back exactly. A model that removes
whitespace (as SentencePiece's own training does by default) does so here too.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer, existing_file, optional_package

# SentencePiece writes a space as this character inside its pieces, so that a text which holds
# the character itself would come back with a space.
SPACE_MARK = "\u2581"
# Characters of a document that are encoded together where the cuts change nothing.
BLOCK_CHARACTERS = 128
EOD_PIECES = ("<eod>", "<EOD>")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; ``eod`` is its piece ``<eod>`` or ``<EOD>``, else ``</s>``.

    Source: Kudo and Richardson 2018 (arXiv:1808.06226).
    """

    def __init__(self, model: str | Path, name: str = "SentencePieceTokenizer") -> None:
        path = existing_file(model, "--tokenizer-model")
        super().__init__(name, files={"tokenizer_model": path})
        self._model = _load(path, name)
        self._eod = _find_eod(self._model, path)
        self._cuts_at_newlines = _merges_within_lines(self._model)
        self._mark_ids = _byte_ids_of_space_mark(self._model)

    @property
    def vocab_size(self) -> int:
        """See Tokenizer.vocab_size."""
        return self._model.get_piece_size()

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        return self._eod

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.tokenize."""
        if not self._mark_ids or SPACE_MARK not in text:
            return self._encode(text)
        first, *others = text.split(SPACE_MARK)
        ids = self._encode(first)
        for part in others:
            ids += self._mark_ids
            ids += self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        if not self._cuts_at_newlines or len(text) <= BLOCK_CHARACTERS:
            return self._model.encode(text)
        return list(chain.from_iterable(self._model.encode(list(_blocks(text)), num_threads=1)))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))


def _load(path: Path, name: str) -> Any:
    package = optional_package(
        "sentencepiece",
        tokenizer=name,
        install="sentencepiece",
        instead="--tokenizer-type ByteTokenizer",
    )
    try:
        model = package.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"--tokenizer-model {path} is not a SentencePiece model (.model file); "
            "a tokenizer.json goes with --tokenizer-type HuggingFaceTokenizer"
        ) from error
    if model.get_piece_size() == 0:
        raise DataError(f"--tokenizer-model {path} is a SentencePiece model without pieces")
    return model


def _find_eod(model: Any, path: Path) -> int:
    for piece in EOD_PIECES:
        found = model.piece_to_id(piece)
        if model.id_to_piece(found) == piece:
            return found
    if model.eos_id() < 0:
        raise DataError(
            f"--tokenizer-model {path} has neither a piece {EOD_PIECES[0]} nor an end of "
            "sentence </s>, so that documents cannot be told apart; train it with one"
        )
    return model.eos_id()


def _blocks(text: str) -> Iterator[str]:
    """Cut a text behind newlines: time and memory then grow with its length, not faster."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + BLOCK_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def _merges_within_lines(model: Any) -> bool:
    """Whether lines encoded one by one give the ids of the whole text.

    True of byte-pair models (their scores are the ranks 0, -1, -2 ...) in which no piece but the
    newline itself holds a newline, and which do nothing to the ends of a text. Unigram models add
    up scores over the whole text in fp32, so that a cut may tip a tie.
    """
    numbers = range(model.get_piece_size())
    if any(score != int(score) for score in map(model.get_score, numbers)):
        return False  # at the first pieces of a unigram model
    pieces = map(model.id_to_piece, numbers)
    crossing = any("\n" in piece and piece != "\n" for piece in pieces)
    probe = " a \n b "
    kept = model.decode(model.encode(probe)) == probe
    return not crossing and kept and not _adds_space(model)


def _byte_ids_of_space_mark(model: Any) -> list[int]:
    """Return the byte pieces that spell the space mark, or [] where splitting is not safe.

    A model that puts a space before each text would put one before each part of a split text.
    """
    pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
    ids = [model.piece_to_id(piece) for piece in pieces]
    spelled = [model.id_to_piece(found) for found in ids] == pieces
    return ids if spelled and not _adds_space(model) else []


def _adds_space(model: Any) -> bool:
    return "".join(model.encode("x", out_type=str)).startswith(SPACE_MARK)
