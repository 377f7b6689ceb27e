"""One id per byte of UTF-8: no file, no package, nothing to train."""

from collections.abc import Sequence

import numpy as np

from megatron.core.tokenizers.base import Tokenizer

NUM_BYTES = 256


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8; 256 ends a document."""

    def __init__(self) -> None:
        super().__init__("ByteTokenizer", files={})

    @property
    def vocab_size(self) -> int:
        """See Tokenizer.vocab_size."""
        return NUM_BYTES + 1

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        return NUM_BYTES

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.tokenize."""
        return list(text.encode("utf-8"))

    def tokenize_array(self, text: str) -> np.ndarray:
        """See Tokenizer.tokenize_array."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def _decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")
