"""How many multiplications attention takes for one token, forward. Pure: formulas, no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def projection_products(config: "TransformerConfig") -> int:
    """Return the multiplications of the projections before and after the core of one layer.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), appendix; latent projections: DeepSeek-V2
    (arXiv:2405.04434), eq. 9-19.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries, values = heads * config.head_dim, heads * config.value_head_dim
    out = values * hidden
    if not config.multi_latent_attention:
        keys_and_values = config.query_groups * (config.head_dim + config.value_head_dim)
        return hidden * (queries + keys_and_values) + out
    to_queries = hidden * queries
    if config.query_latent_size is not None:
        to_queries = config.query_latent_size * (hidden + queries)
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    up = config.kv_lora_rank * (heads * config.qk_head_dim + values)
    return to_queries + down + up + out


def core_products(config: "TransformerConfig", mean_keys: float) -> float:
    """Return the multiplications of scores and of weighted values.

    Args:
        config: Of the model.
        mean_keys: Keys that a query meets, on average; see ``mean_keys_of``.
    """
    return config.num_attention_heads * (config.head_dim + config.value_head_dim) * mean_keys
