"""From options to the routing trace of a run: where it goes, and how much of it is left."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron.core.errors import ConfigError, DataError
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router_trace import RouterTracer, TraceLimits
from megatron.core.transformer.moe.router_trace_files import (
    RoutingTrace,
    TraceIndex,
    next_start,
    write_index,
)
from megatron.training.initialize import World
from megatron.training.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What rank 0 found out and all ranks go by."""

    start: str = ""
    """Name of the folder of this start."""
    steps: int = 0
    """Traced by earlier starts, up to the one that this start goes on from."""
    size: int = 0
    """Bytes of rank 0 in them."""
    error: str = ""
    """Why the folder cannot be used; empty when it can."""


def open_tracer(run: Run, iteration: int) -> RouterTracer | None:
    """Begin a new part of the trace of ``run`` after ``iteration``; None when none is wanted.

    Collective over all ranks. Where experts choose, a token may have all of them, and there are as
    many columns.

    Raises:
        ConfigError: --moe-routing-trace-path cannot be written or holds something else.
    """
    config, world, metrics = run.config.logging, run.world, run.moe_metrics
    if config.moe_routing_trace_path is None or metrics is None:
        return None
    folder = Path(config.moe_routing_trace_path)
    by_expert = run.config.model.chooses_by_expert
    columns = metrics.num_experts if by_expert else metrics.topk
    found = [_plan(folder, world, metrics, iteration, columns) if world.is_first else None]
    dist.broadcast_object_list(found, src=0, group=world.pg_collection.world)
    plan = found[0]
    assert plan is not None, "rank 0 made a plan"
    if plan.error:
        raise ConfigError(f"--moe-routing-trace-path {folder} cannot be used: {plan.error}")
    most = config.moe_routing_trace_max_training_iters
    limits = TraceLimits(
        max_steps=None if most is None else max(most - plan.steps, 0),
        max_bytes=int(config.moe_routing_trace_max_mb * 1e6) - plan.size,
    )
    try:
        return RouterTracer(
            folder / plan.start,
            world.rank,
            moe_layers=metrics.moe_layers,
            num_experts=metrics.num_experts,
            topk=columns,
            limits=limits,
        )
    except OSError as error:
        raise ConfigError(f"--moe-routing-trace-path {folder} cannot be written: {error}") from None


def _plan(
    folder: Path,
    world: World,
    metrics: MoEMetricsTracker,
    iteration: int,
    columns: Sequence[int],
) -> _Plan:
    start = next_start(folder, iteration)
    index = TraceIndex(
        first_step=iteration,
        world_size=world.world_size,
        moe_layers=list(metrics.moe_layers),
        num_experts=list(metrics.num_experts),
        topk=list(columns),
    )
    try:
        write_index(folder / start, index)
        trace = RoutingTrace(folder)  # without the steps that this start will make again
        plan = _Plan(start=start, steps=len(trace.steps), size=trace.bytes_of(0))
    except (OSError, DataError) as error:
        return _Plan(error=str(error))
    log.info(" > routing trace: %s (%d steps of earlier starts)", folder / start, plan.steps)
    return plan
