"""The sample index, token by token: slow and obvious."""

from fractions import Fraction

import numpy as np


def sample_index(lengths: list[int], document_index: list[int], seq_length: int) -> list[list[int]]:
    """Write down where every token of the stream is; take every ``seq_length``-th."""
    stream = [
        [place, offset]
        for place, document in enumerate(document_index)
        for offset in range(lengths[document])
    ]
    return [where for number, where in enumerate(stream) if number % seq_length == 0]


def epochs(tokens_per_epoch: int, seq_length: int, num_samples: int) -> tuple[int, bool]:
    """Return the epochs needed, and whether the last one is shuffled apart."""
    num_epochs = 1
    while num_epochs * tokens_per_epoch < num_samples * seq_length + 1:
        num_epochs += 1
    if num_epochs == 1:
        return 1, False
    before = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    whole = (tokens_per_epoch - 1) // seq_length
    return num_epochs, num_samples - before < int(0.80 * whole)


def shuffled_documents(
    documents: list[int], num_epochs: int, separate: bool, rng: np.random.RandomState
) -> list[int]:
    """Shuffle all epochs at once, or the last one after the others."""
    if not separate:
        order = np.array(documents * num_epochs)
        rng.shuffle(order)
        return order.tolist()
    head = shuffled_documents(documents, num_epochs - 1, False, rng)
    return head + shuffled_documents(documents, 1, False, rng)


def even_blend(weights: list[float], size: int) -> list[int]:
    """Of the sources behind their share at n + 1, pick the one due first."""
    counts, picks = [0] * len(weights), []
    for n in range(size):
        behind = [d for d, w in enumerate(weights) if counts[d] < w * (n + 1)]
        picks.append(min(behind, key=lambda d: (counts[d] + 1) / weights[d]))
        counts[picks[-1]] += 1
    return picks


def megatron_blend(weights: list[float], size: int) -> list[int]:
    """Pick the source with the largest weight * max(n, 1) - count."""
    counts, picks = [0] * len(weights), []
    for n in range(size):
        errors = [w * max(n, 1) - c for w, c in zip(weights, counts, strict=True)]
        picks.append(errors.index(max(errors)))
        counts[picks[-1]] += 1
    return picks


def worst_distance(weights: list[float], picks: list[int]) -> Fraction:
    """Return the largest abs(count - weight * n) over all prefixes and sources, exactly."""
    shares = [Fraction(weight) for weight in weights]
    total = sum(shares)
    shares = [share / total for share in shares]
    counts, worst = [0] * len(weights), Fraction(0)
    for n, pick in enumerate(picks, start=1):
        counts[pick] += 1
        worst = max(worst, *(abs(c - s * n) for c, s in zip(counts, shares, strict=True)))
    return worst
