"""What training asks of an optimizer, whatever it steps: flat buffers or shards."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.grad_scaler import GradScaler
from megatron.core.param_blocks import ParamBlocks
from megatron.core.param_role import ParamRole


class StepResult(NamedTuple):
    """What became of one step; the same on all ranks."""

    update_successful: bool
    """False: the gradient was not finite and nothing was changed, on no rank."""
    grad_norm: float | None
    """Global L2 norm before clipping, of the gradient of the loss itself: without its scale."""


class NamedState(NamedTuple):
    """The optimizer state of one parameter; writing to ``tensors`` writes the state."""

    name: str
    """Name of the parameter in the model."""
    role: ParamRole
    """Role of the parameter."""
    tensors: dict[str, Tensor | ParamBlocks]
    """Views shaped like the parameter: the moments and, of a bf16 or fp16 model, ``main_param``;
    sharded, the blocks of it that this rank keeps."""


class BaseOptimizer(ABC):
    """Steps a model.

    ``param_groups`` are torch's; a schedule sets ``lr`` and ``weight_decay`` in them, the latter
    times the group's ``wd_mult``.
    """

    _flat_step: FlatStep
    grad_scaler: GradScaler
    """Says what losses are to be multiplied by before backward; ``step`` tells it what came."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch parameter groups, over the tensors that are stepped."""
        return self._flat_step.optimizer.param_groups

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones left out; bias corrections depend on it."""
        return self._flat_step.step_count

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._flat_step.step_count = count

    @abstractmethod
    def step(self) -> StepResult:
        """Clip the gradient and update the weights, on all ranks or on none.

        Collective over all ranks. ``finish_grad_sync`` was called before; the gradients, of a loss
        times ``grad_scaler.scale``, are used up (they are divided in place). The scale of the next
        step may be another one.
        """

    def _clip_and_step(self, norm: Tensor) -> StepResult:
        """Step the main weights and tell the scaler. ``norm`` is of the scaled gradient, []."""
        true_norm = self._flat_step.step(norm, self.grad_scaler.scale)
        is_finite = math.isfinite(true_norm)
        self.grad_scaler.update(found_inf=not is_finite)
        return StepResult(is_finite, true_norm)

    @abstractmethod
    def named_state(self) -> Iterator[NamedState]:
        """Yield the state of every trainable parameter once, in registration order."""

    @abstractmethod
    def after_load(self, *, with_optim: bool = True) -> None:
        """Make main weights and the model's agree after one of them was loaded.

        Args:
            with_optim: State was loaded: round main weights into the model. Otherwise only the
                model was: take main weights from it.
        """
