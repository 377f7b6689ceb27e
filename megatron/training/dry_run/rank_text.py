"""Lists of ranks in few words: ``0-63, 128-191`` or ``0, 2, ... 14``. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise


def ranges(numbers: Iterable[int], most: int = 4) -> str:
    """Write sorted numbers as runs: ``0-3, 8-11``; behind ``most`` runs ``... (n in all)``."""
    ordered = sorted(set(numbers))
    runs = [f"{a}-{b}" if a != b else str(a) for a, b in _runs(ordered)]
    if len(runs) <= most:
        return ", ".join(runs)
    step = _step(ordered)
    if step is not None:
        return f"{ordered[0]}, {ordered[1]}, ... {ordered[-1]} ({len(ordered)}, every {step})"
    return f"{', '.join(runs[:most])}, ... ({len(ordered)} in all)"


def group_text(ranks: Sequence[int]) -> str:
    """Write the ranks of one group in their order: ``0 1 2 3`` or ``0 2 4 ... 126``."""
    if len(ranks) <= 8:
        return " ".join(map(str, ranks))
    return f"{' '.join(map(str, ranks[:3]))} ... {ranks[-1]}"


def _runs(ordered: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = last = None
    for number in ordered:
        if last is not None and number == last + 1:
            last = number
            continue
        if start is not None and last is not None:
            yield start, last
        start = last = number
    if start is not None and last is not None:
        yield start, last


def _step(ordered: Sequence[int]) -> int | None:
    steps = {b - a for a, b in pairwise(ordered)}
    return steps.pop() if len(steps) == 1 else None
