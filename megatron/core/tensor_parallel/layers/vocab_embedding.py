"""Tables of vectors looked up by id: tokens and positions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.core.grad_sink import grad_sink_of
from megatron.core.param_role import Init, ParamRole, Split, TiedEnds, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.regions import reduce_from_region
from megatron.core.tensor_parallel.weight_split import split_over
from megatron.core.weight_grad_queue import weight_gradient


class Embedding(nn.Module):
    """One vector for each id; ids outside [0, num_embeddings) raise (on CUDA, later)."""

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init: Init,
        dtype: torch.dtype,
        split: Split | None = None,
        tied_ends: TiedEnds = "no",
    ) -> None:
        super().__init__()
        shape = (num_embeddings, embedding_dim)
        here = shape if split is None else split.local_shape(shape)
        role = ParamRole(init=init, split=split, tied_ends=tied_ends)
        self.weight = set_role(nn.Parameter(torch.empty(here, dtype=dtype)), role)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids`` [...]: [..., embedding_dim]."""
        found: Tensor = _LookUp.apply(self.weight, ids)
        return found


class VocabParallelEmbedding(Embedding):
    """The token table, its rows split over ``tp``: each rank looks up the ids it holds."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init: Init,
        dtype: torch.dtype,
        pg_collection: ProcessGroupCollection,
        tied_ends: TiedEnds = "no",
    ) -> None:
        split = split_over("tp", pg_collection, dim=0, parts=(num_embeddings,))
        super().__init__(
            num_embeddings, embedding_dim, init=init, dtype=dtype, split=split, tied_ends=tied_ends
        )
        self.tp_group = pg_collection.tp

    def forward(self, ids: Tensor) -> Tensor:
        """See ``Embedding.forward``; the same on every rank."""
        if self.tp_group.size() == 1:
            return super().forward(ids)
        here = ids - self.tp_group.rank() * self.weight.shape[0]
        missing = (here < 0) | (here >= self.weight.shape[0])
        found = super().forward(here.masked_fill(missing, 0))
        return reduce_from_region(self.tp_group, found.masked_fill(missing.unsqueeze(-1), 0.0))


class _LookUp(torch.autograd.Function):
    """``F.embedding``, whose gradient goes to the sink of the table: at once, or in a W step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.sink = weight.shape[0], grad_sink_of(weight)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        operands, add = (grad, ids, ctx.num_rows), None
        if grad.device.type == "cpu":  # elsewhere sums of one row would come in any order
            add = _add_table_grad
        return weight_gradient(ctx.sink, _table_grad, *operands, add=add), None


def _table_grad(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Return the sum of ``grad`` [..., h] over the places of each id: [num_rows, h]."""
    table: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, num_rows, -1, False)
    return table


def _add_table_grad(total: Tensor, grad: Tensor, ids: Tensor, num_rows: int) -> None:
    """Add what ``_table_grad`` returns to ``total``, perhaps wider: to rows looked up only."""
    assert len(total) == num_rows, f"{total.shape=} {num_rows=}"
    total.index_add_(0, ids.reshape(-1), grad.reshape(-1, total.shape[1]).to(total.dtype))
