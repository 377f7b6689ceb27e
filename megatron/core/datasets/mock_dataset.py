"""Documents for --mock-data: counting sequences of varying lengths, without any file."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOCK_DOCUMENTS = 100_000
MOCK_NAME = "--mock-data"
_MAX_LENGTH = 4095


def mock_lengths() -> NDArray[np.int32]:
    """Return the lengths of the mock documents, 1 to 4095 tokens, always the same."""
    rng = np.random.default_rng(0)
    return rng.integers(1, _MAX_LENGTH + 1, size=MOCK_DOCUMENTS, dtype=np.int32)


class MockDocuments:
    """Document i is 1, 2, 3, ... and an end of document; ids wrap below the vocabulary size."""

    def __init__(self, *, vocab_size: int, eod_id: int | None) -> None:
        """Prepare the longest document.

        Args:
            vocab_size: Ids stay below this; at least 2.
            eod_id: Last token of every document; the largest id when None.
        """
        assert vocab_size >= 2, f"{vocab_size=}"
        self.sequence_lengths = mock_lengths()
        self._eod_id = vocab_size - 1 if eod_id is None else eod_id
        self._counting = 1 + np.arange(_MAX_LENGTH, dtype=np.int64) % (vocab_size - 1)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.sequence_lengths)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """See ``DocumentSource.get``."""
        total = int(self.sequence_lengths[index])
        end = total if length is None else min(total, offset + length)
        tokens = self._counting[offset:end].copy()
        if offset < end == total:
            tokens[-1] = self._eod_id
        return tokens
