"""Flat storage of parameters and of their gradients, and the reduction of a stretch of it.

After construction ``param.data`` is a view into ``param_data`` and ``param.main_grad`` one into
``grad_data``: moving or re-typing the module afterwards would cut these ties.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from megatron.core.collectives import start_all_gather, start_reduce_scatter
from megatron.core.distributed.bucket_layout import BufferLayout, Span, shard_of


class ParamAndGradBuffer:
    """One flat buffer of parameters and one of gradients, laid out alike.

    Gradients are kept in fp32 (fp64 for fp64 parameters), since bf16 sums over microbatches lose
    small terms.
    """

    def __init__(
        self,
        layout: BufferLayout,
        params: Sequence[nn.Parameter],
        *,
        group: ProcessGroup,
        is_sharded: bool = False,
    ) -> None:
        """Move ``params`` into flat storage.

        Args:
            layout: Place of each parameter; its spans number ``params``.
            params: All parameters of the model in registration order.
            group: Ranks that hold replicas of these parameters and share their gradients.
            is_sharded: Each rank of ``group`` gets the sum of its slice of a bucket only.
        """
        first = params[layout.spans[0].param]
        self.layout = layout
        self.group = group
        self.is_sharded = is_sharded
        self.param_data = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
        self.grad_data = torch.zeros(
            layout.numel, dtype=main_dtype(first.dtype), device=first.device
        )
        self._shapes = {span.param: params[span.param].shape for span in layout.spans}
        for span, view in self.views(self.param_data):
            param = params[span.param]
            view.copy_(param.detach())
            param.data = view
        for span, view in self.views(self.grad_data):
            setattr(params[span.param], "main_grad", view)  # noqa: B010 (not an attribute of Tensor)

    def views(self, flat: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Yield (span, view shaped like the parameter) of a tensor laid out as this buffer."""
        for span in self.layout.spans:
            yield span, flat[span.start : span.end].view(self._shapes[span.param])

    def own(self, start: int, end: int) -> tuple[int, int]:
        """Return the elements of the bucket [start, end) whose optimizer state this rank keeps."""
        if not self.is_sharded:
            return start, end
        return shard_of(start, end, self.group.rank(), self.group.size())

    def start_reduce(self, start: int, end: int) -> Work | None:
        """Start to sum the gradients of the bucket [start, end); None in a group of one.

        Sharded, the sum arrives in the slice that this rank owns; the rest is undefined then.
        """
        if self.group.size() == 1:
            return None
        if self.is_sharded:
            own = self.grad_data[slice(*self.own(start, end))]
            return start_reduce_scatter(own, self.grad_data[start:end], group=self.group)
        return dist.all_reduce(self.grad_data[start:end], group=self.group, async_op=True)

    def start_gather(self, start: int, end: int) -> Work | None:
        """Start to take over the weights of the bucket [start, end) from their owners."""
        if self.group.size() == 1 or not self.is_sharded:
            return None
        own = self.param_data[slice(*self.own(start, end))]
        return start_all_gather(self.param_data[start:end], own, group=self.group)


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gradients, main weights and moments of parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
