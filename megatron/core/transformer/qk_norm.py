"""Norms of queries and keys, between their projection and their rotation.

Queries and keys are split over tensor-parallel ranks by heads. A weight for one head is held by
every rank and used on its own heads, so its gradient is summed over ``tp``, with or without
sequence parallelism.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, ParamRole, role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_gather_rows
from megatron.core.tensor_parallel.weight_split import split_over
from megatron.core.transformer.precision import compute_dtype, params_dtype
from megatron.core.transformer.torch_norm import LayerNorm, RMSNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class HeadLayerNorm(LayerNorm):
    """LayerNorm of each head on its own; all heads share weight and bias, [head_dim]."""

    def __init__(
        self, config: TransformerConfig, *, num_heads: int, pg_collection: ProcessGroupCollection
    ) -> None:
        """Make the parameters; for the arguments see ``AllHeadsNorm``."""
        del num_heads
        super().__init__(config, config.head_dim)
        _used_on_own_heads(self, config, pg_collection)


class HeadRMSNorm(RMSNorm):
    """RMSNorm of each head on its own; all heads share the weight, [head_dim]."""

    def __init__(
        self, config: TransformerConfig, *, num_heads: int, pg_collection: ProcessGroupCollection
    ) -> None:
        """See ``HeadLayerNorm``."""
        del num_heads
        super().__init__(config, config.head_dim)
        _used_on_own_heads(self, config, pg_collection)


HEAD_NORMS: dict[str, type] = {"LayerNorm": HeadLayerNorm, "RMSNorm": HeadRMSNorm}
"""By the names that --normalization takes."""


class AllHeadsNorm(nn.Module):
    """RMSNorm of all heads of a token at once, on whichever ranks they are.

    The weight, [num_heads * head_dim], is split as the heads are. Where ranks share a head (a key,
    with more ranks than query groups) each holds all of it and uses its part.

    Source: Muennighoff et al. 2024 (arXiv:2409.02060), section 4.2.5.
    """

    def __init__(
        self, config: TransformerConfig, *, num_heads: int, pg_collection: ProcessGroupCollection
    ) -> None:
        """Make this rank's part of the weight.

        Args:
            config: Size of a head, epsilon, number format.
            num_heads: Heads that are normalised, of all ranks.
            pg_collection: Its ``tp`` splits them, or several of its ranks share each.
        """
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, pg_collection.tp
        ranks, width = self.group.size(), num_heads * config.head_dim
        role = ParamRole(init=Init(kind="ones"), decays=config.apply_wd_to_qk_layernorm)
        self.part = slice(None)
        """Of the weight, of this rank's heads."""
        if num_heads % ranks == 0:
            role = replace(role, split=split_over("tp", pg_collection, dim=0, parts=(width,)))
            size = width // ranks
        else:
            role, size = replace(role, sums_over_tp=True), width
            head = self.group.rank() * num_heads // ranks
            self.part = slice(head * config.head_dim, (head + 1) * config.head_dim)
        weight = nn.Parameter(torch.empty(size, dtype=params_dtype(config)))
        self.weight = set_role(weight, role)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [s, b, ..., d], this rank's heads, over all that is of one token."""
        rows = x.flatten(2).to(compute_dtype(x.dtype))  # [s, b, heads * d]
        ranks = self.group.size()
        squares = rows.square().sum(-1).unsqueeze(0)  # [1, s, b]
        # a head that several ranks share counts as often as any other; the gradient goes back
        # along the same way, so each rank's part of it is counted once
        squares = all_gather_rows(self.group, squares, [1] * ranks).sum(0)
        scale = (squares / (rows.shape[-1] * ranks) + self.eps).rsqrt().unsqueeze(-1)
        out = rows * scale * self.weight[self.part].to(rows.dtype)
        return out.to(x.dtype).view(x.shape)


def _used_on_own_heads(
    norm: nn.Module, config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> None:
    for param in norm.parameters():
        role = replace(
            role_of(param),
            sums_over_tp=pg_collection.tp.size() > 1,
            decays=config.apply_wd_to_qk_layernorm,
        )
        set_role(param, role)
