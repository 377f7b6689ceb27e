"""Megatron's log lines, to the letter: users' dashboards parse them. Pure text, no state."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import exp


@dataclass(frozen=True, kw_only=True)
class IterationLine:
    """The fields of one iteration line; None leaves an optional field out."""

    iteration: int
    train_iters: int
    consumed_samples: int
    step_ms: float
    learning_rate: float
    global_batch_size: int
    losses: dict[str, float]
    """Mean of each loss over the updates of the interval, in the order shown: ``lm loss`` first."""
    throughput_tflops: float | None = None
    """Model FLOP/s of one rank, in TFLOP/s."""
    loss_scale: float = 1.0
    grad_norm: float | None = None
    skipped_iterations: int = 0
    nan_iterations: int = 0


def format_iteration(line: IterationLine, now: datetime) -> str:
    """Write the line of one log interval, as megatron.training of Megatron-LM prints it.

    A loss that is not finite is shown (``NAN``), where Megatron leaves the field out.
    """
    fields = [
        f" [{now:%Y-%m-%d %H:%M:%S.%f}] iteration {line.iteration:8d}/{line.train_iters:8d}",
        f"consumed samples: {line.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {line.step_ms:.1f}",
    ]
    if line.throughput_tflops is not None:
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {line.throughput_tflops:.1f}")
    fields.append(f"learning rate: {line.learning_rate:.6E}")
    fields.append(f"global batch size: {line.global_batch_size:5d}")
    fields += [f"{name}: {value:.6E}" for name, value in line.losses.items()]
    fields.append(f"loss scale: {line.loss_scale:.1f}")
    if line.grad_norm is not None:
        fields.append(f"grad norm: {line.grad_norm:.3f}")
    fields.append(f"number of skipped iterations: {line.skipped_iterations:3d}")
    fields.append(f"number of nan iterations: {line.nan_iterations:3d}")
    return " | ".join(fields) + " |"


def format_speed(
    *, tokens_per_s: float, remaining_s: float, peak_memory_gib: float | None, loss_drop: float
) -> str:
    """Write the second line of an interval: what Megatron's line does not say.

    Args:
        tokens_per_s: Of the whole world.
        remaining_s: Expected seconds to the last iteration.
        peak_memory_gib: Of this rank: on CUDA of the allocator, else resident memory.
        loss_drop: ln(vocabulary) minus the lm loss, in nats; 0 is guessing.
    """
    fields = [f"   tokens per second: {tokens_per_s:.1f}", f"ETA: {format_duration(remaining_s)}"]
    if peak_memory_gib is not None:
        fields.append(f"peak memory (GiB): {peak_memory_gib:.2f}")
    fields.append(f"nats below ln(vocabulary): {loss_drop:.3f}")
    return " | ".join(fields) + " |"


def format_duration(seconds: float) -> str:
    """Write seconds as ``1 day, 2:03:04`` or ``0:00:07``."""
    return str(timedelta(seconds=round(seconds)))


def format_evaluation(where: str, split: str, loss: float) -> str:
    """Write the result of an evaluation between two lines of dashes.

    Args:
        where: Such as ``iteration 100``.
        split: ``validation`` or ``test``.
        loss: Mean loss of a token; its perplexity is shown too (of at most exp(20)).
    """
    text = (
        f" validation loss at {where} on {split} set | lm loss value: {loss:.6E} "
        f"| lm loss PPL: {exp(min(20.0, loss)):.6E} | "
    )
    rule = "-" * len(text)
    return f"{rule}\n{text}\n{rule}"


def format_memory(rank: int, iteration: int, megabytes: dict[str, float]) -> str:
    """Write Megatron's memory line, shown once after the first iterations on CUDA."""
    fields = [f"{name}: {value}" for name, value in megabytes.items()]
    return f"[Rank {rank}] (after {iteration} iterations) memory (MB) | " + " | ".join(fields)
