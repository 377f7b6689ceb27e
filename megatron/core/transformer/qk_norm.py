"""Norms of queries and keys, between their projection and their rotation.

Queries and keys are split over tensor-parallel ranks by heads. A weight for one head is held by
every rank and used on its own heads, so its gradient is summed over ``tp``, with or without
sequence parallelism.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

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
        self.zero_centered = config.layernorm_zero_centered_gamma
        init = Init(kind="zeros" if self.zero_centered else "ones")
        role = ParamRole(init=init, decays=config.apply_wd_to_qk_layernorm)
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
        weight = self.weight[self.part]
        if self.zero_centered:
            weight = weight.to(compute_dtype(weight.dtype)) + 1.0
        out: Tensor = _RMSNormOverRanks.apply(x.flatten(2), weight, self.eps, self.group)
        return out.view(x.shape)


class _RMSNormOverRanks(torch.autograd.Function):
    """RMSNorm of rows [s, b, width] that continue on the other ranks of a group.

    Only the input and a number for each row are kept. Where several ranks hold the same channels
    these count several times on both sides of the mean, which is the same; the gradients of their
    copies are summed where the copies were made.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, group: ProcessGroup
    ) -> Tensor:
        rows = x.to(compute_dtype(x.dtype))
        mean_square = _mean_over_ranks(group, rows, rows)
        scale = (mean_square + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.group = group  # type: ignore[attr-defined]
        return (rows * scale).mul_(weight.to(rows.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        rows, dy = x.to(scale.dtype), grad.to(scale.dtype)
        normal = rows * scale
        d_weight = (dy * normal).flatten(0, 1).sum(0)
        d_normal = dy * weight.to(scale.dtype)
        group = ctx.group  # type: ignore[attr-defined]
        dx = (d_normal - normal * _mean_over_ranks(group, d_normal, normal)).mul_(scale)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None, None


def _mean_over_ranks(group: ProcessGroup, a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of a * b over the channels of all ranks, summed in their order: [s, b, 1]."""
    own = torch.linalg.vecdot(a, b).unsqueeze(0)
    ranks = group.size()
    total = all_gather_rows(group, own, [1] * ranks).sum(0)
    return (total / (a.shape[-1] * ranks)).unsqueeze(-1)


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
