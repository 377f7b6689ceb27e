"""Tables of vectors looked up by id: tokens and positions."""

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, ParamRole, Split, TiedEnds, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.regions import reduce_from_region
from megatron.core.tensor_parallel.weight_split import split_over


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
        return nn.functional.embedding(ids, self.weight)


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
