"""Two records of a run, bit for bit: which items differ, when first, where, and by what values."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.resume.items import (
    COUNTERS,
    DECAY,
    DROPOUT,
    GENERATORS,
    ITEMS,
    LOSS,
    LOSS_SCALE,
    NORM,
    RATE,
    SAMPLE_IDS,
    SAMPLES,
    Item,
    item_of_tensor,
    order_in_step,
)
from tools.resume.records import Line, Record
from tools.resume.state_files import BUFFER, FROZEN, SCRATCH, WEIGHT, SavedState

AT_LOAD, IN_STEP, AFTER_STEP = 0, 1, 2
"""When something was compared, within an iteration."""
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COUNTERS = ("iteration", "consumed_samples", "optimizer_steps")


class Difference(NamedTuple):
    """One thing that is not the same in both runs."""

    item: Item
    iteration: int
    when: int
    """``AT_LOAD``, ``IN_STEP`` or ``AFTER_STEP``."""
    where: str
    """Rank, or the global name of a tensor and the index of its first element that differs."""
    want: str
    """Value of the unbroken run."""
    got: str
    """Value of the resumed run."""
    more: str = ""
    """How much of it differs."""

    @property
    def moment(self) -> tuple[int, int]:
        """Orders differences by time: iteration 4 is loaded before iteration 5 is made."""
        return self.iteration, self.when

    def __str__(self) -> str:
        time = (
            f"right after loading iteration {self.iteration}"
            if self.when == AT_LOAD
            else f"step {self.iteration}"
        )
        more = f" ({self.more})" if self.more else ""
        return f"{time}, {self.where}: {self.want} in the unbroken run, {self.got} here{more}"


@dataclass
class Findings:
    """Everything that was compared, and what of it differs."""

    compared: Counter[str] = field(default_factory=Counter)
    """Item -> values or tensors that were compared."""
    differences: list[Difference] = field(default_factory=list)

    def take(self, item: Item, differences: Iterable[Difference], count: int = 1) -> None:
        """Note a comparison of ``count`` things of ``item``."""
        self.compared[item.name] += count
        self.differences.extend(differences)

    def first_of(self, item: Item) -> Difference | None:
        """Return the first difference of an item; None when it is the same throughout."""
        found = [one for one in self.differences if one.item is item]
        return min(found, key=lambda one: one.moment, default=None)

    def causes(self) -> list[Difference]:
        """Return the first difference of each item that no earlier difference explains.

        Those right after loading; if nothing differs there, the first one of a step.
        """
        firsts = [first for item in ITEMS if (first := self.first_of(item)) is not None]
        if at_load := [one for one in firsts if one.when == AT_LOAD]:
            return at_load
        firsts.sort(key=lambda one: (one.moment, order_in_step(one.item)))
        return firsts[:1]


def compare_runs(want: Record, got: Record, iterations: Iterable[int]) -> Findings:
    """Compare where two runs of the same layout begin and every step that both have made."""
    findings = Findings()
    for rank in range(want.world_size):
        loaded = got.loaded[rank]
        if loaded["iteration"] in want.steps[rank]:
            then = want.standing(rank, loaded["iteration"])
            compare_standing(findings, then, loaded, rank, AT_LOAD)
        for iteration in iterations:
            lines = want.steps[rank][iteration], got.steps[rank][iteration]
            _compare_step(findings, *lines, rank)
            compare_standing(findings, *lines, rank, IN_STEP)
    return findings


def compare_standing(
    findings: Findings, want: Line, got: Line, rank: int, when: int, *, generators: bool = True
) -> None:
    """Compare counters, seeds, generators and the loss scale of one rank at one moment."""
    iteration, where = want["iteration"], f"rank {rank}"

    def note(item: Item, name: str, one: Any, other: Any) -> None:
        place = f"{where}, {name}" if name else where
        differs = [] if same(one, other) else [_differ(item, iteration, when, place, one, other)]
        findings.take(item, differs)

    for name in _COUNTERS:
        note(COUNTERS, name, want[name], got[name])
    note(DROPOUT, "seed", want["dropout_seed"], got["dropout_seed"])
    scales = want["loss_scale"] or {}, got["loss_scale"] or {}
    for name in sorted(scales[0].keys() | scales[1].keys()):
        note(LOSS_SCALE, name, scales[0].get(name), scales[1].get(name))
    for name in want["generators"] if generators else ():
        note(GENERATORS, name, want["generators"][name], got["generators"].get(name))


def _compare_step(findings: Findings, want: Line, got: Line, rank: int) -> None:
    """Compare what one rank read and what came out of one step."""
    iteration, where = want["iteration"], f"rank {rank}"

    def note(item: Item, one: Any, other: Any, place: str = where) -> None:
        differs = [] if same(one, other) else [_differ(item, iteration, IN_STEP, place, one, other)]
        findings.take(item, differs)

    ids = [[sample for sample, _ in line["samples"]] for line in (want, got)]
    note(SAMPLE_IDS, ids[0], ids[1])
    theirs = dict(got["samples"])
    for sample, print_ in want["samples"]:
        if sample in theirs:
            note(SAMPLES, _hex(print_), _hex(theirs[sample]), f"{where}, sample {sample}")
    for place, item in enumerate((RATE, DECAY)):
        note(item, *([pair[place] for pair in line["rates"]] for line in (want, got)))
    note(LOSS, want["loss"], got["loss"])
    note(NORM, want["grad_norm"], got["grad_norm"])
    note(NORM, want["updated"], got["updated"], f"{where}, update made")


def compare_tensors(
    findings: Findings,
    want: SavedState,
    got: SavedState,
    iteration: int,
    when: int,
    *,
    scratch: bool = True,
) -> None:
    """Compare all tensors in global coordinates, every copy that a rank holds.

    Args:
        findings: Takes the differences.
        want: Of the unbroken run.
        got: Of the other, on any layout.
        iteration: After which both were written.
        when: ``AT_LOAD`` or ``AFTER_STEP``.
        scratch: Compare buffers that the model does not save, too: same layout only.
    """
    names = {name for state in (want, got) for name in state.names()}
    for name in sorted(names, key=_natural):
        if scratch or not name.startswith(f"{SCRATCH}."):
            item = item_of_tensor(name)
            differs = _compare_tensor(item, want, got, name)
            found = [
                Difference(item, iteration, when, where, *values) for where, *values in differs
            ]
            findings.take(item, found)


def _compare_tensor(
    item: Item, want: SavedState, got: SavedState, name: str
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (where, value, other value, how much) of the first difference of a tensor, if any."""
    facts = [state.facts(name) if state.has(name) else "not there" for state in (want, got)]
    if facts[0] != facts[1]:
        yield name, facts[0], facts[1], ""
        return
    whole, is_tiled = want.whole(name)
    _, is_tiled_too = got.whole(name)
    if not (is_tiled and is_tiled_too):
        yield name, _tiling(is_tiled), _tiling(is_tiled_too), ""
    for rank, block in got.blocks(name):
        differs = bits(block.tensor) != bits(whole[block.region].contiguous())
        if differs.any():
            index = tuple(differs.nonzero()[0].tolist())
            place = tuple(at + begin for at, begin in zip(index, block.offset, strict=True))
            where = f"{name}{list(place)} of rank {rank}"
            values = repr(whole[place].item()), repr(block.tensor[index].item())
            yield where, *values, _how_much(differs, block.tensor, whole)
            return


