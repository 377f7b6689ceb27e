"""What goes into and comes out of saving and loading a run; the types alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.mapping import NamedState
from megatron.core.optimizer.grad_scaler import GradScaler
from megatron.training.config.checkpoint import CheckpointConfig


class SavedOptimizer(Protocol):
    """What checkpoints need of an optimizer."""

    step_count: int
    grad_scaler: GradScaler

    def named_state(self) -> NamedState:
        """Yield (parameter name, role, state name -> tensor that is written and read in place)."""

    def after_load(self, *, with_optim: bool) -> None:
        """Bring weights and main weights together after one of them was read."""


class SavedTokenizer(Protocol):
    """What checkpoints need of a tokenizer; see megatron.core.tokenizers.base."""

    name: str
    files: dict[str, Path]
    settings: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def fingerprint(self) -> str:
        """Hash of its content."""


@dataclass(kw_only=True)
class TrainState:
    """Where training stands. Everything here is in a checkpoint."""

    iteration: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: int = 0
    """Samples read so far; decides which come next, the learning rate and the dropout masks."""
    dropout_seed: int = 0
    """Seed of the stream of dropout masks."""


class Retention(NamedTuple):
    """Which persistent checkpoints stay when a new one is there; see ``folders.prune``."""

    keep_last: int | None = None
    """--keep-last."""
    interval: int | None = None
    """--save-retain-interval."""

    @classmethod
    def of(cls, options: CheckpointConfig) -> "Retention":
        """Return what the options ask for."""
        return cls(options.keep_last, options.save_retain_interval)


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """How a save went. A failed one leaves earlier checkpoints as they were."""

    iteration: int
    path: Place | None
    """None when nothing was saved."""
    size_bytes: int = 0
    seconds: float = 0.0
    in_background: bool = False
    """Training went on meanwhile."""
    error: str = ""
    """Why nothing was saved; empty after success."""
    kind: str = ""
    """``global``, ``local`` or ``in_memory`` where it is not persistent."""

    def line(self) -> str:
        """Return one line for the log."""
        kind = f"{self.kind} " if self.kind else ""
        if self.path is None:
            reason = " | ".join(self.error.splitlines())
            return (
                f"{kind}checkpoint of iteration {self.iteration} was NOT saved: {reason}; earlier "
                "checkpoints are untouched"
            )
        how = ", in the background" if self.in_background else ""
        return (
            f"saved {kind}checkpoint of iteration {self.iteration} to {self.path} "
            f"({self.size_bytes / 2**20:.1f} MiB in {self.seconds:.2f} s{how})"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedState:
    """Where a run begins."""

    iteration: int
    """Optimizer steps already done."""
    consumed_train_samples: int
    """Place in the global order of samples."""
    dropout_seed: int
    """Of the dropout stream: ``SampleRng(dropout_seed, sample_ids)``."""
    path: Place | None = None
    """Checkpoint that was loaded; None in a fresh run."""
    data_fingerprint: str | None = None
    """Of the training data that the checkpoint's run read; None where its order does not matter."""
    notices: tuple[str, ...] = ()
    """One line for each thing the user should know about the difference to the checkpoint."""

    def state(self) -> TrainState:
        """Return the state that training begins with."""
        return TrainState(
            iteration=self.iteration,
            consumed_samples=self.consumed_train_samples,
            dropout_seed=self.dropout_seed,
        )

    def line(self) -> str:
        """Return the first line of the log: fresh, or resumed at which step from where."""
        if self.path is None:
            return "starting a fresh run at iteration 0"
        if self.iteration == 0:
            return f"finetuning at iteration 0 with the weights of {self.path}"
        return (
            f"resumed at iteration {self.iteration} ({self.consumed_train_samples} samples) "
            f"from {self.path}"
        )
