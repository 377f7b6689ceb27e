"""Options of multi-head latent attention. TransformerConfig inherits them, and attention's by them.

Some options of attention mean something else under it, or nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.config.attention import AttentionConfig
from megatron.core.transformer.config.rotary import RotaryConfig

MLA_SHAPE = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
"""Options that say nothing without ``multi_latent_attention``."""


@dataclass(kw_only=True)
class MLAConfig(AttentionConfig, RotaryConfig):
    """Multi-head latent attention.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """

    multi_latent_attention: bool = False
    """Make keys and values of all heads from one latent vector a token (see --kv-lora-rank), and
    keep positions in channels of their own; needs --position-embedding-type rope."""

    q_lora_rank: int | None = None
    """Width of the latent vector that queries are made from, under --multi-latent-attention;
    queries are made from the hidden states when not set."""

    kv_lora_rank: int = 32
    """Width of the latent vector that keys and values are made from."""

    qk_head_dim: int = 128
    """Channels of a query and key head that know no position."""

    qk_pos_emb_head_dim: int = 64
    """Channels of a query and key head that are rotated, behind the others; a token has one such
    key, which all heads share."""

    v_head_dim: int = 128
    """Channels of a value head."""

    cache_mla_latents: bool = False
    """Generation remembers the latent vector and the rotated key of a token (--kv-lora-rank +
    --qk-pos-emb-head-dim numbers a layer) instead of the keys and values of all heads."""

    @property
    def query_latent_size(self) -> int | None:
        """Width of the latent of queries; None where these are made from hidden states."""
        return self.q_lora_rank

    def attention_problems(self, hidden_size: int) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        if not self.multi_latent_attention:
            yield from super().attention_problems(hidden_size)
            return
        if not self.num_attention_heads:
            yield "--num-attention-heads is missing"
        if self.group_query_attention:
            yield (
                "--multi-latent-attention with --group-query-attention: all heads share one latent "
                "vector already; leave --group-query-attention out"
            )
        if self.kv_channels is not None:
            yield (
                f"--kv-channels {self.kv_channels} has no effect with --multi-latent-attention; "
                "heads have --qk-head-dim + --qk-pos-emb-head-dim and --v-head-dim channels"
            )
        if not self.has_rotary_positions:
            yield (
                "--multi-latent-attention rotates --qk-pos-emb-head-dim channels of each head: "
                f"--position-embedding-type {self.position_embedding_type} must be rope or yarn"
            )
        if self.qk_layernorm_scope != "head" or self.apply_wd_to_qk_layernorm:
            yield (
                "--multi-latent-attention normalises latents, not heads: --qk-layernorm-scope "
                "all_heads and --apply-wd-to-qk-layernorm are not offered with it; leave them out"
            )
