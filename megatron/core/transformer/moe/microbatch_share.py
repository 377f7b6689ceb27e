"""The tokens of a microbatch that this rank has, where tensor-parallel ranks share a sequence.

What looks at a whole microbatch (balance losses, capacities, experts that choose) asks here for the
sums and rows of the other shares. All shares are equal; a group of one rank has it all.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_single
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.context_parallel.slices import by_owner, in_order


class MicrobatchShare(NamedTuple):
    """An equal share of the tokens of one microbatch."""

    group: ProcessGroup
    """The ranks that together have the microbatch: ``tp_cp``, context-parallel ranks slowest."""
    cp_ranks: int = 1
    """Context-parallel ranks among them; each has two chunks of a sequence (see ``slices``)."""

    @property
    def ranks(self) -> int:
        """Shares of the microbatch."""
        return self.group.size()

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the shares; no gradient."""
        return all_reduce_sum(self.group, x)

    def num_tokens(self, rows: Tensor, padding: Tensor | None) -> int | Tensor:
        """Return how many tokens of the microbatch are no padding, at least 1.

        Args:
            rows: [num_tokens, ...] of this share; the dtype of the answer with padding.
            padding: [num_tokens] bool of this share; None for none, and then nobody is asked.
        """
        if padding is None:
            return max(len(rows) * self.ranks, 1)
        return self.total((~padding).sum()).clamp(min=1).to(rows.dtype)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all shares in the order of one process, by position; no gradient."""
        rows = rows.detach()
        if self.ranks == 1:
            return rows
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        out = sent.new_empty(self.ranks * len(rows), *rows.shape[1:])
        all_gather_single(out, sent.contiguous(), group=self.group)
        return in_order(out.to(rows.dtype).unflatten(0, (self.cp_ranks, -1)))

    def gather_padding(self, padding: Tensor | None) -> Tensor | None:
        """Return ``gather(padding)``, or None for none."""
        return None if padding is None else self.gather(padding)

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows of this share of what ``gather`` gave."""
        if self.ranks == 1:
            return rows
        shares = by_owner(rows, self.cp_ranks).flatten(0, 1)
        return shares.chunk(self.ranks)[self.group.rank()].contiguous()
