"""Which layouts are run: every level alone, every pair, triples of axes. Pure, nothing is started.

A row of a covering array holds many pairs at once, so that a few hundred pairs need some dozens of
runs. Whether a combination is legal is asked of ``judge``; what it refuses is kept with its reason.

Source: covering arrays by greedy choice, Cohen et al. 1997 (IEEE TSE 23(7), AETG).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import combinations, product
from typing import NamedTuple

from megatron.core.errors import ConfigError
from tools.layouts.axes import OWN, Axes, Level, by_name, completed

Judge = Callable[[tuple[str, ...]], list[str]]
"""Says what is wrong with a layout, given by its levels; nothing when it may run."""

TRIES = 10
"""Levels that are tried to extend a row, before it is left as it is."""


class Row(NamedTuple):
    """One layout."""

    why: str
    """``alone``, ``pair``, ``triple`` or ``chosen``."""
    levels: tuple[str, ...]
    """In the order of the axes."""
    asked: frozenset[str]
    """The levels that it is there for; the others were needed or added."""
    reasons: tuple[str, ...] = ()
    """Why it is refused; empty when it may run."""

    @property
    def name(self) -> str:
        """As it is shown."""
        return " ".join(self.levels)


def full_matrix(axes: Axes, judge: Judge) -> list[Row]:
    """Return all rows: those of ``alone``, then what pairs and triples need beyond them."""
    rows = alone(axes, judge)
    rows += _cover("pair", list(pairs(axes)), rows, axes, judge)
    rows += _cover("triple", list(triples(axes)), rows, axes, judge)
    return rows


def alone(axes: Axes, judge: Judge) -> list[Row]:
    """Return a row for every level, with what it needs."""
    return [_row("alone", (name,), axes, judge) for name in by_name(axes)]


def chosen(layouts: Iterable[str], axes: Axes, judge: Judge) -> list[Row]:
    """Return rows of named levels, separated by spaces.

    Raises:
        ConfigError: A name is unknown, or two are of one axis.
    """
    rows = [tuple(names.split()) for names in layouts]
    ConfigError.raise_if_any(problem for names in rows for problem in _misnamed(names, axes))
    return [_row("chosen", names, axes, judge) for names in rows]


def pairs(axes: Axes) -> Iterator[frozenset[str]]:
    """Yield every two levels of different axes."""
    for one, other in combinations(_that_mix(axes), 2):
        yield from (frozenset((a.name, b.name)) for a, b in product(one, other))


def triples(axes: Axes) -> Iterator[frozenset[str]]:
    """Yield the first levels of every three axes."""
    for three in combinations(_that_mix(axes), 3):
        yield frozenset(levels[0].name for levels in three)


def _that_mix(axes: Axes) -> list[tuple[Level, ...]]:
    return [levels for axis, levels in axes.items() if axis != OWN]


def _misnamed(names: Collection[str], axes: Axes) -> Iterator[str]:
    levels = by_name(axes)
    for name in names:
        if name not in levels:
            yield f"--layout: there is no {name}; names are {' '.join(levels)}"
    of_axis: dict[str, str] = {}
    for name in filter(levels.__contains__, names):
        other = of_axis.setdefault(levels[name].axis, name)
        if other != name:
            yield f"--layout: {other} and {name} exclude each other; leave one out"


def _row(why: str, names: Collection[str], axes: Axes, judge: Judge) -> Row:
    levels = completed(names, axes)
    return Row(why, levels, frozenset(names), tuple(judge(levels)))


def _cover(
    why: str, targets: list[frozenset[str]], rows: list[Row], axes: Axes, judge: Judge
) -> list[Row]:
    """Return rows that hold every target which ``rows`` do not, and those that are refused."""
    done = [set(row.levels) for row in rows if not row.reasons]
    refused = [row.asked for row in rows if row.reasons]
    left = [target for target in targets if not any(target <= levels for levels in done)]
    found: list[Row] = []
    while left:
        target = left.pop(0)
        row = _row(why, target, axes, judge)
        if row.reasons:
            if not any(asked <= target for asked in refused):
                refused.append(target)
                found.append(row)
            continue
        row = _extended(row, left, axes, judge)
        left = [other for other in left if not other <= set(row.levels)]
        found.append(row)
    return found


def _extended(row: Row, left: list[frozenset[str]], axes: Axes, judge: Judge) -> Row:
    """Add levels for as long as that covers more of ``left`` and is legal."""
    levels, tries = by_name(axes), TRIES
    wrong: set[str] = set()
    while tries:
        taken = {levels[name].axis for name in row.levels}
        gains: dict[str, int] = {}
        for target in left:
            missing = target - set(row.levels)
            if len(missing) == 1:
                (name,) = missing
                if levels[name].axis not in taken and name not in wrong:
                    gains[name] = gains.get(name, 0) + 1
        if not gains:
            return row
        best = max(gains, key=lambda name: gains[name])
        longer = _row(row.why, (*row.levels, best), axes, judge)
        if longer.reasons:
            wrong.add(best)
            tries -= 1
        else:
            row = longer._replace(asked=row.asked)
    return row
