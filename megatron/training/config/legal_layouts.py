"""The legal layouts nearest to the one that was asked for: a pure search.

It knows only how sizes tile a number of ranks. Whether a layout is legal says the function that is
handed in, which asks the rules that judge the user's own flags: there is no second set of rules.
Near means: few sizes changed, then by a small factor (the product over the sizes).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice, product
from typing import Any, NamedTuple

from megatron.training.config.checks import divisors

MOST_SHOWN = 3
MOST_JUDGED = 400
"""Layouts that are judged at most; a judgement takes about half a millisecond."""
# values of each size that are tried where so many sizes change at once: the nearest ones
_MOST_VALUES = {1: 1000, 2: 24, 3: 8, 4: 6, 5: 6}
_MOST_WORLDS = 8


OPTION_OF_AXIS = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


class Layout(NamedTuple):
    """Sizes of the parallel axes over ``world_size`` ranks; what is left over is data-parallel."""

    world_size: int
    tp: int
    cp: int
    pp: int
    ep: int
    etp: int | None
    """None: follows ``tp``."""
    is_balanced: bool = False
    """Layers go to the stages by ``--pipeline-model-parallel-layout auto``, asked for or not."""

    def options(self) -> dict[str, int | str | None]:
        """Return what a user would give, by the name of the option."""
        sizes = {name: getattr(self, axis) for axis, name in OPTION_OF_AXIS.items()}
        return sizes | ({"pipeline_model_parallel_layout": "auto"} if self.is_balanced else {})

    @property
    def grids(self) -> tuple[int, int]:
        """Ranks that hold one copy of the dense weights, and of the experts."""
        etp = self.tp if self.etp is None else self.etp
        return self.tp * self.cp * self.pp, self.ep * etp * self.pp

    def is_tiling(self) -> bool:
        """Return whether both grids fill the world with whole copies."""
        return not any(self.world_size % grid for grid in self.grids)


Judge = Callable[[Layout], Iterable[str]]
"""Names the problems of a run that has this layout and the user's other options."""


class Neighbours(NamedTuple):
    """What a search found."""

    layouts: tuple[Layout, ...]
    """The nearest legal ones, nearest first."""
    other_world: int | None
    """Number of ranks on which the layout is legal as it was asked for."""
    helps_to_balance: bool
    """As asked for, but with layers balanced over the stages, the layout is legal."""
    was_exhaustive: bool
    """Every tiling of the ranks was judged."""
    remaining: bool
    """There are problems that every layout has: none of them is the layout's."""


def advice(
    asked: Layout, problems: Iterable[str], judge: Judge, *, has_experts: bool
) -> str | None:
    """Say in one line what would be legal; see ``find_neighbours``. None if that mends nothing."""
    said = frozenset(problems)
    if not said and _is_usable(asked):
        return None
    found = find_neighbours(asked, said, judge, has_experts=has_experts)
    return None if found is None else sentence(asked, found)


def find_neighbours(
    asked: Layout, problems: Iterable[str], judge: Judge, *, has_experts: bool
) -> Neighbours | None:
    """Search for the legal layouts that are nearest to ``asked``.

    Legal is what has no problems but those that every layout has. Sentences that differ in their
    numbers only are one problem: derived batch sizes, say, move with the layout.

    Args:
        asked: The user's sizes, those below 1 included.
        problems: What is wrong with the run as it was asked for.
        judge: See ``Judge``.
        has_experts: There are MoE layers; else no expert is spread over ranks.

    Returns:
        None where nothing that was tried would mend a problem.
    """
    wrong = _kinds(problems)
    order = _by_distance(asked, has_experts)
    judged = [(layout, _kinds(judge(layout))) for layout in islice(order, MOST_JUDGED)]
    remaining = wrong.intersection(*(found for _, found in judged))
    helps = remaining < wrong or not _is_usable(asked)

    def is_legal(layout: Layout) -> bool:
        found = _kinds(judge(layout))
        return found <= remaining and (helps or found < remaining)

    worlds = _other_worlds(asked)
    found = Neighbours(
        layouts=tuple([at for at, kinds in judged if helps and kinds == remaining][:MOST_SHOWN]),
        other_world=next((n for n in worlds if is_legal(asked._replace(world_size=n))), None),
        helps_to_balance=_is_usable(asked) and is_legal(asked._replace(is_balanced=True)),
        was_exhaustive=len(divisors(asked.world_size)) <= _MOST_VALUES[5]
        and next(order, None) is None,
        remaining=helps and bool(remaining),
    )
    return found if found.layouts or found.other_world or found.helps_to_balance else None


def _kinds(problems: Iterable[str]) -> frozenset[str]:
    """Return the sentences without their numbers."""
    return frozenset(re.sub(r"\d+(\.\d+)?", "#", problem) for problem in problems)


