"""Options of self-attention and positions. TransformerConfig inherits them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron.core.config_field import derived
from megatron.core.transformer.config.norm import NormConfig


@dataclass(kw_only=True)
class AttentionConfig(NormConfig):
    """Attention and positions."""

    num_attention_heads: int = derived()
    """Attention heads of a layer. When not set: as many as make heads of 64, or of the nearest even
    size that divides --hidden-size."""

    group_query_attention: bool = False
    """Share each key and value head among several query heads (see --num-query-groups)."""

    num_query_groups: int = 1
    """Key and value heads under --group-query-attention; divides --num-attention-heads. Divides
    --tensor-model-parallel-size or is a multiple of it."""

    kv_channels: int | None = None
    """Size of one attention head; --hidden-size / --num-attention-heads when not set."""

    attention_dropout: float = 0.1
    """Probability of dropping an attention weight in training; 0 keeps the fast kernel."""

    add_qkv_bias: bool = False
    """Give the query, key and value projection a bias even under --disable-bias-linear."""

    add_proj_bias: bool = False
    """Give the projection after attention a bias even under --disable-bias-linear."""

    qk_layernorm: bool = False
    """Normalise queries and keys, each with a weight of its own, before they are rotated."""

    qk_layernorm_scope: Literal["head", "all_heads"] = "head"
    """What --qk-layernorm takes a statistic over: the channels of one head, or those of all heads
    of a token, on whichever ranks they are (OLMoE)."""

    apply_wd_to_qk_layernorm: bool = False
    """Weight decay acts on the weights of --qk-layernorm too."""

    def attention_problems(self, hidden_size: int) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not heads:
            yield "--num-attention-heads is missing"
            return
        if self.kv_channels is None and hidden_size % heads:
            yield (
                f"--hidden-size {hidden_size} must be a multiple of --num-attention-heads {heads}, "
                "or give --kv-channels"
            )
        if self.group_query_attention and heads % groups:
            yield f"--num-query-groups {groups} must divide --num-attention-heads {heads}"
        yield from self.qk_norm_problems()

    def qk_norm_problems(self) -> Iterator[str]:
        """Yield one sentence for each option of the norm of queries and keys that does not fit."""
        is_wide = self.qk_layernorm_scope == "all_heads"
        if not self.qk_layernorm:
            if is_wide:
                yield "--qk-layernorm-scope all_heads needs --qk-layernorm"
            if self.apply_wd_to_qk_layernorm:
                yield "--apply-wd-to-qk-layernorm needs --qk-layernorm"
        elif is_wide and self.normalization != "RMSNorm":
            yield (
                f"--qk-layernorm-scope all_heads with --normalization {self.normalization} is not "
                "offered: a mean over ranks is taken for RMSNorm only; use --normalization RMSNorm "
                "or --qk-layernorm-scope head"
            )

    def group_slice_problems(self, ranks: int, hidden_size: int) -> Iterator[str]:
        """Yield a sentence if ``ranks`` of tensor parallelism cannot share the query groups."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not self.group_query_attention or min(heads, ranks, groups) < 1 or heads % groups:
            return
        shown = f"--tensor-model-parallel-size {ranks}"
        if groups % ranks and ranks % groups:
            fits = [size for size in range(1, 2 * ranks) if heads % size == 0]
            fits = [size for size in fits if groups % size == 0 or size % groups == 0]
            yield (
                f"{shown} must divide --num-query-groups {groups} or be a multiple of it; sizes "
                f"that fit: {', '.join(map(str, fits[-3:]))}"
            )
        elif ranks > groups:
            mates, head_dim = ranks // groups, self.kv_channels or hidden_size // heads
            rows = (heads // groups + 2) * head_dim
            if rows % mates:
                yield (
                    f"{shown} puts each of --num-query-groups {groups} on {mates} ranks, which "
                    "must divide the rows of its queries, key and value: (--num-attention-heads "
                    f"{heads} / {groups} + 2) x {head_dim} = {rows}; make --kv-channels a "
                    f"multiple of {mates // math.gcd(mates, heads // groups + 2)}"
                )

    @property
    def query_groups(self) -> int:
        """Key and value heads of a layer."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads
