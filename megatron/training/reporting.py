"""Turns steps into log lines, JSON lines and scalars. Collects over a log interval, then reports.

Every rank records every step, because the report on experts is a collective; only rank 0 writes.
"""

import logging
import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime

import torch

from megatron.core.transformer.moe.moe_report import MoEReport
from megatron.training import log_line
from megatron.training.metrics import EVALUATIONS, EXPERT_LOAD, STEPS, MetricsWriter
from megatron.training.run import Run, TrainState
from megatron.training.throughput import flops_per_token
from megatron.training.train_step import StepOutcome

log = logging.getLogger(__name__)

MAX_PPL_LOSS = 20.0
"""Losses from here on, and those that are no number, have no useful perplexity."""


class Reporter:
    """Sums the steps since the last line."""

    def __init__(self, run: Run, writer: MetricsWriter | None, *, vocab_size: int) -> None:
        """Begin the first interval now.

        Args:
            run: The run to report on.
            writer: Files and TensorBoard; None on every rank but the first.
            vocab_size: Ids of the tokenizer: guessing among them costs ln(vocab_size) nats.
        """
        self._run = run
        self._writer = writer
        self._guessing = math.log(vocab_size)
        self._flops_per_step = (
            flops_per_token(
                run.config.model, seq_length=run.seq_length, vocab_size=run.padded_vocab_size
            )
            * run.global_batch_size
            * run.seq_length
        )
        self._first = True
        self._step_began = time.perf_counter()
        self._begin()

    def _begin(self) -> None:
        self._steps = self._skipped = self._nans = self._losses = 0
        self._seconds = self._loss_sum = 0.0
        self._mtp_sums = [0.0] * self._run.config.model.mtp_depths

    def resume_clock(self) -> None:
        """Leave out the time since the last step: it was spent on saving or evaluating."""
        self._step_began = time.perf_counter()

    def record(self, state: TrainState, outcome: StepOutcome, *, is_last: bool = False) -> None:
        """Take in the step that led to ``state``; print at the end of an interval.

        Collective at the end of an interval, and at the last step: all ranks must agree on it.
        """
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        self._steps += 1
        self._seconds += seconds
        self._skipped += not outcome.updated
        self._nans += not math.isfinite(outcome.lm_loss)
        if outcome.updated or outcome.is_search:
            self._losses += 1
            self._loss_sum += outcome.lm_loss
            for depth, value in enumerate(outcome.mtp_losses):
                self._mtp_sums[depth] += value
        interval = self._run.config.logging.log_interval
        is_due = self._first or is_last or state.iteration % interval == 0
        report = None
        if is_due and self._run.moe_metrics is not None:
            report = self._run.moe_metrics.report(self._run.world.pg_collection)
        if self._writer is not None:
            self._write(self._writer, state, outcome, seconds, report)
            if is_due:
                self._print(state, outcome, report)
        if is_due:
            self._first = False
            self._begin()

    def _print(self, state: TrainState, outcome: StepOutcome, report: MoEReport | None) -> None:
        step_s = self._seconds / self._steps
        loss = self._loss_sum / self._losses if self._losses else math.nan
        run = self._run
        losses = {"lm loss": loss}
        losses |= _mtp_named([total / max(self._losses, 1) for total in self._mtp_sums], " loss")
        losses |= report.losses() if report is not None else {}
        tflops = self._flops_per_step / step_s / run.world.world_size / 1e12
        line = log_line.IterationLine(
            iteration=state.iteration,
            train_iters=run.train_iters,
            consumed_samples=state.consumed_samples,
            step_ms=1e3 * step_s,
            learning_rate=outcome.learning_rate,
            global_batch_size=run.global_batch_size,
            losses=losses,
            throughput_tflops=tflops if run.config.logging.log_throughput else None,
            loss_scale=outcome.loss_scale,
            grad_norm=outcome.grad_norm,
            skipped_iterations=self._skipped,
            nan_iterations=self._nans,
        )
        log.info(log_line.format_iteration(line, datetime.now()))
        log.info(
            log_line.format_speed(
                tokens_per_s=run.global_batch_size * run.seq_length / step_s,
                remaining_s=step_s * (run.train_iters - state.iteration),
                peak_memory_gib=peak_memory_gib(run.world.device),
                loss_drop=self._guessing - loss,
            )
        )
        self._print_experts(report)
        if self._first and run.world.device.type == "cuda":
            log.info(log_line.format_memory(run.world.rank, state.iteration, cuda_megabytes()))

    def _print_experts(self, report: MoEReport | None) -> None:
        if report is None:
            return
        for text in report.lines():
            log.info(text)
        if self._skipped == self._steps:
            return  # where nothing was learned there is nothing to mend in the routing
        for text in report.warnings():
            log.warning(text)

    def _write(
        self,
        writer: MetricsWriter,
        state: TrainState,
        outcome: StepOutcome,
        seconds: float,
        report: MoEReport | None,
    ) -> None:
        run = self._run
        step_tokens = run.global_batch_size * run.seq_length
        moe: dict[str, float] = {}
        if report is not None:
            moe = report.scalars(per_layer_losses=run.config.logging.moe_per_layer_logging)
        values = {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_samples * run.seq_length,
            "lm_loss": outcome.lm_loss,
            **_mtp_named(outcome.mtp_losses, "_loss"),
            "learning_rate": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "loss_scale": outcome.loss_scale,
            "updated": outcome.updated,
            "step_ms": 1e3 * seconds,
            "tokens_per_second": step_tokens / seconds,
        }
        writer.line(STEPS, values | moe)
        if report is not None:
            writer.line(EXPERT_LOAD, _expert_load(state, report))
        writer.scalars(state.iteration, self._megatron_scalars(state, outcome, seconds))
        if report is not None:
            writer.scalars(state.iteration, report.losses() | moe, always=True)

    def _megatron_scalars(
        self, state: TrainState, outcome: StepOutcome, seconds: float
    ) -> dict[str, float]:
        run = self._run
        values = {
            "learning-rate": outcome.learning_rate,
            "batch-size": float(run.global_batch_size),
            "lm loss": outcome.lm_loss,
            **_mtp_named(outcome.mtp_losses, " loss"),
            "loss-scale": outcome.loss_scale,
            "world-size": float(run.world.world_size),
            "iteration-time": seconds,
            "throughput": self._flops_per_step / seconds / run.world.world_size / 1e12,
            "tokens-per-second": run.global_batch_size * run.seq_length / seconds,
        }
        if outcome.grad_norm is not None:
            values["grad-norm"] = outcome.grad_norm
        return values

    def evaluation(self, state: TrainState, split: str, loss: float) -> None:
        """Print and keep the result of an evaluation.

        Args:
            state: Where training stands.
            split: ``validation`` or ``test``.
            loss: Mean loss of a token, in nats.
        """
        if self._writer is not None:
            where = f"iteration {state.iteration}"
            log.info(log_line.format_evaluation(where, split, loss))
            values = {"iteration": state.iteration, "split": split, "lm_loss": loss}
            self._writer.line(EVALUATIONS, values)
            scalars = {
                f"lm loss {split}": loss,
                f"lm loss {split} ppl": math.exp(loss) if loss < MAX_PPL_LOSS else math.inf,
            }
            self._writer.scalars(state.iteration, scalars, always=True)
        self.resume_clock()


def _mtp_named(losses: Sequence[float], ending: str) -> dict[str, float]:
    """Name the losses of multi-token prediction, from depth 1, as Megatron does."""
    return {f"mtp_{depth}{ending}": loss for depth, loss in enumerate(losses, start=1)}


def _expert_load(state: TrainState, report: MoEReport) -> dict[str, object]:
    return {
        "iteration": state.iteration,
        "moe_layers": [use.layer for use in report.layers],
        "tokens_per_expert": [use.tokens_per_expert.tolist() for use in report.layers],
        "max_violation": [use.max_violation for use in report.layers],
    }


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory this process had so far, in GiB; None where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def cuda_megabytes() -> dict[str, float]:
    """Return the allocator's figures under Megatron's names."""
    figures = {
        "allocated": torch.cuda.memory_allocated(),
        "max allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "max reserved": torch.cuda.max_memory_reserved(),
    }
    return {name: count / 2**20 for name, count in figures.items()}
