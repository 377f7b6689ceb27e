"""Runs layouts and holds each against one process: a row of `tools/verify_layouts.py`."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from torch.multiprocessing.spawn import ProcessException

from megatron.training.config.run_config import RunConfig
from tools.layouts import axes as axes_of_layouts
from tools.layouts.axes import Axes, Level
from tools.layouts.cases import OPTIMIZERS, config_of, reasons_against, shape_of
from tools.layouts.causes import likely_cause, named_sizes, ratio_in_words
from tools.layouts.compare import TOLERANCES, Comparison, compare
from tools.layouts.first_difference import First, first_difference
from tools.layouts.matrix import Row
from tools.layouts.oracle import LayoutResult, RankRecord, make_batch, merged, train_on_ranks

EQUAL, BIT_EQUAL, REFUSED, TOO_LARGE, DIFFERS, FAILS = (
    "equal",
    "bit-equal",
    "refused",
    "not run",
    "DIFFERS",
    "FAILS",
)


class Outcome(NamedTuple):
    """What became of a layout."""

    row: Row
    ranks: int
    verdict: str
    error: float | None = None
    """Largest difference / largest element, of the worst tensor; None when nothing was run."""
    where: str = ""
    """Name of that tensor."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    """Why it is refused; what differs first and what that means."""

    @property
    def is_wrong(self) -> bool:
        """Whether the layout is not what it must be."""
        return self.verdict in (DIFFERS, FAILS)


class Verifier:
    """Holds what all layouts of a model share, the runs on one process above all."""

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        dtype: str,
        steps: int = 2,
        max_ranks: int = 8,
        own_layout: Level | None = None,
    ) -> None:
        """Prepare for a model.

        Args:
            values: Options of the run by field name (see ``read_base``).
            dtype: ``fp64``, ``fp32`` or ``bf16``, as in ``values``.
            steps: Optimizer steps of each run.
            max_ranks: Layouts with more are not run.
            own_layout: What the user asked for, a row of its own.
        """
        self.values = dict(values)
        self.axes: Axes = axes_of_layouts.axes_for(shape_of(values), own_layout)
        self.tolerance = TOLERANCES[dtype]
        self.steps, self.max_ranks = steps, max_ranks
        config = config_of(values, [], 1, "sgd")
        vocab, length = config.tokenizer.padded_vocab_size, config.data.seq_length
        self._batch_of = partial(make_batch, vocab=vocab, length=length)
        self._judged: dict[tuple[str, ...], list[str]] = {}
        self._references: dict[tuple[Any, ...], list[LayoutResult]] = {}
        self._scoped_to_step = "global_aux_loss" in config.model.moe_router_load_balancing_type

    def judge(self, levels: tuple[str, ...]) -> list[str]:
        """Return what is wrong with a layout: too many ranks, or what the rules say."""
        if levels not in self._judged:
            ranks = self.world_size(levels)
            words = axes_of_layouts.words_of(levels, self.axes)
            too_many = [f"needs {ranks} ranks, --max-ranks is {self.max_ranks}"]
            self._judged[levels] = (
                too_many if ranks > self.max_ranks else reasons_against(self.values, words, ranks)
            )
        return self._judged[levels]

    def world_size(self, levels: tuple[str, ...]) -> int:
        """Return the ranks of a layout."""
        return axes_of_layouts.world_size_of(levels, self.axes)

    def run(self, row: Row) -> Outcome:
        """Run a layout, if it may, and compare it."""
        ranks = self.world_size(row.levels)
        if row.reasons:
            verdict = TOO_LARGE if ranks > self.max_ranks else REFUSED
            return Outcome(row, ranks, verdict, notes=row.reasons)
        wanted = self.reference(row.levels)
        start = time.monotonic()
        try:
            records = self._train(self._configs(row.levels), ranks)
        except ProcessException as error:
            return Outcome(row, ranks, FAILS, notes=(_last_line(error),))
        compared: list[Comparison | str] = []
        for record, want in zip(records, wanted, strict=True):
            try:
                compared.append(compare(merged(record), want, self.tolerance))
            except AssertionError as error:
                compared.append(str(error))
        return self._outcome(row, compared, time.monotonic() - start)

    def reference(self, levels: tuple[str, ...]) -> list[LayoutResult]:
        """Return the runs on one process that a layout is compared with, one an optimizer."""
        key = self._reference_of(levels)
        if key not in self._references:
            configs, ranks = self._reference_configs(levels)
            self._references[key] = [merged(r) for r in self._train(configs, ranks)]
        return self._references[key]

    def diagnose(self, levels: tuple[str, ...], number: int) -> tuple[str, ...]:
        """Run a layout and its reference again and return the first difference, in words.

        Args:
            levels: Of the layout.
            number: Of the optimizer in ``OPTIMIZERS``.
        """
        first = self.first_difference(levels, number)
        if first is None:
            return ("the same layout did not differ the second time: it depends on timing",)
        return explain(first, self.sizes(levels))

    def first_difference(self, levels: tuple[str, ...], number: int = 0) -> First | None:
        """Return where a layout parts from its reference; both are run again."""
        configs, ranks = self._reference_configs(levels)
        (wanted,) = self._train([configs[number]], ranks, is_traced=True)
        config = self._configs(levels)[number]
        (got,) = self._train([config], self.world_size(levels), is_traced=True)
        return first_difference(got, wanted, merged(wanted), self.tolerance)

    def sizes(self, levels: tuple[str, ...]) -> dict[str, int]:
        """Return the numbers that a wrong factor may be, by name."""
        sizes = axes_of_layouts.sizes_of(levels, self.axes)
        config = self._configs(levels)[0].training
        per_step = config.micro_batch_size * sizes["dp"]
        return named_sizes(sizes, config.global_batch_size // per_step)

    def _outcome(self, row: Row, compared: list[Comparison | str], seconds: float) -> Outcome:
        ranks = self.world_size(row.levels)
        done = [one for one in compared if isinstance(one, Comparison)]
        worst = max((one.worst for one in done), key=lambda one: one.error, default=None)
        error, where = (worst.error, worst.title) if worst else (None, "")
        for number, one in enumerate(compared):
            if isinstance(one, Comparison) and one.first is None:
                continue
            optimizer = list(OPTIMIZERS)[number]
            said = one if isinstance(one, str) else one.first.title  # type: ignore[union-attr]
            notes = (f"with {optimizer}: {said}", *self.diagnose(row.levels, number))
            return Outcome(row, ranks, DIFFERS, error, where, seconds, notes)
        verdict = BIT_EQUAL if all(one.is_bit_equal for one in done) else EQUAL
        return Outcome(row, ranks, verdict, error, where, seconds)

    def _configs(self, levels: tuple[str, ...]) -> list[RunConfig]:
        words, ranks = axes_of_layouts.words_of(levels, self.axes), self.world_size(levels)
        return [config_of(self.values, words, ranks, name) for name in OPTIMIZERS]

    def _reference_of(self, levels: tuple[str, ...]) -> tuple[Any, ...]:
        words = axes_of_layouts.words_of(levels, self.axes, of_model=True)
        return (*words, self._reference_ranks(levels))

    def _reference_ranks(self, levels: tuple[str, ...]) -> int:
        """One, but for a balance loss over the step so far, which depends on the data ranks."""
        return axes_of_layouts.sizes_of(levels, self.axes)["dp"] if self._scoped_to_step else 1

    def _reference_configs(self, levels: tuple[str, ...]) -> tuple[list[RunConfig], int]:
        words = axes_of_layouts.words_of(levels, self.axes, of_model=True)
        ranks = self._reference_ranks(levels)
        return [config_of(self.values, words, ranks, name) for name in OPTIMIZERS], ranks

    def _train(
        self, configs: list[RunConfig], ranks: int, *, is_traced: bool = False
    ) -> list[list[RankRecord]]:
        return train_on_ranks(
            configs, ranks, steps=self.steps, batch_of=self._batch_of, is_traced=is_traced
        )


def explain(first: First, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Say what differs first, by what factor, and what usually makes such a difference."""
    where = f"step {first.difference.step + 1}"
    if first.samples:
        where += f", samples {', '.join(map(str, first.samples))}"
    if first.ranks:
        where += f", rank {first.ranks[0]}"
    others = len(first.others) - 1
    more = f" and {others} more of the same kind" if others > 0 else ""
    return (
        f"first: {first.difference.title}{more} ({where})",
        f"off by {first.difference.error:.2g}: {ratio_in_words(first, sizes)}",
        f"likely: {likely_cause(first)}",
    )


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
