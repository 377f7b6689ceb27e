"""A run resumed on another layout against the unbroken run.

What was loaded is compared to the bit, in global coordinates; so are samples and rates. What is
computed has its sums in another order: losses, norms and weights may differ by rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tools.resume.compare import (
    AT_LOAD,
    IN_STEP,
    Difference,
    Findings,
    compare_standing,
    compare_tensors,
    same,
)
from tools.resume.items import DECAY, RATE, SAMPLE_IDS, SAMPLES, Item
from tools.resume.record_names import LOADED, after_step_folder
from tools.resume.records import Record
from tools.resume.state_files import WEIGHT, SavedState


class Tolerance(NamedTuple):
    """What rounding may do, relative to the size of what is compared."""

    loss: float
    norm: float
    weights: float


TOLERANCES = {
    "float64": Tolerance(1e-12, 1e-10, 1e-10),
    "float32": Tolerance(1e-4, 1e-2, 1e-3),
    "float16": Tolerance(1e-2, 1e-1, 1e-2),
    "bfloat16": Tolerance(1e-2, 1e-1, 1e-2),
}
"""By the number format of the model."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one layout."""

    layout: str
    seconds: float
    exact: Findings = field(default_factory=Findings)
    """What must be the same to the bit."""
    tolerance: Tolerance = Tolerance(0.0, 0.0, 0.0)
    errors: Tolerance = Tolerance(math.inf, math.inf, math.inf)
    """The largest differences there were."""
    worst: str = ""
    """Where the weights are farthest apart."""
    failure: str = ""
    """Why the run did not come to its end; empty when it did."""

    @property
    def passes(self) -> bool:
        """Whether all is as it must be."""
        near = all(error <= most for error, most in zip(self.errors, self.tolerance, strict=True))
        return not self.failure and not self.exact.differences and near


def judge(
    want: Record,
    got: Record,
    layout: str,
    begin: int,
    end: int,
    precision: str,
    *,
    seconds: float,
) -> Outcome:
    """Compare the run ``got``, resumed at ``begin``, with the unbroken run up to ``end``."""
    outcome = Outcome(layout=layout, seconds=seconds, tolerance=TOLERANCES[precision])
    exact = outcome.exact
    states = want.state(after_step_folder(begin)), got.state(LOADED)
    compare_tensors(exact, *states, begin, AT_LOAD, scratch=False)
    then = want.standing(0, begin)
    for rank, loaded in enumerate(got.loaded):
        compare_standing(exact, then, loaded, rank, AT_LOAD, generators=False)
    steps = range(begin + 1, end + 1)
    for iteration in steps:
        _compare_reading(exact, want, got, iteration)
    lines = [(want.steps[0][i], steps_of[i]) for steps_of in got.steps for i in steps]
    weights, outcome.worst = _weights(
        want.state(after_step_folder(end)), got.state(after_step_folder(end))
    )
    outcome.errors = Tolerance(
        max(_apart(one["loss"], other["loss"]) for one, other in lines),
        max(_apart(one["grad_norm"], other["grad_norm"]) for one, other in lines),
        weights,
    )
    return outcome


def _compare_reading(findings: Findings, want: Record, got: Record, iteration: int) -> None:
    """Compare which samples all ranks together have read, and the rates of the step."""

    def note(item: Item, one: object, other: object, where: str) -> None:
        found = Difference(item, iteration, IN_STEP, where, str(one), str(other))
        findings.take(item, [] if same(one, other) else [found])

    then, now = want.samples(iteration), got.samples(iteration)
    note(SAMPLE_IDS, list(then), list(now), "all ranks")
    for sample in then.keys() & now.keys():
        note(SAMPLES, f"{then[sample]:016x}", f"{now[sample]:016x}", f"sample {sample}")
    for place, item in enumerate((RATE, DECAY)):
        note(item, *(_rates(record, iteration, place) for record in (want, got)), "all ranks")


def _rates(record: Record, iteration: int, place: int) -> list[float]:
    found = {pair[place] for steps in record.steps for pair in steps[iteration]["rates"]}
    return sorted(found)


def _apart(one: float | None, other: float | None) -> float:
    """Return the relative difference of two numbers; 0 where both are missing or not finite."""
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return 0.0 if same(one, other) else math.inf
    return abs(one - other) / abs(one) if one else abs(other)


def _weights(want: SavedState, got: SavedState) -> tuple[float, str]:
    """Return how far all weights are apart, relative to their norm, and the farthest tensor."""
    parts = list(_apart_tensors(want, got))
    size = math.sqrt(sum(norm for _, _, norm in parts)) or 1.0
    error = math.sqrt(sum(distance for _, distance, _ in parts)) / size
    return error, max(parts, key=lambda part: part[1], default=("", 0.0, 0.0))[0]


def _apart_tensors(want: SavedState, got: SavedState) -> Iterator[tuple[str, float, float]]:
    """Yield name, squared distance and squared norm of every weight."""
    for name in want.names():
        if name.startswith(f"{WEIGHT}.") and got.has(name):
            whole, other = want.whole(name)[0].double(), got.whole(name)[0].double()
            yield name, _square(other - whole), _square(whole)


def _square(tensor: Tensor) -> float:
    return (tensor * tensor).sum().item()
