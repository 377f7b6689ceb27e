"""How several sources are mixed: reading --data-path, and which source gives sample number n.

Pure numpy. The order depends on the weights alone; it is computed in chunks side by side and is
exactly what the one-sample-after-another rule gives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.errors import ConfigError

BlendOrder = Literal["even", "megatron"]
_Pick = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]], NDArray[Any]]
_MAX_SOURCES = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Blend:
    """Sources of one data set."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    """Shares that sum to 1; None makes them proportional to the samples of one epoch."""


class BlendIndices(NamedTuple):
    """Which sample of which source is number n of the blend."""

    source_index: NDArray[np.int16]
    """[size]"""
    source_sample_index: NDArray[np.int64]
    """[size]: how many samples of that source come before."""


def parse_blend(values: list[str], flag: str = "--data-path") -> Blend:
    """Read ``prefix``, ``prefix prefix ...`` or ``weight prefix weight prefix ...``.

    Args:
        values: The words after the flag. A word that reads as a number is a weight (write
            ``./2024`` for a file of that name), but a single word is always a prefix.
        flag: Named in errors.

    Raises:
        ConfigError: Nothing given, weights and prefixes do not alternate, or a weight is not
            a positive number.
    """
    if not values:
        raise ConfigError(f"{flag} needs at least one prefix of preprocessed data")
    numbers = [_number(value) for value in values]
    if len(values) == 1 or all(number is None for number in numbers):
        return Blend(tuple(values), None)
    weights, prefixes = numbers[::2], values[1::2]
    alternate = len(values) % 2 == 0 and None not in weights
    if not alternate or any(number is not None for number in numbers[1::2]):
        raise ConfigError(
            f"{flag} {' '.join(values)}: give either prefixes only or weight prefix weight prefix "
            "...; a file whose name is a number is written ./NAME"
        )
    found = [weight for weight in weights if weight is not None]
    wrong = [
        f"{weight:g} {prefix}"
        for weight, prefix in zip(found, prefixes, strict=True)
        if not math.isfinite(weight) or weight <= 0
    ]
    if wrong:
        raise ConfigError(
            f"{flag}: weights must be positive numbers, not {', '.join(wrong)}; "
            "leave out a source that is not wanted"
        )
    return Blend(tuple(prefixes), normalised(found))


def normalised(weights: list[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum."""
    array = np.array(weights, dtype=np.float64)
    return tuple((array / array.sum()).tolist())


def blend_indices(
    weights: tuple[float, ...],
    size: int,
    *,
    order: BlendOrder = "even",
    num_chunks: int | None = None,
) -> BlendIndices:
    """Return which source gives each of the first ``size`` samples; longer blends begin the same.

    Order ``even``: of the sources that are behind their share at n + 1, the one whose next sample
    is due first. After every n the count of each source is within 1 of weight * n. Source:
    Balinski and Young 1975, The Quota Method of Apportionment (Amer. Math. Monthly 82).
    Order ``megatron``: the source with the largest weight * max(n, 1) - count, as Megatron-LM
    mixes; counts stay within about 2, not 1, of their share from three sources on.

    Args:
        weights: [sources], positive, sum 1.
        size: Samples of the blend.
        order: See above. Ties go to the first source.
        num_chunks: Computed side by side; changes the time, never the result.
    """
    assert 0 < len(weights) <= _MAX_SOURCES, f"{len(weights)} sources"
    if num_chunks is None:
        num_chunks = max(1, min(8192, size // 256))
    source_index = _Simulation(np.array(weights), size, order, num_chunks).run()
    # places of the samples of source 0, then of source 1, ...; a radix sort on int16
    places = np.argsort(source_index, kind="stable")
    counts = np.bincount(source_index, minlength=len(weights))
    before = np.repeat(np.cumsum(counts) - counts, counts)
    sample_index = np.empty(size, dtype=np.int64)
    sample_index[places] = np.arange(size, dtype=np.int64) - before
    return BlendIndices(source_index, sample_index)


class _Simulation:
    """Run the rule from many starting points at once.

    The counts at the start of a chunk are unknown, but the rule soon forgets where it started.
    So each chunk but the first starts some steps early from a guess; where its counts differ
    from what the chunk before ended with, it is run again from those. The rule sees only
    (n, counts), so equal counts at a border make the result exact.
    """

    def __init__(
        self, weights: NDArray[np.float64], size: int, order: BlendOrder, num_chunks: int
    ) -> None:
        self._weights = weights
        self._size = size
        self._pick = _pick_even if order == "even" else _pick_megatron
        self._steps = -(-size // num_chunks)
        self._starts = np.arange(num_chunks, dtype=np.int64) * self._steps
        self._picks = np.zeros((num_chunks, self._steps), dtype=np.int16)

    def run(self) -> NDArray[np.int16]:
        """Return the source of each sample, [size]."""
        warm = np.maximum(self._starts - min(self._steps, 128), 0)
        counts = _guess_counts(self._weights, warm, self._pick)
        for step in range(int((self._starts - warm).max(initial=0))):
            moving = np.flatnonzero(warm + step < self._starts)
            counts[moving] = self._advance(counts[moving], (warm + step)[moving])[0]
        ends = np.empty_like(counts)
        wrong = np.arange(len(counts))
        while len(wrong):
            ends[wrong] = self._run_chunks(wrong, counts[wrong])
            unequal = (ends[:-1] != counts[1:]).any(axis=1)
            wrong = np.flatnonzero(unequal) + 1
            counts[wrong] = ends[wrong - 1]
        return self._picks.reshape(-1)[: self._size]

    def _run_chunks(
        self, chunks: NDArray[np.intp], counts: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Fill the picks of these chunks and return their final counts."""
        for step in range(self._steps):
            counts, picked = self._advance(counts, self._starts[chunks] + step)
            self._picks[chunks, step] = picked
        return counts

    def _advance(
        self, counts: NDArray[np.float64], n: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        picked = self._pick(self._weights, counts, n)
        counts[np.arange(len(picked)), picked] += 1
        return counts, picked


def _pick_even(
    weights: NDArray[np.float64], counts: NDArray[np.float64], n: NDArray[np.int64]
) -> NDArray[Any]:
    due = (counts + 1) / weights
    due[counts >= weights * (n + 1)[:, None]] = np.inf
    return due.argmin(axis=1)


def _pick_megatron(
    weights: NDArray[np.float64], counts: NDArray[np.float64], n: NDArray[np.int64]
) -> NDArray[Any]:
    return (weights * np.maximum(n, 1)[:, None] - counts).argmax(axis=1)


def _guess_counts(
    weights: NDArray[np.float64], n: NDArray[np.int64], pick: _Pick
) -> NDArray[np.float64]:
    """Return whole counts, [len(n), sources], that sum to n: shares rounded down, then picks."""
    counts = np.floor(weights * n[:, None])
    while len(short := np.flatnonzero(counts.sum(axis=1) < n)):
        picked = pick(weights, counts[short], n[short] - 1)
        counts[short, picked] += 1
    return counts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
