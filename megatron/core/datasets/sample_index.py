"""Which tokens make sample i: the document, sample and shuffle index, in vectorised numpy.

Pure plans: no files, no torch. The arrays are those of Megatron-LM for the same seed and lengths,
so the order of calls on the one ``RandomState`` is part of the contract.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A last epoch that gives fewer than this share of an epoch's samples is shuffled apart.
SEPARATE_LAST_EPOCH_BELOW = 0.80


class EpochPlan(NamedTuple):
    """How often the documents are read, and whether the last time is shuffled apart."""

    num_epochs: int
    separate_last_epoch: bool


class SampleIndices(NamedTuple):
    """The three arrays that say which tokens make sample i."""

    document_index: NDArray[np.integer]
    """[num_epochs * documents]: document numbers in the order in which they are read."""
    sample_index: NDArray[np.integer]
    """[num_samples + 1, 2]: (place in document_index, offset in tokens) where a sample starts;
    sample j ends with the first token of sample j + 1."""
    shuffle_index: NDArray[np.integer]
    """[num_samples]: sample i of the data set is row shuffle_index[i] of sample_index."""


def count_samples(num_tokens: int, seq_length: int) -> int:
    """Return how many whole samples of ``seq_length + 1`` tokens, overlapping by one, there are."""
    return max(0, (num_tokens - 1) // seq_length)


def plan_epochs(tokens_per_epoch: int, seq_length: int, num_samples: int | None) -> EpochPlan:
    """Return how many epochs ``num_samples`` need; one epoch when that is None.

    Args:
        tokens_per_epoch: Tokens of all documents together, at least 1.
        seq_length: Tokens of one sample.
        num_samples: Samples that are asked for.
    """
    assert tokens_per_epoch > 0, f"no tokens, {tokens_per_epoch=}"
    if num_samples is None:
        return EpochPlan(1, False)
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    if num_epochs == 1:
        return EpochPlan(1, False)
    before_last = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    from_last = num_samples - before_last
    return EpochPlan(num_epochs, from_last < int(SEPARATE_LAST_EPOCH_BELOW * per_epoch))


def build_sample_indices(
    lengths: NDArray[np.integer],
    documents: tuple[int, int],
    *,
    seq_length: int,
    plan: EpochPlan,
    seed: int,
) -> SampleIndices:
    """Build the arrays of one split.

    Args:
        lengths: [all documents] tokens of each document of the file.
        documents: First and one past last document of the split.
        seq_length: Tokens of one sample.
        plan: From ``plan_epochs``.
        seed: Seed of ``numpy.random.RandomState``.
    """
    rng = np.random.RandomState(seed)
    first, last = documents
    document_index = _document_index(first, last, plan, rng)
    sample_index = _sample_index(lengths, document_index, seq_length)
    num_samples = len(sample_index) - 1
    shuffled_first = num_samples
    if plan.separate_last_epoch:
        tokens_per_epoch = int(lengths[first:last].sum(dtype=np.int64))
        shuffled_first = count_samples((plan.num_epochs - 1) * tokens_per_epoch, seq_length)
    return SampleIndices(
        document_index, sample_index, _shuffle_index(shuffled_first, num_samples, rng)
    )


def _document_index(
    first: int, last: int, plan: EpochPlan, rng: np.random.RandomState
) -> NDArray[np.integer]:
    """Shuffle all epochs together, or the last one apart."""
    dtype = np.int32 if last <= np.iinfo(np.int32).max else np.int64
    one_epoch = np.arange(first, last, dtype=dtype)
    together = plan.num_epochs - plan.separate_last_epoch
    parts = [np.tile(one_epoch, together)]
    if plan.separate_last_epoch:
        parts.append(one_epoch)
    for part in parts:
        rng.shuffle(part)
    return np.concatenate(parts)


def _sample_index(
    lengths: NDArray[np.integer], document_index: NDArray[np.integer], seq_length: int
) -> NDArray[np.integer]:
    """Find the document and offset of every ``seq_length``-th token of the shuffled stream."""
    read = np.asarray(lengths)[document_index]
    ends = np.cumsum(read, dtype=np.int64)  # stream position after each document read
    num_samples = count_samples(int(ends[-1]), seq_length)
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    # 'right' skips documents without tokens and puts a border into the document it opens
    place = np.searchsorted(ends, starts, side="right")
    offset = starts - (ends[place] - read[place])
    largest = max(len(document_index), int(read.max()))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    return np.stack([place, offset], axis=1).astype(dtype)


def _shuffle_index(first: int, total: int, rng: np.random.RandomState) -> NDArray[np.integer]:
    """Shuffle samples [0, first) and [first, total) each within itself."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    order: NDArray[np.integer] = np.arange(total, dtype=dtype)
    rng.shuffle(order[:first])
    if first < total:
        rng.shuffle(order[first:])
    return order
