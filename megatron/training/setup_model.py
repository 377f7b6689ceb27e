"""Options to the live objects of a run: model, gradient buffers, optimizer, schedule, metrics."""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from megatron.core.distributed.data_parallel_base import DataParallelBase
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.errors import ConfigError
from megatron.core.lanes import Lanes
from megatron.core.num_microbatches_calculator import NumMicroBatches
from megatron.core.optimizer.grad_scaler import build_grad_scaler
from megatron.core.optimizer.optimizer import get_megatron_optimizer
from megatron.core.param_role import deferred_init, logical_shards, role_of
from megatron.core.pipeline_parallel.executor import Message, PipelineExecutor
from megatron.core.pipeline_parallel.layer_homes import schedule_of, split_of, stages_of_rank
from megatron.core.pipeline_parallel.layer_split import layout_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.precision import params_dtype
from megatron.training.config.run_config import RunConfig
from megatron.training.initialize import World
from megatron.training.run import ForwardStep, Run
from megatron.training.schedule_settings import build_scheduler
from megatron.training.start_clock import start_clock

log = logging.getLogger(__name__)

ModelProvider = Callable[[RunConfig, ProcessGroupCollection], nn.Module]
"""``model_provider(config, pg_collection)``: the model on the CPU, its weights not yet drawn."""


def setup_run(
    config: RunConfig, world: World, model_provider: ModelProvider, forward_step: ForwardStep
) -> Run:
    """Build everything a step needs; the same weights on every layout for the same seed."""
    groups = world.pg_collection
    with deferred_init():
        model = model_provider(config, groups)
    _refuse_other_stages(model, config, groups)
    init_weights(model, config.training.seed)
    model = share_out(config, world, model)
    model.train()
    start_clock.mark("model")
    num_microbatches = microbatches(config, world).count
    run = Run(
        config=config,
        world=world,
        model=model,
        optimizer=get_megatron_optimizer(
            config.optimizer,
            model,
            pg_collection=groups,
            grad_scaler=build_grad_scaler(config.optimizer, fp16=config.model.fp16),
        ),
        scheduler=build_scheduler(config),
        forward_step=forward_step,
        pipeline=build_pipeline(config, world, num_microbatches),
        num_microbatches=num_microbatches,
        moe_metrics=build_moe_metrics(config, world, num_microbatches),
    )
    start_clock.mark("optimizer")
    _tell_stages(config, run)
    _tell_parameters(model, world)
    return run


def share_out(config: RunConfig, world: World, model: nn.Module) -> DataParallelBase:
    """Bring ``model`` to the device, with gradients that are summed over data ranks."""
    groups = world.pg_collection
    if config.ddp.use_torch_fsdp2:
        from megatron.core.distributed.torch_fully_sharded_data_parallel import (
            TorchFullyShardedDataParallel,
        )

        return TorchFullyShardedDataParallel(
            config.ddp, model, pg_collection=groups, device=world.device
        )
    return DistributedDataParallel(
        config.ddp, model.to(world.device), pg_collection=groups, device=world.device
    )


def microbatches(config: RunConfig, world: World) -> NumMicroBatches:
    """Return the split of a global batch over ranks and microbatches."""
    training = config.training
    return NumMicroBatches(
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_size=world.pg_collection.dp.size(),
    )


def build_pipeline(config: RunConfig, world: World, num_microbatches: int) -> PipelineExecutor:
    """Return what takes the microbatches of a step through the stages."""
    model, groups = config.model, world.pg_collection
    length = config.data.seq_length // groups.cp.size()
    if model.sequence_parallel:
        length //= groups.tp.size()
    shape = (length, config.training.micro_batch_size, model.hidden_size)
    message = Message(shape, params_dtype(model), world.device)
    lanes = Lanes() if model.overlap_moe_expert_parallel_comm else None
    return PipelineExecutor(
        schedule_of(model, num_microbatches),
        groups.pp,
        message,
        lanes=lanes,
        weights_while_waiting=model.delay_wgrad_compute,
    )


def _refuse_other_stages(
    model: nn.Module, config: RunConfig, groups: ProcessGroupCollection
) -> None:
    """A model that ignores the stages would train as several models one behind the other."""
    wanted = stages_of_rank(config.model, groups.pp.rank())
    if groups.pp.size() > 1 and getattr(model, "stages", None) != wanted:
        raise ConfigError(
            f"model_provider built a {type(model).__name__} that is not made of the stages of this "
            f"pipeline rank ({wanted}): give them to GPTModel as stages=stages_of_rank("
            "config.model, pg_collection.pp.rank()), as pretrain_gpt.py does"
        )


def build_moe_metrics(
    config: RunConfig, world: World, num_microbatches: int
) -> MoEMetricsTracker | None:
    """Return the slots that routers write their counts into; None without MoE layers."""
    model = config.model
    if not model.moe_layers:
        return None
    return MoEMetricsTracker(
        model.moe_layers,
        num_experts=model.moe_experts_by_layer,
        topk=model.moe_topk_by_layer,
        num_microbatches=num_microbatches,
        device=world.device,
    )


def _tell_stages(config: RunConfig, run: Run) -> None:
    """Say what the stages of a pipeline hold, and in which order ranks go through them."""
    schedule = run.pipeline.schedule
    if schedule.pp == 1:
        return
    log.info(
        " > pipeline: schedule %s over %d ranks, %d microbatches a step; stages (E embedding, t "
        "layer, L output layer): %s",
        schedule.name,
        schedule.pp,
        schedule.num_microbatches,
        layout_of(split_of(config.model)),
    )


def _tell_parameters(model: DataParallelBase, world: World) -> None:
    """Say how many parameters this rank and the whole model have."""
    here = sum(param.numel() for _, param in model.trainable_parameters())
    whole = {False: 0, True: 0}  # in experts or not; of this rank's experts, slices made whole
    stages = world.pg_collection.pp
    for name, param in model.trainable_parameters():
        role = role_of(param)
        if role.tied_ends == "apart" and stages.rank() > 0:
            continue  # the copy of the last stage
        outline = torch.empty(param.shape, device="meta")  # a shard cannot be cut into experts
        shapes = {shard.name: shard.shape for shard in logical_shards(name, outline, role)}
        whole[role.is_expert] += sum(math.prod(shape) for shape in shapes.values())
    counts = torch.tensor([whole[False], whole[True]], device=world.device)
    dense, experts = all_reduce_sum(stages, counts).tolist()
    ep_size, etp_size = world.pg_collection.ep.size(), world.pg_collection.expt_tp.size()
    log.info(
        " > number of parameters on (tensor, pipeline) model parallel rank (%d, %d): %d",
        world.pg_collection.tp.rank(),
        world.pg_collection.pp.rank(),
        here,
    )
    log.info(
        " > number of parameters of the whole model: %d (%d of them in experts, spread over %d "
        "expert-parallel rank%s%s)",
        dense + experts * ep_size,
        experts * ep_size,
        ep_size,
        "s" if ep_size > 1 else "",
        f", each expert over {etp_size}" if etp_size > 1 and experts else "",
    )
