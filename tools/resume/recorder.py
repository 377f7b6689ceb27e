"""Writes down what a run does, step by step and rank by rank; see ``RunObserver``.

A line a step: which samples were read, what came out, with which rates, and where counters and
generators stand. Tensors are written after loading and after the steps that are asked for.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.core.dist_checkpointing.rng_state import capture_rng_state
from megatron.training.datasets.batch import Batch
from megatron.training.run import ForwardStep, LossFunction, Run, TrainState
from megatron.training.train_step import StepOutcome
from tools.resume.record_names import LOADED, STEP, after_step_folder, steps_file
from tools.resume.state_files import live_blocks, write_state

# odd numbers of 64 bits: what a token is multiplied by, by what it is
_TOKEN, _LABEL, _POSITION, _COUNTS, _MIX = (
    0x1E3779B97F4A7C15,
    0x3F58476D1CE4E5B9,
    0x14D049BB133111EB,
    0x2545F4914F6CDD1D,
    0x6C62272E07BB0143,
)


class Recorder:
    """Observes one run; every rank has its own."""

    def __init__(self, folder: Path, *, keep_loaded: bool, keep_after: frozenset[int]) -> None:
        """Record into ``folder``.

        Args:
            folder: Gets a file of lines for each rank and the folders of tensors.
            keep_loaded: Write the tensors before the first step.
            keep_after: Iterations after which tensors are written.
        """
        self._folder = folder
        self._keep_loaded = keep_loaded
        self._keep_after = keep_after
        self._samples: dict[int, int] = {}

    def watched(self, forward_step: ForwardStep) -> ForwardStep:
        """Return ``forward_step``, noting what it reads in training.

        It also draws from the global generators before each microbatch, as a user's own code may:
        no step of the framework does, and generators that never move compare equal for nothing.
        """

        def forward(
            data_iterator: Iterator[Batch], model: Callable[..., Tensor]
        ) -> tuple[Tensor, LossFunction]:
            batch = next(data_iterator)
            if torch.is_grad_enabled():  # evaluations are not
                self._samples.update(zip(batch.sample_ids, fingerprints(batch), strict=True))
                _draw()
            return forward_step(iter((batch,)), model)

        return forward

    def after_load(self, run: Run, state: TrainState) -> None:
        """See RunObserver.after_load."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._keep_loaded:
            write_state(self._folder / LOADED, run.world.rank, live_blocks(run))
        groups = run.world.pg_collection
        place = {axis: getattr(groups, axis).rank() for axis in ("tp", "cp", "pp")}
        self._write(run, {"event": LOADED, **place, **_standing(run, state)})

    def after_step(self, run: Run, state: TrainState, outcome: StepOutcome) -> None:
        """See RunObserver.after_step."""
        line = {
            "event": STEP,
            "samples": list(self._samples.items()),
            "rates": _rates(run),
            "loss": outcome.lm_loss,
            "grad_norm": outcome.grad_norm,
            "updated": outcome.updated,
            **_standing(run, state),
        }
        self._samples.clear()
        if state.iteration in self._keep_after:
            folder = self._folder / after_step_folder(state.iteration)
            write_state(folder, run.world.rank, live_blocks(run))
        self._write(run, line)

    def _write(self, run: Run, line: dict[str, Any]) -> None:
        with (self._folder / steps_file(run.world.rank)).open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def _standing(run: Run, state: TrainState) -> dict[str, Any]:
    """Return where a run stands, tensors left out."""
    generators = capture_rng_state()
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "optimizer_steps": run.optimizer.step_count,
        "dropout_seed": state.dropout_seed,
        "loss_scale": loss_scale(run),
        "generators": {name: _digest(tensor) for name, tensor in generators.items()},
    }


def loss_scale(run: Run) -> dict[str, Any] | None:
    """Return all that the loss scale remembers, saved or not; None where it is a constant."""
    scaler = run.optimizer.grad_scaler
    if scaler.state_dict() is None:
        return None
    return {name.removeprefix("_"): value for name, value in vars(scaler).items()}


def _rates(run: Run) -> list[list[float]]:
    """Return the pairs of learning rate and weight decay that this rank steps with."""
    groups = run.optimizer.param_groups
    return sorted({(group["lr"], group["weight_decay"]) for group in groups if group["params"]})


def fingerprints(batch: Batch) -> list[int]:
    """Return a number for each sample, of its tokens, labels, positions and mask.

    That of a sequence is the sum, modulo 2^64, of those of its slices.
    """
    mixed = batch.tokens * _TOKEN + batch.labels * _LABEL + batch.position_ids * _POSITION
    mixed += batch.loss_mask.float().view(torch.int32).long() * _COUNTS
    mixed ^= mixed >> 29  # else the sum would not tell which token stands where
    return (mixed * _MIX).sum(dim=1).tolist()


def _draw() -> None:
    random.random()
    np.random.random()
    torch.rand(())
    if torch.cuda.is_initialized():
        torch.rand((), device="cuda")


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
