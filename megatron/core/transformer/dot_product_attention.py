"""Scaled dot-product attention with causality: which kernel, and what it may look at."""

import logging

import torch
from torch import Tensor, nn

from megatron.core.log import log_once
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention_sink import learnt_sink
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import (
    BLOCK,
    WeightDropout,
    blocked_causal_attention,
)
from megatron.core.transformer.compiled_attention import (
    can_be_compiled,
    compiled_attention,
    compiled_attention_of_projection,
)
from megatron.core.transformer.context_parallel.attention import context_parallel_attention
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.fused_attention import fused_causal_attention
from megatron.core.transformer.rotary import RotaryTables
from megatron.core.transformer.transformer_config import TransformerConfig

log = logging.getLogger(__name__)
_CAPPED = (
    "--attn-logit-softcapping: attention runs in blocks, since torch's fused kernel caps no "
    "scores, and each layer keeps its weights for backward, half of [heads, s, s]; "
    "--recompute-granularity selective (core_attn) keeps none"
)
_SHORT = 1024
"""Most keys of a query for which a CPU keeps attention weights for backward."""


class DotProductAttention(nn.Module):
    """softmax(q k / sqrt(d)) v over each position's past, and what ``CoreAttentionConfig`` adds.

    ``F.scaled_dot_product_attention``, but where weights are dropped (each sample has a mask of
    its own, see ``SampleRng``), where scores are capped, or where blocks of our own are faster:
    on CPUs compiled ones, of whole sequences without a mask.

    ``softmax_offset`` [heads of this rank] is there under ``softmax_type`` learnable.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
    ) -> None:
        """Choose how scores become weights.

        Args:
            config: Heads, window, sink, cap, dropout.
            layer_number: Global index of the layer, from 0.
            pg_collection: Its ``tp`` splits the heads, its ``cp`` the sequence.
            softmax_scale: Instead of the config's and of 1 / sqrt(size of a query).
        """
        super().__init__()
        tp, self.cp_group = pg_collection.tp, pg_collection.cp
        self.cp_comm_type = config.cp_comm_type_of(layer_number)
        self.first_head = tp.rank() * (config.num_attention_heads // tp.size())
        self.layer_number = layer_number
        self.dropout = config.attention_dropout
        self.weighting = Weighting(
            scale=config.softmax_scale if softmax_scale is None else softmax_scale,
            window=config.attention_window_of(layer_number),
            softcap=config.attn_logit_softcapping,
        )
        if config.attn_logit_softcapping is not None:
            log_once(log, _CAPPED, logging.INFO)
        self.compiled = (
            self.cp_group.size() == 1
            and self.dropout == 0.0
            and config.softmax_type == "vanilla"
            and can_be_compiled(self.weighting)
        )
        self.softmax_type = config.softmax_type
        self.softmax_offset = (
            learnt_sink(config, tp) if config.softmax_type == "learnable" else None
        )

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
            value: [b, groups, s, dv].
            attention_mask: bool [b, 1, s, positions], True where a query may *not* look, on top
                of causality.
            context: Gives the random numbers and the cache; this layer's keys and values are
                added to the cache.

        Returns:
            [s, b, heads * dv].
        """
        if self._is_compiled(attention_mask, context):
            got = compiled_attention(query, key, value, self.weighting)
            if got is not None:
                return got.permute(2, 0, 1, 3).flatten(2)
        if context.kv_cache is not None:
            key, value = context.kv_cache.append(self.layer_number, key, value)
        weighting = self._weighting(query, context)
        if self.cp_group.size() > 1:
            out = context_parallel_attention(
                query,
                key,
                value,
                attention_mask,
                weighting,
                group=self.cp_group,
                comm_type=self.cp_comm_type,
                core=causal_attention,
            )
        else:
            offset = key.shape[2] - query.shape[2]
            out = causal_attention(query, key, value, attention_mask, weighting, offset=offset)
        return out.permute(2, 0, 1, 3).flatten(2)

    def of_projection(
        self,
        mixed: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor | None:
        """Split a projection, rotate queries and keys, and attend, where that is one pass.

        Args:
            mixed: [s, b, groups, heads / groups + 2, d]: a group's queries, its key, its value.
            attention_mask: See ``forward``.
            rotary: For these s positions; None rotates nothing.
            context: See ``forward``.

        Returns:
            [s, b, heads * d]; None where it is no one pass, and nothing was done.
        """
        if not self._is_compiled(attention_mask, context):
            return None
        return compiled_attention_of_projection(mixed, rotary, self.weighting)

    def _is_compiled(self, attention_mask: Tensor | None, context: ForwardContext) -> bool:
        return self.compiled and attention_mask is None and context.kv_cache is None

    def _weighting(self, query: Tensor, context: ForwardContext) -> Weighting:
        """Add to what never changes what this forward has: the sink and the random numbers."""
        sink: Tensor | None = self.softmax_offset
        dropout = None
        if self.softmax_type == "off-by-one":
            sink = query.new_zeros(query.shape[1])
        if self.dropout > 0.0 and context.rng is not None:
            dropout = WeightDropout(
                *(context.rng, self.dropout, self.layer_number, self.first_head),
                window=self.weighting.window,
            )
        return self.weighting._replace(sink=sink, dropout=dropout)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    weighting: Weighting,
    *,
    offset: int = 0,
) -> Tensor:
    """Attend with the kernel that suits; see ``blocked_causal_attention``."""
    only_blocks = weighting.dropout is not None or weighting.softcap is not None
    if only_blocks or _blocked_is_faster(key, weighting.window):
        return blocked_causal_attention(query, key, value, attention_mask, weighting, offset=offset)
    return fused_causal_attention(query, key, value, attention_mask, weighting, offset=offset)


def _blocked_is_faster(key: Tensor, window: int | None) -> bool:
    """Return whether to prefer our own blocks: in training on a CPU, where queries see few keys.

    There the backward of SDPA's kernel takes about twice as long. Forward alone, it wins.
    """
    seen = key.shape[2] if window is None else min(key.shape[2], window + BLOCK)
    return not key.is_cuda and torch.is_grad_enabled() and seen <= _SHORT
