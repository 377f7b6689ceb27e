"""The optimizer of a fully sharded model (ZeRO-3): a rank steps what it keeps, nothing else.

What is stepped are the main weights in fp32 (fp64); the units of the model are rounded from them
when they are gathered, so that nothing is sent after a step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.core.distributed.param_and_grad_buffer import main_dtype
from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.core.optimizer.base_optimizer import BaseOptimizer, NamedState, StepResult
from megatron.core.optimizer.clip_grads import sum_of_squares, sum_over_ranks
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.grad_scaler import GradScaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.param_blocks import ParamBlocks
from megatron.core.process_groups_config import ProcessGroupCollection


class FullyShardedOptimizer(BaseOptimizer):
    """Steps the shards of a model; see BaseOptimizer."""

    def __init__(
        self,
        config: OptimizerConfig,
        ddp: TorchFullyShardedDataParallel,
        *,
        pg_collection: ProcessGroupCollection,
        grad_scaler: GradScaler,
    ) -> None:
        """Make moments (zeros) for every shard of a trainable parameter of ``ddp``."""
        self.grad_scaler = grad_scaler
        self._ddp = ddp
        self._group = pg_collection.dp_cp
        members: dict[bool, list[Tensor]] = {}
        for shard in ddp.shards:
            mains = members.setdefault(shard.role.decays, [])
            if shard.weight.numel():
                shard.weight.grad = shard.gradient
                mains.append(shard.weight)
        groups = [
            {
                "params": members[decays],
                "wd_mult": float(decays),
                "lr_mult": 1.0,
                "weight_decay": config.weight_decay * decays,
            }
            for decays in (True, False)
            if decays in members
        ]
        self._flat_step = FlatStep(config, groups)

    @torch.no_grad()
    def step(self) -> StepResult:
        """See BaseOptimizer.step."""
        return self._clip_and_step(self._grad_norm())

    def named_state(self) -> Iterator[NamedState]:
        """See BaseOptimizer.named_state."""
        model = self._ddp.model_dtype
        has_main = model != main_dtype(model)  # else the weights are the main weights
        for shard in self._ddp.shards:
            kept: dict[str, Tensor | ParamBlocks] = {}
            if shard.weight.numel():
                tensors = self._flat_step.moments(shard.weight)
                if has_main:
                    tensors["main_param"] = shard.weight
                for name, tensor in tensors.items():
                    kept[name] = ParamBlocks(shard.shape, ((shard.offset, tensor),))
            yield NamedState(shard.name, shard.role, kept)

    def after_load(self, *, with_optim: bool = True) -> None:
        """Do nothing: main weights are the only ones (see ``take_weights`` of the model)."""

    def _grad_norm(self) -> Tensor:
        """Return the norm: every element is on one rank of ``dp_cp``, experts' too."""
        total = torch.zeros((), dtype=torch.float64, device=self._ddp.device)
        for flat in self._ddp.grad_buffers:
            total = total + sum_of_squares(flat)
        return sum_over_ranks(total, self._group).sqrt()
