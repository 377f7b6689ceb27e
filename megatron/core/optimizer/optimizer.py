"""The optimizer of a model in flat buffers: global norm, clipping, step, and state by parameter.

fp32 and fp64 models are stepped in place. bf16 models have fp32 main weights, which are stepped
and then rounded into the model; the model's own weights are never read.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer, main_dtype
from megatron.core.optimizer.clip_grads import global_grad_norm, owned_gradients
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import plan_param_groups
from megatron.core.param_role import ParamRole, role_of
from megatron.core.process_groups_config import ProcessGroupCollection


class StepResult(NamedTuple):
    """What became of one step; the same on all ranks."""

    update_successful: bool
    """False: the gradient was not finite and nothing was changed, on no rank."""
    grad_norm: float | None
    """Global L2 norm before clipping."""


class NamedState(NamedTuple):
    """The optimizer state of one parameter; writing to ``tensors`` writes the state."""

    name: str
    """Name of the parameter in the model."""
    role: ParamRole
    """Role of the parameter."""
    tensors: dict[str, Tensor]
    """Views shaped like the parameter: the moments and, of a bf16 model, ``main_param``."""


class MegatronOptimizer:
    """Steps the flat buffers of a model.

    ``param_groups`` are torch's; a schedule sets ``lr`` and ``weight_decay`` in them, the latter
    times the group's ``wd_mult``.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        ddp: DistributedDataParallel,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Make main weights and moments (zeros) for every trainable parameter of ``ddp``."""
        self._ddp = ddp
        self._pg_collection = pg_collection
        self._mains = [_main_tensor(buffer) for buffer in ddp.grad_buffers]
        groups = plan_param_groups([buffer.layout.key for buffer in ddp.grad_buffers])
        self._flat_step = FlatStep(
            config,
            [
                {
                    "params": [self._mains[number] for number in group.buffers],
                    "wd_mult": group.wd_mult,
                    "lr_mult": group.lr_mult,
                    "weight_decay": config.weight_decay * group.wd_mult,
                }
                for group in groups
            ],
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch parameter groups, over flat tensors."""
        return self._flat_step.optimizer.param_groups

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones left out; bias corrections depend on it."""
        return self._flat_step.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._flat_step.step_count = count

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip the gradient and update the weights, on all ranks or on none.

        Collective over expert-parallel ranks. ``finish_grad_sync`` was called before; the
        gradients are used up (clipping scales them in place).
        """
        norm = self._flat_step.step(self._grad_norm())
        self._copy_main_to_model()
        return StepResult(math.isfinite(norm), norm)

    def named_state(self) -> Iterator[NamedState]:
        """Yield the state of every trainable parameter once, in registration order."""
        views: dict[int, dict[str, Tensor]] = {}
        for buffer, main in zip(self._ddp.grad_buffers, self._mains, strict=True):
            flats = self._flat_step.moments(main)
            if main is not buffer.param_data:
                flats["main_param"] = main
            for span in buffer.layout.spans:
                views[span.param] = {}
            for name, flat in flats.items():
                for span, view in buffer.views(flat):
                    views[span.param][name] = view
        for number, (name, param) in enumerate(self._ddp.trainable_parameters()):
            yield NamedState(name, role_of(param), views[number])

    @torch.no_grad()
    def after_load(self, *, with_optim: bool = True) -> None:
        """Make main weights and the model's agree after one of them was loaded.

        Args:
            with_optim: State was loaded: round main weights into the model. Otherwise only the
                model was: take main weights from it.
        """
        if with_optim:
            self._copy_main_to_model()
            return
        for buffer, main in zip(self._ddp.grad_buffers, self._mains, strict=True):
            if main is not buffer.param_data:
                main.copy_(buffer.param_data)

    def _grad_norm(self) -> Tensor:
        buffers = self._ddp.grad_buffers
        gradients = ((buffer.layout.key, buffer.grad_data) for buffer in buffers)
        owned = owned_gradients(gradients, self._pg_collection)
        return global_grad_norm(owned, buffers[0].grad_data.device)

    def _copy_main_to_model(self) -> None:
        for buffer, main in zip(self._ddp.grad_buffers, self._mains, strict=True):
            if main is not buffer.param_data:
                buffer.param_data.copy_(main)


def get_megatron_optimizer(
    optimizer_config: OptimizerConfig,
    ddp: DistributedDataParallel,
    *,
    pg_collection: ProcessGroupCollection,
) -> MegatronOptimizer:
    """Return the optimizer that the options ask for, over the flat buffers of ``ddp``."""
    return MegatronOptimizer(optimizer_config, ddp, pg_collection=pg_collection)


def _main_tensor(buffer: ParamAndGradBuffer) -> Tensor:
    """Return what is stepped: the model's flat weights, or fp32 copies of bf16 ones."""
    same = main_dtype(buffer.param_data.dtype) == buffer.param_data.dtype
    main = buffer.param_data if same else buffer.param_data.to(buffer.grad_data.dtype)
    main.grad = buffer.grad_data
    return main
