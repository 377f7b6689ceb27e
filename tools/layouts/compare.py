"""Are two runs the same, how far are they apart, and by what factor."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tools.layouts.oracle import LayoutResult


class Tolerance(NamedTuple):
    """What rounding may do to a tensor; anything beyond is another computation."""

    error: float
    """Largest difference of an element / largest element."""
    ratio: float
    """How far the factor by which one is the other, by least squares, may be from 1."""


TOLERANCES = {
    "fp64": Tolerance(1e-12, 1e-12),
    "fp32": Tolerance(2.0**-15, 2.0**-15),
    "bf16": Tolerance(2.0**-2, 2.0**-5),
}
"""By dtype, as multiples of its rounding 2^-53, 2^-24 and 2^-9: about 2^13, 2^9 and 2^7, so that
sums of hundreds of terms in another order, through all layers of two steps, stay below (measured:
1e-14, 3e-6, 0.1). So much of one element would hide a factor of 1.05 in bf16. The factor of a
whole tensor averages over its elements and was measured to stay within 0.016 of 1: beyond 2^-5 it
is no rounding.
"""
COUNTS = "tokens per expert"
"""Whole numbers: equal or not."""
_FLOOR = 1e-3
"""Tensors smaller than this, of the largest of their kind, are compared on its scale: what is zero
by symmetry, such as the gradient of the bias of keys, is made of rounding alone."""


class Difference(NamedTuple):
    """How one tensor of a run compares with that of the other."""

    step: int
    """From 0."""
    what: str
    """``initial weight``, ``lm loss``, ``gradient``, ``grad norm``, ``weight``, ``tokens per
    expert`` or ``metric``; of activations ``output`` or ``gradient of``."""
    name: str
    """Global name; empty for a number of the whole run."""
    error: float
    """Largest difference / largest element."""
    ratio: float
    """Factor of least squares; NaN where the other is zero."""
    residual: float
    """Norm of what the factor does not explain / norm of the other."""

    @property
    def title(self) -> str:
        """Name it for people."""
        joint = " " if self.what.endswith(" of") else " of " if self.name else ""
        return f"{self.what}{joint}{self.name}"

    def is_beyond(self, tolerance: Tolerance) -> bool:
        """Return whether rounding cannot explain it."""
        if self.what == COUNTS:
            return self.error > 0.0
        off = abs(self.ratio - 1.0) if self.ratio == self.ratio else 0.0
        return not self.error <= tolerance.error or off > max(tolerance.ratio, 1e-300)


class Comparison(NamedTuple):
    """A run against the run that it must equal."""

    worst: Difference
    first: Difference | None
    """The first that rounding cannot explain; None when the runs are equal."""
    is_bit_equal: bool


def measure(
    step: int, what: str, name: str, got: Tensor, want: Tensor, *, scale: float = 0.0
) -> Difference:
    """Compare two tensors; differences are in units of ``want``'s largest element or ``scale``."""
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        return Difference(step, what, name, float("inf"), float("nan"), float("inf"))
    distance, size = got - want, want.abs().max().item() if want.numel() else 0.0
    error = distance.abs().max().item() if want.numel() else 0.0
    square = (want * want).sum().item()
    ratio = (got * want).sum().item() / square if size > _FLOOR * scale and square else float("nan")
    left = (got - ratio * want).norm().item() / square**0.5 if ratio == ratio else float("nan")
    unit = max(size, _FLOOR * scale)
    relative = error / unit if unit else (0.0 if error == 0.0 else float("inf"))
    return Difference(step, what, name, relative, ratio, left)


def differences(got: LayoutResult, want: LayoutResult) -> Iterator[Difference]:
    """Yield every comparison of two runs, in the order of their steps."""
    yield from _of_tensors(0, "initial weight", got.initial, want.initial)
    for step, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True)):
        yield of_numbers(step, "lm loss", "", mine.lm_loss, theirs.lm_loss)
        yield from _of_tensors(step, "gradient", mine.gradients, theirs.gradients)
        yield of_numbers(step, "grad norm", "", mine.grad_norm, theirs.grad_norm)
        yield from _of_tensors(step, "weight", mine.weights, theirs.weights)
    last = len(want.steps) - 1
    yield measure(last, COUNTS, "", got.tokens_per_expert, want.tokens_per_expert)
    for name, value in want.metrics.items():
        yield of_numbers(last, "metric", name, got.metrics.get(name, float("inf")), value)


def compare(got: LayoutResult, want: LayoutResult, tolerance: Tolerance) -> Comparison:
    """Compare all that two runs left behind."""
    found = list(differences(got, want))
    first = next((one for one in found if one.is_beyond(tolerance)), None)
    worst = max(found, key=lambda one: one.error)
    return Comparison(worst, first, all(one.error == 0.0 for one in found))


def of_numbers(
    step: int, what: str, name: str, got: float | None, want: float | None
) -> Difference:
    """Compare two numbers; NaN and None equal themselves."""
    if repr(got) == repr(want) or got is None or want is None:
        same = repr(got) == repr(want)
        return Difference(step, what, name, 0.0 if same else float("inf"), float("nan"), 0.0)
    return measure(
        step,
        what,
        name,
        torch.tensor([got], dtype=torch.float64),
        torch.tensor([want], dtype=torch.float64),
    )


def _of_tensors(
    step: int, what: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]
) -> Iterator[Difference]:
    scale = max((tensor.abs().max().item() for tensor in want.values()), default=0.0)
    for name, tensor in want.items():
        if name in got:
            yield measure(step, what, name, got[name], tensor, scale=scale)
        else:
            yield Difference(step, f"missing {what}", name, float("inf"), float("nan"), 0.0)
    for name in got.keys() - want.keys():
        yield Difference(step, f"unexpected {what}", name, float("inf"), float("nan"), 0.0)
