"""Which documents are for training, validation and test: contiguous ranges by shares."""

import math
import re
from itertools import accumulate
from typing import Literal

from megatron.core.errors import ConfigError

SplitName = Literal["train", "valid", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"


def parse_split(text: str) -> tuple[float, float, float]:
    """Return the shares of training, validation and test; they sum to 1.

    Args:
        text: One to three numbers such as ``969,30,1`` or ``98/2``; missing ones are 0.

    Raises:
        ConfigError: Not numbers, more than three, negative, or all zero.
    """
    words = [word for word in re.split(r"[,;/\s]+", text.strip()) if word]
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = []
    usable = all(math.isfinite(share) and share >= 0 for share in shares)
    if not 1 <= len(shares) <= len(SPLIT_NAMES) or not usable or sum(shares) == 0:
        raise ConfigError(
            f"--split {text!r} must be one to three shares of the documents, for training, "
            f"validation and test, none negative and not all 0, such as {DEFAULT_SPLIT}"
        )
    padded = [*shares, 0.0, 0.0][: len(SPLIT_NAMES)]
    total = sum(padded)
    train, valid, test = (share / total for share in padded)
    return train, valid, test


def split_ranges(
    shares: tuple[float, float, float], num_documents: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return (first, one past last) document of each split.

    The borders are the running sums of the shares times the number of documents, rounded half to
    even as Megatron-LM does, so that existing runs keep their documents.
    """
    borders = [round(share * float(num_documents)) for share in accumulate(shares, initial=0.0)]
    return (borders[0], borders[1]), (borders[1], borders[2]), (borders[2], borders[3])
