"""An all-to-all under which something else is computed, in forward and in backward.

Launch and landing are two nodes of the graph, and between them lie the nodes of what is computed
meanwhile. Autograd takes ready nodes latest first: backward launches the gradient at the landing,
runs what lies between, and waits at the launch. No stream of our own: NCCL has one, gloo threads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.mappings import RowSplits


class Meanwhile(NamedTuple):
    """What is done while rows are under way."""

    forward: Callable[[], None]
    """Called once in forward; what it computes is differentiated while gradients are under way."""
    backward: Callable[[], None] | None = None
    """Called in each backward, behind that; None for nothing more."""


def all_to_all_during(
    group: ProcessGroup, tensors: tuple[Tensor, ...], splits: "RowSplits", meanwhile: Meanwhile
) -> tuple[Tensor, ...]:
    """Do ``mappings.all_to_all`` of each of ``tensors``, all at once, and more under them.

    Args:
        group: Of several ranks.
        tensors: [sum(splits.send), ...] each.
        splits: Rows to and from each rank.
        meanwhile: What to do while rows travel.
    """
    flight = Flight(group)
    air: tuple[Tensor, ...] = _Launch.apply(flight, splits, meanwhile.backward, *tensors)
    try:
        meanwhile.forward()
    finally:  # a recomputation may stop in it; nobody may write to freed memory then
        flight.land()
    landed: tuple[Tensor, ...] = _Land.apply(flight, splits, *air)
    return landed


class Flight:
    """All-to-alls under way, and the tensors that they read and write until they land."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._works: list[Any] = []
        self._sent: list[Tensor] = []
        self._arriving: tuple[Tensor, ...] = ()

    def launch(self, tensors: tuple[Tensor, ...], splits: "RowSplits") -> tuple[Tensor, ...]:
        """Return what the rows will be written to; nothing may read it before ``land``."""
        assert not self._works, "one flight at a time"
        self._sent = [x.contiguous() for x in tensors]
        self._arriving = tuple(x.new_empty(sum(splits.recv), *x.shape[1:]) for x in tensors)
        for out, x in zip(self._arriving, self._sent, strict=True):
            work = dist.all_to_all_single(
                out, x, splits.recv, splits.send, group=self.group, async_op=True
            )
            self._works.append(work)
        return self._arriving

    def land(self) -> tuple[Tensor, ...]:
        """Return the rows once they are there (on CUDA the current stream waits, not the host)."""
        assert self._works, "launch first"
        arrived = self._arriving
        for work in self._works:
            work.wait()
        self._works, self._sent, self._arriving = [], [], ()
        return arrived


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        flight: Flight,
        splits: "RowSplits",
        before_landing: Callable[[], None] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.flight, ctx.before_landing = flight, before_landing
        return flight.launch(tensors, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        del grads  # of the rows as they arrived; what was made of them is in the air
        try:
            if ctx.before_landing is not None:
                ctx.before_landing()
        finally:
            arrived = ctx.flight.land()
        return None, None, None, *arrived


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flight: Flight, splits: "RowSplits", *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.flight, ctx.splits = flight, splits
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.launch(grads, ctx.splits.reversed())
        return None, None, *grads
