"""How a product by a slice of a matrix gets its input, with its collectives under its products.

Outside, activations are replicated on the ranks that share a matrix, or with sequence parallelism
each has an equal share of the sequence, dim 0; see regions for the way out. What is here are parts
of an autograd function that multiplies: in backward the sum of the input's gradient over ranks is
under way while the weight's gradient is computed. With sequence parallelism only this rank's share
of the input is kept; it is gathered again for the weight's gradient, under the other product.

Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_single, start_all_gather
from megatron.core.weight_grad_queue import LateOperand


class RegionEntry(NamedTuple):
    """The ranks that multiply one input by slices of one matrix."""

    group: ProcessGroup | None = None
    """None, or one rank: nothing is asked of anybody."""
    sequence_parallel: bool = False
    """The input is this rank's share of the sequence, dim 0."""

    @property
    def ranks(self) -> int:
        """Ranks that share the matrix."""
        return 1 if self.group is None else self.group.size()

    def whole(self, x: Tensor) -> Tensor:
        """Return the input of all ranks; in forward, without a gradient."""
        if self.group is None or self.ranks == 1 or not self.sequence_parallel:
            return x
        out = x.new_empty(self.ranks * x.shape[0], *x.shape[1:])
        all_gather_single(out, x.contiguous(), group=self.group)
        return out

    def operand(self, x: Tensor) -> "Tensor | GatheredAgain":
        """Return what gives ``whole(x)`` again, to ``landed``."""
        if self.group is None or self.ranks == 1 or not self.sequence_parallel:
            return x
        return GatheredAgain(self.group, x)

    def start_sum(self, grad: Tensor) -> "GradientSum":
        """Start to sum the gradients of ``whole(x)`` over the ranks; ``grad`` is given away."""
        return GradientSum(self, grad)


def enter_region(entry: RegionEntry, x: Tensor) -> Tensor:
    """Return ``entry.whole(x)`` for other uses than a product; the ranks' gradients are summed."""
    if entry.ranks == 1:
        return x
    out: Tensor = _Enter.apply(x, entry)
    return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, entry: RegionEntry) -> Tensor:
        ctx.entry = entry
        whole = entry.whole(x)
        return whole.view_as(x) if whole is x else whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        given_away = grad.clone(memory_format=torch.contiguous_format)
        return ctx.entry.start_sum(given_away).land(), None


class GatheredAgain(LateOperand):
    """Shares of the input, gathered for a weight gradient."""

    def __init__(self, group: ProcessGroup, share: Tensor) -> None:
        self._group, self.share = group, share.detach()
        self._work: Any = None
        self._whole: Tensor | None = None

    def launch(self) -> None:
        """See ``LateOperand.launch``."""
        if self._whole is None:
            rows = self._group.size() * self.share.shape[0]
            self._whole = self.share.new_empty(rows, *self.share.shape[1:])
            self.share = self.share.contiguous()  # lives until it was sent
            self._work = start_all_gather(self._whole, self.share, group=self._group)

    def land(self) -> Tensor:
        """Return the input of all ranks, launched here at the latest."""
        self.launch()
        assert self._whole is not None, "it was launched"
        self._work.wait()
        return self._whole


def landed(x: "Tensor | GatheredAgain") -> Tensor:
    """Return the tensor that ``RegionEntry.operand`` stands for."""
    return x if isinstance(x, Tensor) else x.land()


class GradientSum:
    """The sum over ranks of the gradients of one input, under way."""

    def __init__(self, entry: RegionEntry, grad: Tensor) -> None:
        """Launch; ``grad`` [rows, ...] is contiguous and read by nobody else from now on."""
        self._ranks, self._scatters = entry.ranks, entry.sequence_parallel
        self._grad, self._parts, self._work = grad, grad, None
        if entry.group is None or self._ranks == 1:
            return
        if self._scatters:
            self._parts = torch.empty_like(grad)
            each = [grad.shape[0] // self._ranks] * self._ranks
            self._work = dist.all_to_all_single(
                self._parts, grad, each, each, group=entry.group, async_op=True
            )
        else:
            self._work = dist.all_reduce(grad, group=entry.group, async_op=True)

    def land(self) -> Tensor:
        """Return the sum, of this rank's share of the rows with sequence parallelism.

        On CUDA the current stream waits, not the host.
        """
        if self._work is None:
            return self._grad
        self._work.wait()
        if not self._scatters:
            return self._grad
        # summed in rank order, narrow dtypes in fp32: repeats bit for bit
        return self._parts.view(self._ranks, -1, *self._parts.shape[1:]).sum(dim=0)