def compare_completeness(
    findings: Findings, want: SavedState, got: SavedState, moments: Iterable[str], iteration: int
) -> None:
    """Find moments that neither run tells of: what both leave out is the same, and lost.

    Args:
        findings: Takes the differences.
        want: Of the unbroken run.
        got: Of the other.
        moments: Kinds that the optimizer has for every weight that it steps.
        iteration: After which both were written.
    """
    stepped = [name.removeprefix(f"{WEIGHT}.") for name in want.names() if _kind(name) == WEIGHT]
    known = {WEIGHT, FROZEN, BUFFER, SCRATCH, "main_param"}  # some weights are their own main ones
    others = {_kind(name) for name in want.names()} - known
    for kind in sorted(others | set(moments)):
        for name in sorted((f"{kind}.{name}" for name in stepped), key=_natural):
            if not want.has(name) and not got.has(name):
                facts = f"{name} (of named_state)", "not there", "not there"
                item = item_of_tensor(name)
                findings.take(item, [Difference(item, iteration, AT_LOAD, *facts)], 0)


def _kind(name: str) -> str:
    return name.partition(".")[0]


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as whole numbers: NaN is NaN, and -0.0 is not 0.0."""
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def same(one: Any, other: Any) -> bool:
    """Return whether two values of a record are the same; NaN is NaN."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _differ(item: Item, iteration: int, when: int, where: str, want: Any, got: Any) -> Difference:
    more = ""
    if isinstance(want, list) and isinstance(got, list):
        pairs = enumerate(zip(want, got, strict=False))
        at = next((place for place, pair in pairs if not same(*pair)), None)
        if at is None:
            want, got = f"{len(want)} values", f"{len(got)} values"
        else:
            more = f"value {at} of {len(want)}" if len(want) > 1 else ""
            want, got = want[at], got[at]
    return Difference(item, iteration, when, where, str(want), str(got), more)


def _tiling(is_tiled: bool) -> str:
    return "whole" if is_tiled else "a part that no rank holds"


def _how_much(differs: Tensor, got: Tensor, want: Tensor) -> str:
    count = f"{int(differs.sum())} of {differs.numel()} elements differ"
    return f"{count}; all are 0 here" if not got.any() and want.any() else count


def _hex(number: int) -> str:
    return f"{number % (1 << 64):016x}"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Order layers and experts by their numbers."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split(".")]
