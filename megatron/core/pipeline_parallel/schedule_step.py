"""What a pipeline schedule is made of: steps of a rank in order, and where each stage lives. Pure.

A *stage* is one piece of the model, counted from the embedding (0) to the loss. Each rank holds
``chunks`` stages; ``Schedule.stage`` and ``Schedule.home`` translate. What a step needs and makes
follows from its kind and stage alone, so a list of steps is a whole schedule.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

StepKind = Literal["F", "B", "I", "W"]


class Step(NamedTuple):
    """One computation of a rank: what, of which microbatch, through which of its chunks.

    ``F`` is the forward, ``B`` the whole backward. A backward may instead come as two steps: ``I``,
    the gradient of the stage's input, which the stage before waits for, and later ``W``, the
    gradient of its weights, which nobody waits for (Qi et al. 2023, arXiv:2401.10241).
    """

    kind: StepKind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        """Write ``F3.1`` for the forward of microbatch 3 through chunk 1."""
        return f"{self.kind}{self.microbatch}.{self.chunk}"


class Product(NamedTuple):
    """What one step makes and another needs.

    ``activation`` is the output of a stage, ``gradient`` that of its input (made by ``B`` or
    ``I``), ``weight_gradient`` what ``W`` adds; nobody waits for the last one.
    """

    kind: Literal["activation", "gradient", "weight_gradient"]
    microbatch: int
    stage: int

    def __str__(self) -> str:
        """Write ``activation of microbatch 3, stage 1``."""
        return f"{self.kind} of microbatch {self.microbatch}, stage {self.stage}"


class Home(NamedTuple):
    """Where a stage lives."""

    rank: int
    chunk: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The ordered steps of every pipeline rank.

    Law: each microbatch passes each stage once forward and once backward, on the stage's home, and
    the lists together can be walked to the end (``deadlock`` of a simulated timeline is None).
    """

    name: str
    num_microbatches: int
    chunks: int = 1
    """Stages that a rank holds."""
    v_shape: bool = False
    """Chunk 1 runs back over the ranks (0 1 2 | 2 1 0) instead of starting at rank 0 again."""
    steps: tuple[tuple[Step, ...], ...]
    """One list for each pipeline rank."""

    @cached_property
    def pp(self) -> int:
        """Pipeline ranks."""
        return len(self.steps)

    @cached_property
    def num_stages(self) -> int:
        """Stages of the model, over all ranks."""
        return self.pp * self.chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Return the stage that ``chunk`` of ``rank`` is."""
        if self.v_shape and chunk % 2:
            return (chunk + 1) * self.pp - 1 - rank
        return chunk * self.pp + rank

    def home(self, stage: int) -> Home:
        """Return where ``stage`` lives; the inverse of ``stage``."""
        chunk, place = divmod(stage, self.pp)
        return Home(self.pp - 1 - place if self.v_shape and chunk % 2 else place, chunk)

    def makes(self, rank: int, step: Step) -> Product:
        """Return what ``step`` of ``rank`` makes."""
        stage = self.stage(rank, step.chunk)
        if step.kind == "F":
            return Product("activation", step.microbatch, stage)
        kind: Literal["weight_gradient", "gradient"] = (
            "weight_gradient" if step.kind == "W" else "gradient"
        )
        return Product(kind, step.microbatch, stage)

    def needs(self, rank: int, step: Step) -> tuple[Product, ...]:
        """Return what must exist before ``step`` of ``rank`` starts, its own rank's products too.

        A forward needs the stage before, a backward its own forward and the stage after, a weight
        gradient its own input gradient.
        """
        stage, batch = self.stage(rank, step.chunk), step.microbatch
        if step.kind == "F":
            return (Product("activation", batch, stage - 1),) if stage else ()
        if step.kind == "W":
            return (Product("gradient", batch, stage),)
        own = Product("activation", batch, stage)
        if stage == self.num_stages - 1:
            return (own,)
        return own, Product("gradient", batch, stage + 1)

    def receiver(self, product: Product) -> int | None:
        """Return the rank that ``product`` must be sent to; None if it stays where it is made."""
        if product.kind == "weight_gradient":
            return None
        stage = product.stage + (1 if product.kind == "activation" else -1)
        if not 0 <= stage < self.num_stages:
            return None
        rank = self.home(stage).rank
        return None if rank == self.home(product.stage).rank else rank

    def peak_activations(self) -> tuple[int, ...]:
        """Return for each rank how many microbatches of a chunk it keeps at most.

        A forward keeps one until its ``B``, or its ``W``, has run. The unit is the activations of
        one chunk; a chunk of an interleaved schedule has 1 / ``chunks`` of a rank's layers.
        """
        return tuple(_peak(steps) for steps in self.steps)


def forward_only(schedule: Schedule) -> Schedule:
    """Leave out all backwards, for evaluation: the forwards of every rank in the same order."""
    return Schedule(
        name=f"{schedule.name} forward only",
        num_microbatches=schedule.num_microbatches,
        chunks=schedule.chunks,
        v_shape=schedule.v_shape,
        steps=tuple(tuple(s for s in steps if s.kind == "F") for steps in schedule.steps),
    )


def _peak(steps: tuple[Step, ...]) -> int:
    held = peak = 0
    for step in steps:
        held += {"F": 1, "I": 0, "B": -1, "W": -1}[step.kind]
        peak = max(peak, held)
    return peak
