"""What --overlap-moe-expert-parallel-comm gains, on a clock of the test's own: exact anywhere.

A rank runs one thing at a time, so its time is a sum: parts of layers take what the test says, and
who waits for rows moves the clock on to when they land. No wall time is looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tests.helpers.layouts import make_config, make_run, microbatches
from tests.helpers.ranks import run_ranks

LAYERS, MICROBATCHES = 4, 5
FORWARD, BACKWARD = 1.0, 2.0
"""Of attention and of experts alike."""
WAY = 1.0
"""Of rows, out or back."""


class Clock:
    """The time of one rank."""

    def __init__(self) -> None:
        self.now = 0.0
        self._plain = dist.all_to_all_single

    def passes_in(self, module: nn.Module) -> None:
        """Let ``module`` take its time, forward and backward."""

        def forward(_: nn.Module, __: object, output: Any) -> None:
            self._add(FORWARD)
            output[0].register_hook(lambda _: self._add(BACKWARD))

        module.register_forward_hook(forward)

    @contextmanager
    def of_rows(self) -> Iterator[None]:
        """Let rows travel; probs and counts take no time."""
        with patch.object(dist, "all_to_all_single", self._all_to_all):
            yield

    def _all_to_all(self, out: Tensor, *args: Any, async_op: bool = False, **kw: Any) -> Any:
        work = _Work(self, self.now + (WAY if out.dim() == 2 else 0.0))
        self._plain(out, *args, **kw)
        return work if async_op else work.wait()

    def _add(self, time: float) -> None:
        self.now += time


class _Work(NamedTuple):
    clock: Clock
    lands_at: float

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.lands_at)


def _step_time(**options: Any) -> float:
    run = make_run(
        make_config(
            num_layers=LAYERS,
            expert_model_parallel_size=2,
            global_batch_size=4 * MICROBATCHES,
            optimizer="sgd",
            **options,
        )
    )
    clock = Clock()
    for module in run.model.modules():
        if isinstance(module, GroupedMLP):
            clock.passes_in(module)
        if isinstance(module, TransformerLayer):
            clock.passes_in(module.self_attention)
    with clock.of_rows():
        train_step(run, TrainState(dropout_seed=1), microbatches(run, 0))
    return clock.now


def _gain() -> None:
    ways = 2 * LAYERS * WAY  # of one microbatch in one direction
    compute = 2 * LAYERS * (FORWARD + BACKWARD) * MICROBATCHES
    assert _step_time() == compute + 2 * ways * MICROBATCHES
    by_turns = _step_time(overlap_moe_expert_parallel_comm=True)
    assert by_turns == compute + 2 * ways  # of the first forward and of the last backward


def test_only_the_ways_of_the_first_forward_and_of_the_last_backward_are_in_sight():
    run_ranks(_gain, 2)
