"""Whole training steps of one rank on a GPU that is not there; see ``pretended_device``."""

from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.optim import Optimizer
from torch.utils import checkpoint

from megatron.core.extensions import triton_ops
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.dry_run.recorded_collectives import EventLog, recorded
from megatron.training.initialize import World
from megatron.training.run import TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import StepOutcome, train_step
from pretrain_gpt import forward_step, model_provider
from tests.helpers.layouts import make_config, microbatches
from tests.helpers.pretended_device import CPU, CUDA, pretended_device


class Steps(NamedTuple):
    """What two steps gave."""

    outcomes: list[StepOutcome]
    waits: list[tuple[str, str]]
    """Of the second step."""


def _outline(x: torch.Tensor) -> dict[str, Any]:
    """What a recomputed tensor has in common with the saved one; torch adds the device's name."""
    return {"shape": x.shape, "dtype": x.dtype}


def _grouped(plain: Any, lists: Any, with_indices: bool = False) -> Any:
    """Let torch's optimizers take the parameters for what they say they are."""
    found = plain(lists, with_indices)
    return {(group[0][0].device, key[1]): (group, at) for key, (group, at) in found.items()}


def run_steps(*, on_cuda: bool, **options: Any) -> Steps:
    """Train two steps; collectives of a group of one are no-ops."""
    config = make_config(**{"hidden_dropout": 0.0, "attention_dropout": 0.0} | options)
    groups = GroupTable(config.model.layout(1)).collection(0)
    outcomes = []
    name = "_group_tensors_by_device_and_dtype"
    grouped = partial(_grouped, getattr(Optimizer, name))
    with (
        mock.patch.object(triton_ops, "unusable", return_value="the memory is a CPU's"),
        mock.patch.object(Optimizer, name, staticmethod(grouped)),
        mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_outline),
        recorded(EventLog(tells_completion=True), groups.world),
        pretended_device() as waits,
    ):
        device = CUDA if on_cuda else CPU
        world = World(rank=0, world_size=1, device=device, pg_collection=groups)
        torch.manual_seed(1)
        run = setup_run(config, world, model_provider, forward_step)
        for _ in range(2):
            waits.clear()
            outcomes.append(train_step(run, TrainState(), microbatches(run, 0)))
        return Steps(outcomes, list(waits))
