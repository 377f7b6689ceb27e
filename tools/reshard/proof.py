"""Save at every layout, load at every layout: starts the ranks, reads what they left, compares.

One world of ranks for each layout that saves, one for each that loads all of them in turn.
"""

import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.spawn import ProcessException

from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.core.dist_checkpointing.store import open_checkpoint
from megatron.core.errors import CheckpointError
from tools.layouts.ranks import run_ranks
from tools.reshard.blocks import elements_of_model
from tools.reshard.differences import (
    Difference,
    Near,
    elements,
    of_bits,
    of_facts,
    of_keys,
    of_numbers,
    whole_blocks,
)
from tools.reshard.layouts import SAVED_AT, Layout, Model
from tools.reshard.on_ranks import Job, PairRecord, Source, load_each, train_and_save

KINDS = ("model.", "optimizer.", "rng.")
OF_LAYOUT = ("world_size", "config")
"""Entries of a checkpoint's common data that may differ between layouts, and must."""
Pair = tuple[str, str]
"""Saved at, loaded at."""


class Saved(NamedTuple):
    """What a layout saved, held against one process."""

    layout: Layout
    error: float
    """Of the worst tensor; 0 where it is not compared."""
    of: str
    elements: dict[str, int]
    """Kind of tensors -> elements on disk."""
    problem: str = ""
    """What is wrong; its pairs are not run then."""


class Outcome(NamedTuple):
    """What became of a pair."""

    source: str
    target: str
    problem: str = ""
    """The first difference, or what failed; empty when the pair is proved."""
    error: float = 0.0
    of: str = ""


