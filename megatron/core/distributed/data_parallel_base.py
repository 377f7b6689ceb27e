"""What training asks of a model whose data ranks share its gradients, however they are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import nn

from megatron.core.process_groups_config import ProcessGroupCollection

if TYPE_CHECKING:
    from megatron.core.distributed.torch_fully_sharded_data_parallel import (
        TorchFullyShardedDataParallel,
    )


class DataParallelBase(nn.Module, ABC):
    """A model over data ranks; gradients are sums over microbatches and ranks, never means.

    One step: ``zero_grad_buffer()``; all microbatches but the last under ``no_sync()``; the last
    one outside; ``finish_grad_sync()``.
    """

    module: nn.Module
    """The model."""
    pg_collection: ProcessGroupCollection
    """Groups of this rank."""
    device: torch.device
    """Where weights and gradients are."""
    is_sharded: bool
    """This rank gets the sums of a part of the gradients only."""
    keeps_whole_parameters: ClassVar[bool] = True
    """Between steps; no parameter is a DTensor."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    @abstractmethod
    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the model, parameter) in registration order, each parameter once."""

    @abstractmethod
    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield those of ``trainable_parameters`` that all data ranks hold whole and alike."""

    @abstractmethod
    def layout_fingerprint(self) -> str:
        """Return a hash that is equal on two ranks exactly when they keep parameters alike."""

    @abstractmethod
    def zero_grad_buffer(self) -> None:
        """Begin a step: set all gradients to zero."""

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Only accumulate: for every microbatch of a step but the last."""

    @abstractmethod
    def finish_grad_sync(self) -> None:
        """Make the sums of this step complete; once, after its last backward."""

    @abstractmethod
    def start_param_sync(self) -> None:
        """Begin to make weights complete; every rank, after it wrote its own."""

    @abstractmethod
    def finish_param_sync(self) -> None:
        """Wait for that; before anybody but a forward reads or writes parameters."""

    @abstractmethod
    def nonfinite_gradients(self) -> list[str]:
        """Name the parameters whose gradient holds an inf or a NaN; slow, for messages only."""


def is_fully_sharded(model: nn.Module) -> TypeGuard[TorchFullyShardedDataParallel]:
    """Whether ``model`` keeps parts of parameters only.

    As isinstance, without loading torch's FSDP, which takes 0.6 s, in runs that do not use it.
    """
    return isinstance(model, DataParallelBase) and not model.keeps_whole_parameters
