"""Text that is ids already: numbers separated by spaces."""

from collections.abc import Sequence

from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer


class NullTokenizer(Tokenizer):
    """Reads ``"5 17 3"`` as ids 5, 17, 3.

    Args:
        vocab_size: Number of ids a text may use; the end of document is one more.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__("NullTokenizer", files={}, settings={"vocab_size": vocab_size})
        self._num_ids = vocab_size

    @property
    def vocab_size(self) -> int:
        """See Tokenizer.vocab_size."""
        return self._num_ids + 1

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        return self._num_ids

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.tokenize.

        Raises:
            DataError: A word is not a number, or not below the vocabulary size.
        """
        ids = []
        for word in text.split():
            # isdecimal() also takes other scripts' digits, int() reads those as well
            if not word.isdecimal() or int(word) >= self._num_ids:
                raise DataError(
                    f"NullTokenizer needs numbers from 0 to {self._num_ids - 1} "
                    f"separated by spaces, found {word[:40]!r}"
                )
            ids.append(int(word))
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)