def tilings(asked: Layout, *, has_experts: bool) -> Iterator[Layout]:
    """Yield every layout on the asked number of ranks, legal or not, nearest to ``asked`` first."""
    return _by_distance(asked, has_experts)


def sentence(asked: Layout, found: Neighbours) -> str:
    """Say it in one line: ``nearest legal layouts on 8 ranks: EP 4 ETP 2 DP 8; ...``."""
    ranks = f"{asked.world_size} rank{'s' if asked.world_size > 1 else ''}"
    after = ", once the other problems are mended" if found.remaining else ""
    others = []
    if found.helps_to_balance:
        others.append("as asked with --pipeline-model-parallel-layout auto")
    if found.other_world is not None:
        others.append(f"as asked on {found.other_world} ranks")
    if found.layouts:
        shown = "; ".join(layout_text(layout, asked) for layout in found.layouts)
        return "; or ".join([f"nearest legal layouts on {ranks}{after}: {shown}", *others])
    near = "" if found.was_exhaustive else " near this one"
    return (
        f"no sizes on {ranks}{near} are legal with the other flags; legal: {', or '.join(others)}"
    )


def layout_text(layout: Layout, asked: Layout) -> str:
    """Write a layout: what is larger than 1, what is not as ``asked``, and the data ranks."""
    sizes, wanted = layout._asdict(), asked._asdict()
    words = [
        f"{axis.upper()} {sizes[axis]}"
        for axis in OPTION_OF_AXIS
        if sizes[axis] is not None and (sizes[axis] > 1 or sizes[axis] != wanted[axis])
    ]
    if asked.etp is not None and layout.etp is None:
        words.append("without ETP")
    return " ".join([*words, f"DP {layout.world_size // layout.grids[0]}"])


def _by_distance(asked: Layout, has_experts: bool) -> Iterator[Layout]:
    """Yield every tiling of the asked number of ranks, nearest first, each once."""
    whole = divisors(asked.world_size)
    values: dict[str, Sequence[int | None]] = dict.fromkeys(OPTION_OF_AXIS, whole)
    if not has_experts:
        values |= {"ep": [1], "etp": [None]}
    for count in range(len(values) + 1):
        tier = []
        for axes in combinations(values, count):
            choices = [_changes(asked, axis, values[axis], count) for axis in axes]
            for chosen in product(*choices):
                changed: dict[str, Any] = dict(zip(axes, chosen, strict=True))
                layout = asked._replace(**changed)
                if _is_usable(layout) and layout.is_tiling() and not _says_twice(layout, asked):
                    tier.append(layout)
        yield from sorted(tier, key=lambda layout: (_factor(layout, asked), layout.grids, layout))


def _changes(
    asked: Layout, axis: str, values: Sequence[int | None], count: int
) -> list[int | None]:
    """List what a size may become that is not what was asked; less, where many change at once."""
    wanted = getattr(asked, axis)
    others = [value for value in values if value != wanted]
    others.sort(key=lambda value: _ratio(value or 1, wanted or 1))
    return others[: _MOST_VALUES[count]]


def _is_usable(layout: Layout) -> bool:
    return all((size := getattr(layout, axis)) is None or size >= 1 for axis in OPTION_OF_AXIS)


def _says_twice(layout: Layout, asked: Layout) -> bool:
    """Whether ETP is named although it was not and would follow TP to the same size."""
    return asked.etp is None and layout.etp == layout.tp


def _factor(layout: Layout, asked: Layout) -> float:
    """Return by how much all sizes differ; a size below 1 counts as 1, and ETP as TP if absent."""
    pairs = [(layout.tp, asked.tp), (layout.cp, asked.cp), (layout.pp, asked.pp)]
    pairs.append((layout.ep, asked.ep))
    if layout.etp is not None:
        pairs.append((layout.etp, asked.tp if asked.etp is None else asked.etp))
    return math.prod(_ratio(*pair) for pair in pairs)


def _ratio(one: int, other: int) -> float:
    low, high = sorted((max(one, 1), max(other, 1)))
    return high / low


def _other_worlds(asked: Layout) -> list[int]:
    """List the numbers of ranks that the asked sizes tile, nearest to the number there is."""
    if not _is_usable(asked):
        return []
    unit, world = math.lcm(*asked.grids), asked.world_size
    middle = max(world // unit, 1)
    counts = range(max(middle - _MOST_WORLDS // 2, 1), middle + _MOST_WORLDS // 2 + 1)
    worlds = [unit * count for count in counts if unit * count != world]
    return sorted(worlds, key=lambda ranks: (_ratio(ranks, world), ranks))
