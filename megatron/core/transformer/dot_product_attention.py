"""Scaled dot-product attention with causality: which kernel, and what it may look at."""

import torch
from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.blocked_attention import WeightDropout, blocked_causal_attention
from megatron.core.transformer.context_parallel.attention import context_parallel_attention
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.transformer_config import TransformerConfig

_SHORT = 1024
"""Longest sequence whose attention weights a CPU keeps for backward."""


class DotProductAttention(nn.Module):
    """softmax(q k / sqrt(d)) v over each position's past.

    ``F.scaled_dot_product_attention``, but where weights are dropped (each sample has a mask of
    its own, see ``SampleRng``) or where blocks of our own are faster.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        tp, self.cp_group = pg_collection.tp, pg_collection.cp
        self.cp_comm_type = config.cp_comm_type_of(layer_number)
        self.first_head = tp.rank() * (config.num_attention_heads // tp.size())
        self.layer_number = layer_number
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        context: ForwardContext,
    ) -> Tensor:
        """Attend.

        Args:
            query: [b, heads, s, d], the positions that follow those in ``context.kv_cache``, or
                those of this context-parallel rank.
            key: [b, groups, s, d]; heads of a group follow each other.
            value: Like ``key``.
            attention_mask: bool [b, 1, s, positions], True where a query may *not* look, on top
                of causality.
            context: Gives the random numbers and the cache; this layer's keys and values are
                added to the cache.

        Returns:
            [s, b, heads * d].
        """
        if context.kv_cache is not None:
            key, value = context.kv_cache.append(self.layer_number, key, value)
        dropout = None
        if self.dropout > 0.0 and context.rng is not None:
            dropout = WeightDropout(context.rng, self.dropout, self.layer_number, self.first_head)
        if self.cp_group.size() > 1:
            out = context_parallel_attention(
                query,
                key,
                value,
                attention_mask,
                dropout,
                group=self.cp_group,
                comm_type=self.cp_comm_type,
                core=causal_attention,
            )
        else:
            offset = key.shape[2] - query.shape[2]
            out = causal_attention(query, key, value, attention_mask, dropout, offset=offset)
        return out.permute(2, 0, 1, 3).flatten(2)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: WeightDropout | None,
    *,
    offset: int = 0,
) -> Tensor:
    """Attend with the kernel that suits; see ``blocked_causal_attention``."""
    if dropout is not None or _blocked_is_faster(key):
        return blocked_causal_attention(query, key, value, attention_mask, dropout, offset=offset)
    end = offset + query.shape[2]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :end]
    return _sdpa(query, key[:, :, :end], value[:, :, :end], attention_mask)


def _blocked_is_faster(key: Tensor) -> bool:
    """Return whether to prefer our own blocks: in training on short sequences on a CPU.

    There the backward of SDPA's kernel takes about twice as long. Forward alone, it wins.
    """
    return not key.is_cuda and torch.is_grad_enabled() and key.shape[2] <= _SHORT


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Attend without dropout: [b, heads, s, d]."""
    s, positions = query.shape[2], key.shape[2]
    square = s == positions and attention_mask is None
    mask = None
    if not square and (s > 1 or attention_mask is not None):
        mask = _visible(s, positions, attention_mask, query.device)
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=square,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _visible(s: int, positions: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return what each of the last ``s`` of ``positions`` may look at: bool [.., s, positions]."""
    causal = torch.ones(s, positions, dtype=torch.bool, device=device).tril_(positions - s)
    return causal if attention_mask is None else causal & ~attention_mask
