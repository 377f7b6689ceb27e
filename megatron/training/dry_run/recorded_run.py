"""One rank's step, run without data: the real model, forward, backward and optimizer, recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.lanes import Lanes
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.transformer.forward_context import ForwardContext
from megatron.training.checkpoint_state import TrainState
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.dry_run.events import Event
from megatron.training.dry_run.known_values import KnownValues, LiveStorages
from megatron.training.dry_run.rank_groups import GroupTable, RankGroup
from megatron.training.dry_run.recorded_collectives import EventLog, recorded
from megatron.training.dry_run.replay import Replay
from megatron.training.dry_run.stand_ins import stand_ins, take_device_path
from megatron.training.initialize import World
from megatron.training.run import ForwardStep, Run
from megatron.training.setup_model import ModelProvider, setup_run
from megatron.training.train_step import train_step


class MemoryUse(NamedTuple):
    """Bytes of one rank."""

    weights: int
    """Parameters and buffers of the model."""
    gradients: int
    optimizer: int
    """Main weights that are no weights of the model, and moments."""
    activations: int
    """At the peak of the step, above what is there all the time: kept for backward, and what is
    made for a moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """What one rank did in one step."""

    rank: int
    events: tuple[Event, ...]
    memory: MemoryUse


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is needed to record any rank of a run."""

    config: RunConfig
    layout: ParallelLayout
    model_provider: ModelProvider
    forward_step: ForwardStep
    device: str
    """Whose kernels are counted: ``cuda`` or ``cpu``."""

    def groups(self) -> GroupTable:
        """Return the groups of all ranks."""
        return GroupTable(self.layout)


def record_step(
    recipe: Recipe, table: GroupTable, rank: int, replay: Replay | None = None
) -> RecordedStep:
    """Run the step of ``rank`` on tensors without data.

    Args:
        recipe: Of the run.
        table: Groups of all ranks.
        rank: Which rank this process is.
        replay: What is known of layers; None runs every layer of every microbatch.
    """
    world_group = table.collection(rank).world
    log = EventLog(tells_completion=recipe.device == "cuda")
    values = KnownValues()
    assert isinstance(world_group, RankGroup), "a dry run has stand-ins for groups"
    modes = (FakeTensorMode(), values)
    experts = recipe.config.model.expert_model_parallel_size
    with stand_ins(recipe.device, experts), recorded(log, world_group), _in_every_lane(modes):
        run = _run(recipe, table, rank)
        log.events.clear()
        log.num_posts = 0
        static = _static(run)
        before = values.live.now
        values.live.peak = before
        with _replayed(run, replay, log, values.live):
            train_step(run, TrainState(dropout_seed=recipe.config.training.seed), _batches(run))
        activations = values.live.peak - before
    return RecordedStep(rank=rank, events=tuple(log.events), memory=MemoryUse(*static, activations))


@contextmanager
def _in_every_lane(modes: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter ``modes``, also in the thread of a lane: torch keeps them for each thread."""
    plain = Lanes.run_pair

    def entered(work: Callable[[], Any]) -> Any:
        with modes[0], modes[1]:
            return work()

    def run_pair(lanes: Lanes, forward: Any, backward: Any) -> Any:
        return plain(lanes, forward, lambda: entered(backward))

    with mock.patch.object(Lanes, "run_pair", run_pair), modes[0], modes[1]:
        yield


@contextmanager
def _replayed(run: Run, replay: Replay | None, log: EventLog, live: LiveStorages) -> Iterator[None]:
    if replay is None or run.pipeline.lanes is not None:  # turns are taken inside a layer
        yield
        return
    ddp = run.config.ddp
    overlaps = ddp.overlap_grad_reduce or ddp.overlap_param_gather
    last = {(step.microbatch, step.chunk) for step in run.pipeline.last_backwards}

    def is_real(context: ForwardContext) -> bool:
        return overlaps and (context.microbatch, context.chunk) in last

    # what is run aside must not count as the last microbatch
    kinds = {step.kind for steps in run.pipeline.schedule.steps for step in steps}
    with replay.active(log, live, is_real, run.model.no_sync, "W" in kinds):
        yield


def _run(recipe: Recipe, table: GroupTable, rank: int) -> Run:
    world = World(
        rank=rank,
        world_size=recipe.layout.world_size,
        device=torch.device("cpu"),
        pg_collection=table.collection(rank),
    )
    run = setup_run(recipe.config, world, recipe.model_provider, recipe.forward_step)
    take_device_path(run.model, recipe.device)
    return run


def _static(run: Run) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state."""
    assert isinstance(run.model, DistributedDataParallel), "the rules let no other model come here"
    buffers = run.model.grad_buffers
    weights = {b.param_data for b in buffers} | set(run.model.module.buffers())
    gradients = {b.grad_data for b in buffers}
    known = {t.untyped_storage()._cdata for t in (*weights, *gradients)}
    state: list[Tensor] = []
    optimizer: Any = run.optimizer
    for group in optimizer.param_groups:
        for main in group["params"]:
            state.append(main)
            tensors = optimizer._flat_step.optimizer.state[main].values()
            state += [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state}
    rest = sum(size for key, size in own.items() if key not in known)
    return _bytes(weights), _bytes(gradients), rest


def _bytes(tensors: set[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _batches(run: Run) -> Iterator[Batch]:
    size, length = run.config.training.micro_batch_size, run.config.data.seq_length
    for index in range(run.num_microbatches):
        ids = torch.arange(size * length).view(size, length) % run.padded_vocab_size
        yield Batch(
            tokens=ids,
            labels=ids,
            loss_mask=torch.ones(size, length),
            position_ids=torch.arange(length).expand(size, length).contiguous(),
            attention_mask=None,
            sample_ids=tuple(range(index * size, (index + 1) * size)),
        )
