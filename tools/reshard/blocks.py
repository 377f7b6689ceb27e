"""Everything a rank holds that a checkpoint must bring back, by global key, as views.

Walks the parameters and the optimizer itself, not the lists that saving and loading go by: what
those leave out is seen here.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.core.param_blocks import ParamBlocks, block_shards
from megatron.core.param_role import (
    GATED_PARTS,
    LogicalShard,
    ParamRole,
    deferred_init,
    logical_shards,
    role_of,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.config.run_config import RunConfig
from megatron.training.run import Run
from pretrain_gpt import model_provider
from tools.reshard.differences import Keyed

POISON = 777
"""Counts of an optimizer that waits for a checkpoint."""


def blocks_of(run: Run) -> Iterator[Keyed]:
    """Yield (global key, block) of weights, buffers and optimizer state of this rank; views.

    Rounded copies where a fully sharded model keeps fp32 weights only.
    """
    run.model.finish_param_sync()
    if isinstance(run.model, TorchFullyShardedDataParallel):
        for name, role, part in run.model.saved_weights():
            yield from _keyed("model.", block_shards(name, part, role), role)
    else:
        for name, param in run.model.module.named_parameters():
            role = role_of(param)
            yield from _keyed("model.", logical_shards(name, param.detach(), role), role)
    for name, buffer in _kept_buffers(run.model.module):
        yield f"model.{name}", LogicalShard(name, buffer, tuple(buffer.shape), (0,) * buffer.dim())
    for name, role, states in run.optimizer.named_state():
        for state, tensor in states.items():
            shards = (
                block_shards(name, tensor, role)
                if isinstance(tensor, ParamBlocks)
                else logical_shards(name, tensor.detach(), role)
            )
            yield from _keyed(f"optimizer.{state}.", shards, role)


@torch.no_grad()
def poison(run: Run) -> None:
    """Make everything that loading must write into something that no run has."""
    for _, block in blocks_of(run):
        block.tensor.fill_(float("nan") if block.tensor.is_floating_point() else -POISON)
    run.optimizer.step_count = POISON
    scale = {"scale": 2.0**24, "growth_tracker": POISON, "hysteresis_tracker": 1}
    run.optimizer.grad_scaler.load_state_dict(scale)  # kept by one that moves


def elements_of_model(config: RunConfig, states: int) -> dict[str, int]:
    """Count parameters and buffers of the whole model, built anew on one process of no memory.

    Args:
        config: Of one process.
        states: Tensors of the optimizer for each parameter.

    Returns:
        ``weights`` (buffers too) and ``state``, elements.
    """
    fields = ProcessGroupCollection.__dataclass_fields__
    alone = ProcessGroupCollection(**{name: dist.ProcessGroup(0, 1) for name in fields})
    with torch.device("meta"), deferred_init():
        model = model_provider(config, alone)
    weights = sum(param.numel() for param in model.parameters())
    buffers = sum(buffer.numel() for _, buffer in _kept_buffers(model))
    return {"weights": weights + buffers, "state": states * weights}


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def _keyed(prefix: str, shards: Iterator[LogicalShard], role: ParamRole) -> Iterator[Keyed]:
    is_gated = role.split is not None and role.split.names == GATED_PARTS
    for shard in shards:
        for one in _halves(shard) if is_gated else (shard,):
            yield prefix + one.name, one


def _halves(shard: LogicalShard) -> Iterator[LogicalShard]:
    """Cut a block of gate and up, one behind the other in the parameter, into blocks of each."""
    head, _, tail = shard.name.rpartition(".")
    rows, first = shard.shape[0] // 2, shard.offset[0]
    for number, half in enumerate(GATED_PARTS):
        low = max(first, number * rows)
        high = min(first + shard.tensor.shape[0], (number + 1) * rows)
        if low < high:
            yield LogicalShard(
                f"{head}.{half}.{tail}",
                shard.tensor[low - first : high - first],
                (rows, *shard.shape[1:]),
                (low - number * rows, *shard.offset[1:]),
            )
