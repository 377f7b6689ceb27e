"""What a caller of ``pretrain`` may watch: where a run begins, and every step it makes.

For tools that record or check a run. Every rank calls its observers at the same points.
"""

from typing import Protocol

from megatron.training.run import Run, TrainState
from megatron.training.train_step import StepOutcome


class RunObserver(Protocol):
    """Watches a run from inside its processes.

    It may read everything and use collectives, as every rank calls it; it must not change model,
    optimizer or ``state``.
    """

    def after_load(self, run: Run, state: TrainState) -> None:
        """Called once, before the first step.

        Args:
            run: Model and optimizer as they were drawn or loaded.
            state: Where training begins.
        """

    def after_step(self, run: Run, state: TrainState, outcome: StepOutcome) -> None:
        """Called after each step, before anything is logged or saved.

        Args:
            run: Model and optimizer after the step.
            state: Where training stands; ``state.iteration`` counts this step.
            outcome: What the step told, the same on every rank.
        """
