"""An all-to-all under which something else is computed, in forward and in backward.

Launch and landing are two nodes of the graph, and between them lie the nodes of what is computed
meanwhile. Autograd takes ready nodes latest first: backward launches the gradient at the landing,
runs what lies between, and waits at the launch. No stream of our own: NCCL has one, gloo threads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.mappings import RowSplits


def all_to_all_during(
    group: ProcessGroup, x: Tensor, splits: "RowSplits", during: Callable[[], None]
) -> Tensor:
    """Do ``mappings.all_to_all`` over several ranks and call ``during`` while rows travel."""
    flight = Flight(group)
    out: Tensor = _Launch.apply(flight, x, splits)
    try:
        during()
    finally:  # a recomputation may stop in it; nobody may write to freed memory then
        flight.land()
    landed: Tensor = _Land.apply(flight, out, splits)
    return landed


class Flight:
    """One all-to-all under way, and the tensors that it reads and writes until it lands."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._work: Any = None
        self._tensors: tuple[Tensor, ...] = ()

    def launch(self, x: Tensor, splits: "RowSplits") -> Tensor:
        """Return what the rows will be written to; nothing may read it before ``land``."""
        assert self._work is None, "one flight at a time"
        x = x.contiguous()
        out = x.new_empty(sum(splits.recv), *x.shape[1:])
        self._work = dist.all_to_all_single(
            out, x, splits.recv, splits.send, group=self.group, async_op=True
        )
        self._tensors = (x, out)
        return out

    def land(self) -> Tensor:
        """Return the rows once they are there (on CUDA the current stream waits, not the host)."""
        assert self._work is not None, "launch first"
        self._work.wait()
        _, out = self._tensors
        self._work, self._tensors = None, ()
        return out


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, x: Tensor, splits: "RowSplits") -> Tensor:
        ctx.flight = flight
        return flight.launch(x, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        del grad  # of the rows as they arrived; what was made of it is in the air
        return None, ctx.flight.land(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, x: Tensor, splits: "RowSplits") -> Tensor:
        ctx.flight, ctx.splits = flight, splits
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        ctx.flight.launch(grad, ctx.splits.reversed())
        return None, grad, None