class Proof:
    """The pairs of one model, in a folder of its own.

    ``saved`` gets one entry for each layout, ``outcomes`` one for each pair.
    """

    def __init__(
        self,
        model: Model,
        folder: Path,
        *,
        pairs: Collection[Pair] | None = None,
        one: Source | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: Its layouts are tried.
            folder: Gets the checkpoints.
            pairs: Of its layouts; all when None.
            one: What one process saved, if that is known; else it is saved first.
        """
        names = [layout.name for layout in model.layouts]
        every = [(a, b) for a in names for b in names]
        self.model, self.folder = model, folder
        self.pairs = every if pairs is None else [pair for pair in every if pair in set(pairs)]
        self.saved: list[Saved] = []
        self.outcomes: list[Outcome] = []
        self.seconds = 0.0
        self._sources: dict[str, Source] = {one.name: one} if one is not None else {}

    def run(self) -> Iterator[str]:
        """Do everything; yield a line for each layout that saved and each that loaded."""
        start = time.monotonic()
        layouts = self.model.layouts
        sources = {source for source, _ in self.pairs} | {layouts[0].name}
        for layout in layouts:
            if layout.name in sources:
                yield _line_of_saved(self.save(layout))
        for layout in layouts:
            if names := [a for a, b in self.pairs if b == layout.name]:
                begin = time.monotonic()
                found = self.load(layout, names)
                yield _line_of_target(layout, found, time.monotonic() - begin)
        self.seconds = time.monotonic() - start

    @property
    def one(self) -> Source | None:
        """What one process saved, once it has."""
        return self._sources.get(self.model.layouts[0].name)

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, a sentence each."""
        saved = [f"saved at {one.layout.name}: {one.problem}" for one in self.saved if one.problem]
        return saved + [
            f"{one.source} -> {one.target}: {one.problem}" for one in self.outcomes if one.problem
        ]

    @property
    def worst(self) -> tuple[float, str]:
        """The largest error of all, and what it is of."""
        errors = [(one.error, one.of) for one in (*self.saved, *self.outcomes)]
        return max(errors, default=(0.0, ""))

    def save(self, layout: Layout) -> Saved:
        """Train and save at ``layout``, and hold that against one process, which comes first."""
        self.saved.append(self._save(layout))
        return self.saved[-1]

    def load(self, layout: Layout, sources: Sequence[str]) -> list[Outcome]:
        """Load what ``sources``, names of layouts, saved, at ``layout``, and go on from it."""
        found = self._load(layout, sources)
        self.outcomes += found
        return found

    def _save(self, layout: Layout) -> Saved:
        folder = self.folder / layout.name
        folder.mkdir(parents=True)
        try:
            run_ranks(train_and_save, layout.ranks, self.model.config(layout), folder)
        except ProcessException as error:
            return Saved(layout, 0.0, "", {}, last_line(error))
        source = read_source(layout.name, folder)
        self._sources[layout.name] = source
        counts = elements(source.tensors)
        first, near = self._against_one_process(source, counts)
        if first is not None:
            del self._sources[layout.name]
        return Saved(layout, near.error, near.key, counts, str(first or ""))

    def _against_one_process(
        self, source: Source, counts: dict[str, int]
    ) -> tuple[Difference | None, Near]:
        """Compare what a layout saved with what one process did, and count its elements."""
        near, one = Near(0.0, "", None), self.one
        found = list(self._of_elements(counts))
        if one is not None:
            found += of_facts("what was saved", source.facts, one.facts)
            found += of_keys("what was saved", source.tensors, one.tensors)
        if one is not None and not found and self.model.is_exact:
            near = of_numbers("what was saved", whole_blocks(source.tensors), one.tensors)
            found += [near.first] if near.first is not None else []
        return next(iter(found), None), near

    def _of_elements(self, counts: dict[str, int]) -> Iterator[Difference]:
        states = {kind for kind in counts if kind.startswith("optimizer.")}
        config = self.model.config(self.model.layouts[0])
        want = elements_of_model(config, 1)
        for kind in ("model", *sorted(states)):
            number = want["weights" if kind == "model" else "state"]
            if counts.get(kind) != number:
                what = f"elements of {kind} on disk"
                yield Difference("what was saved", what, None, str(number), str(counts.get(kind)))
        needed = {"optimizer.exp_avg", "optimizer.exp_avg_sq"}
        needed |= set() if config.model.fp64 else {"optimizer.main_param"}
        yield from of_keys("what was saved", states, needed)

    def _load(self, layout: Layout, names: Sequence[str]) -> list[Outcome]:
        sources = [self._sources[name] for name in names if name in self._sources]
        lost = [Outcome(n, layout.name, "not saved") for n in names if n not in self._sources]
        if not sources:
            return lost
        folder = self.folder / "loaded" / layout.name
        folder.mkdir(parents=True)
        want = self.one if self.model.is_exact else None
        job = Job(self.model.config(layout), sources, layout.name, want, folder)
        try:
            run_ranks(load_each, layout.ranks, job)
        except ProcessException as error:
            said = last_line(error)
            return lost + [Outcome(source.name, layout.name, said) for source in sources]
        records = torch.load(folder / "records.pt", weights_only=False)
        found = [
            self._outcome(record, source, layout, folder)
            for record, source in zip(records, sources, strict=True)
        ]
        shutil.rmtree(folder)
        return lost + found

    def _outcome(self, record: PairRecord, source: Source, layout: Layout, folder: Path) -> Outcome:
        if record.refused:
            return Outcome(record.source, layout.name, f"refused: {record.refused}")
        path, first = folder / record.source, None
        if path.exists():  # else it was wrong before it was saved again
            first = first_on_disk(source, path, same_ranks=_same_ranks(source, layout))
        first = first or record.first
        return Outcome(record.source, layout.name, str(first or ""), record.error, record.of)


def read_source(name: str, folder: Path) -> Source:
    """Read what ``train_and_save`` left in ``folder``."""
    return Source(
        name,
        folder / "saved",
        facts_of(folder / "saved"),
        tensors_in(folder / "saved", KINDS[:2]),
        torch.load(folder / "steps.pt", weights_only=False),
        tensors_in(folder / "end", KINDS[:2]),
    )


def facts_of(folder: Path) -> dict[str, Any]:
    """Return all common data of the latest checkpoint in ``folder`` that no layout may change."""
    opened = open_checkpoint(folder, None)
    assert opened is not None, f"nothing was saved in {folder}"
    return {key: value for key, value in opened.common.items() if key not in OF_LAYOUT}


def tensors_in(folder: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, torch.Tensor]:
    """Read the tensors of the latest checkpoint in ``folder`` whose keys begin with one of these.

    Raises:
        CheckpointError: It is damaged.
    """
    opened = open_checkpoint(folder, None)
    if opened is None:
        raise CheckpointError(f"nothing was saved in {folder}")
    tensors = {
        key: torch.empty(facts.shape, dtype=facts.dtype)
        for key, facts in stored_tensors(opened.path).items()
        if key.startswith(kinds)
    }
    read_tensors(opened.path, tensors, None, prefixes=kinds)
    return tensors


def first_on_disk(source: Source, folder: Path, *, same_ranks: bool) -> Difference | None:
    """Return where the latest checkpoint in ``folder`` differs from what ``source`` saved.

    Args:
        source: The checkpoint that was loaded.
        folder: Holds what the ranks saved right after.
        same_ranks: As many ranks saved both: then random states are compared too.
    """
    when = "saved again"
    want = tensors_in(source.folder) if same_ranks else dict(source.tensors)
    got = tensors_in(folder, KINDS if same_ranks else KINDS[:2])
    found = [
        *of_facts(when, facts_of(folder), source.facts),
        *of_keys(when, got, want),
        *of_facts(when, _counts(got), _counts(want)),
        *of_bits(when, whole_blocks(got), want),
    ]
    return next(iter(found), None)


def _counts(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {f"elements of {kind} on disk": count for kind, count in elements(tensors).items()}


def _same_ranks(source: Source, layout: Layout) -> bool:
    opened = open_checkpoint(source.folder, None)
    return opened is not None and opened.common["world_size"] == layout.ranks


def last_line(error: Exception) -> str:
    """Return what a rank that raised said last."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _line_of_saved(saved: Saved) -> str:
    verdict = f"WRONG: {saved.problem}" if saved.problem else f"{saved.error:.1e} of {saved.of}"
    return f"saved at {saved.layout.name} ({saved.layout.ranks} ranks): {verdict}"


def _line_of_target(layout: Layout, found: Sequence[Outcome], seconds: float) -> str:
    wrong = [f"\n    from {one.source}: {one.problem}" for one in found if one.problem]
    worst = max(one.error for one in found)
    return (
        f"loaded at {layout.name} ({layout.ranks} ranks): {len(found) - len(wrong)} of "
        f"{len(found)} pairs, worst {worst:.1e}, {seconds:.0f} s{''.join(wrong)}"
    )


__all__ = ["KINDS", "SAVED_AT", "Outcome", "Proof", "Saved"]
