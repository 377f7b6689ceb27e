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


class Errors(NamedTuple):
    """How far two runs are apart, relative to the size of what is compared; or may be."""

    loss: float
    norm: float
    """Of the gradient."""
    weights: float
    """Of all weights together, after the last step."""
    moved: float
    """Share of the pairs of token and expert that are other pairs, in the first step with any: what
    is learned from them changes other choices later."""


TOLERANCES = {
    "float64": Errors(1e-12, 1e-12, 1e-11, 0.0),
    "float32": Errors(1e-5, 1e-4, 1e-4, 0.0),
    "float16": Errors(3e-3, 3e-2, 3e-3, 0.0),
    "bfloat16": Errors(1e-2, 1e-1, 1e-2, 0.0),
}
"""What rounding may do, by the number format of the model, as long as each token goes to the same
experts: some hundred times the rounding of a sum. Measured: 3e-16 in fp64, 1e-7 in fp32."""
AFTER_TIES = {
    "float64": TOLERANCES["float64"],
    "float32": Errors(1e-3, 2e-2, 1e-2, 1e-3),
    "float16": Errors(1e-2, 1e-1, 2e-2, 3e-2),
    "bfloat16": Errors(3e-2, 2e-1, 5e-2, 1e-1),
}
"""The same from the step on in which a token, two of whose experts were equally good but for
rounding, went to the other one: the function that is computed is another one since, if only for
that token. In fp64 there are no such ties."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one layout."""

    layout: str
    seconds: float
    exact: Findings = field(default_factory=Findings)
    """What must be the same to the bit."""
    errors: Errors = Errors(math.inf, math.inf, math.inf, math.inf)
    """The largest there were."""
    tolerance: Errors = Errors(0.0, 0.0, 0.0, 0.0)
    """What they may be."""
    tie: int | None = None
    """The first step in which a token went to another expert."""
    is_near: bool = False
    """Whether every error is within what held in its step."""
    worst: str = ""
    """Where the weights are farthest apart."""
    failure: str = ""
    """Why the run did not come to its end; empty when it did."""

    @property
    def passes(self) -> bool:
        """Whether all is as it must be."""
        return not self.failure and not self.exact.differences and self.is_near


class Span(NamedTuple):
    """Where a run was resumed and where it ended."""

    begin: int
    end: int


def judge(
    want: Record, got: Record, span: Span, precision: str, *, layout: str, seconds: float
) -> Outcome:
    """Compare the run ``got``, resumed on another layout, with the unbroken run.

    Args:
        want: The unbroken run.
        got: The other.
        span: Iterations that were loaded and made.
        precision: Number format of the model, a name of torch's.
        layout: For people.
        seconds: How long ``got`` took.
    """
    outcome = Outcome(layout=layout, seconds=seconds)
    exact = outcome.exact
    states = want.state(after_step_folder(span.begin)), got.state(LOADED)
    compare_tensors(exact, *states, span.begin, AT_LOAD, scratch=False)
    then = want.standing(0, span.begin)
    for rank, loaded in enumerate(got.loaded):
        compare_standing(exact, then, loaded, rank, AT_LOAD, generators=False)
    steps = range(span.begin + 1, span.end + 1)
    for iteration in steps:
        _compare_reading(exact, want, got, iteration)
    outcome.tie = next((step for step in steps if _moved(want, got, step)), None)
    errors = {step: _errors(want, got, step) for step in steps}
    if outcome.tie is not None:
        moved = _moved(want, got, outcome.tie)
        errors[outcome.tie] = errors[outcome.tie]._replace(moved=moved)
    end = (after_step_folder(span.end),)
    weights, outcome.worst = _weights(want.state(*end), got.state(*end))
    errors[span.end] = errors[span.end]._replace(weights=weights)
    limits = {step: _limit(precision, outcome.tie, step) for step in steps}
    outcome.errors = Errors(*map(max, zip(*errors.values(), strict=True)))
    outcome.tolerance = limits[span.end]
    outcome.is_near = all(map(_within, errors.values(), limits.values()))
    return outcome


def _limit(precision: str, tie: int | None, step: int) -> Errors:
    return (TOLERANCES if tie is None or step < tie else AFTER_TIES)[precision]


def _within(errors: Errors, limits: Errors) -> bool:
    return all(error <= limit for error, limit in zip(errors, limits, strict=True))


def _errors(want: Record, got: Record, step: int) -> Errors:
    """Return how far apart one step is, on the rank that is farthest."""
    then = want.steps[0][step]
    lines = [steps[step] for steps in got.steps]
    loss = max(_apart(then["loss"], line["loss"]) for line in lines)
    norm = max(_apart(then["grad_norm"], line["grad_norm"]) for line in lines)
    return Errors(loss, norm, 0.0, 0.0)


def _moved(want: Record, got: Record, step: int) -> float:
    """Return the share of pairs that experts have more of in one run, at least so many moved."""
    then, now = want.tokens_per_expert.get(step, []), got.tokens_per_expert.get(step, [])
    pairs = sum(map(sum, then))
    if not pairs:
        return 0.0
    layers = zip(then, now, strict=True)
    more = (max(b - a, 0) for one, other in layers for a, b in zip(one, other, strict=True))
    return sum(more) / pairs


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
