"""What a rule sees of a run, and how it names options in the user's flags."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron.training.config.options import Option
from megatron.training.config.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Check:
    """One run under inspection; every value is already resolved."""

    config: RunConfig
    options: dict[str, Option]
    world_size: int
    without_effect: frozenset[str] = field(default=frozenset())
    """Flags that were accepted and change nothing."""

    def value(self, name: str) -> Any:
        """Return an option's value by field name."""
        return getattr(getattr(self.config, self.options[name].section), name)

    def show(self, *names: str) -> str:
        """Write options with their values, as typed: ``--hidden-size 768, --num-layers 12``."""
        return ", ".join(self.options[name].show(self.value(name)) for name in names)

    def product(self, *names: str) -> str:
        """Write the product of sizes, those of 1 left out: ``--flag 2 x --other 4 = 8``."""
        sizes = {name: self.value(name) for name in names}
        shown = [name for name, size in sizes.items() if size != 1] or list(names[:1])
        total = f" = {math.prod(sizes.values())}" if len(shown) > 1 else ""
        return " x ".join(self.show(name) for name in shown) + total

    def given(self, *names: str) -> list[str]:
        """Return those of ``names`` that the user set."""
        return [name for name in names if self.config.given(name)]

    def useless(self, names: str, why: str) -> Iterator[str]:
        """Yield a sentence if the user set any of the space-separated ``names``.

        Args:
            names: Field names.
            why: Completes ``--flag VALUE has no effect``.
        """
        found = self.given(*names.split())
        if found:
            verb = "has" if len(found) == 1 else "have"
            yield f"{self.show(*found)} {verb} no effect {why}"


Rule = Callable[[Check], Iterator[str]]


def divisors(number: int) -> list[int]:
    """Return all divisors, smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest(wanted: int, allowed: list[int], most: int = 3) -> str:
    """List the allowed numbers nearest to ``wanted``, in order."""
    best = sorted(allowed, key=lambda number: (abs(number - wanted), number))[:most]
    return ", ".join(map(str, sorted(best)))
