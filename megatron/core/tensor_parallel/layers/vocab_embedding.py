"""Tables of vectors looked up by id: tokens and positions."""

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, ParamRole, set_role


class Embedding(nn.Module):
    """One vector for each id; ids outside [0, num_embeddings) raise (on CUDA, later)."""

    weight: nn.Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, init: Init, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = set_role(
            nn.Parameter(torch.empty(num_embeddings, embedding_dim, dtype=dtype)),
            ParamRole(init=init),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids`` [...]: [..., embedding_dim]."""
        return nn.functional.embedding(ids, self.weight)


class VocabParallelEmbedding(Embedding):
    """The token table.

    Tensor parallelism will split its rows; with the only size offered so far, 1, it holds all.
    """
