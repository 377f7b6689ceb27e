"""How much a step computes and how fast: floating-point operations by formula, nothing measured.

The count is Megatron's, so that figures compare: matrix products only, causal half of attention
(of a layer with a window, what lies in it, which Megatron counts in full), the top-k experts of
each token whether or not they were dropped, the shared experts, multi-token prediction, no router,
backward = 2 x forward.
"""

from megatron.core.transformer.attention_products import core_products, projection_products
from megatron.core.transformer.transformer_config import TransformerConfig

FORWARD_AND_BACKWARD = 3  # forward, gradient of inputs, gradient of weights
MULTIPLY_AND_ADD = 2


def flops_per_token(config: TransformerConfig, *, seq_length: int, vocab_size: int) -> float:
    """Return the model's floating-point operations for one token, forward and backward.

    Args:
        config: Resolved model configuration.
        seq_length: Tokens of one sample; attention grows with it.
        vocab_size: Rows of the output layer, padding included.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), appendix; MoE layers count ``topk`` experts.
    """
    hidden, projections = config.hidden_size, projection_products(config)
    depths = config.mtp_depths  # each a head, a projection of two to one, and a layer
    products = float(vocab_size * hidden * (1 + depths) + 2 * hidden * hidden * depths)
    pattern = config.moe_layer_pattern
    for layer in (*range(len(pattern)), *[len(pattern) - 1] * depths):
        is_moe = pattern[layer]
        own = config.for_layer(layer) if is_moe else config
        causal_core = core_products(config, config.mean_keys_of(layer, seq_length))
        products += projections + causal_core + _mlp_products(own, is_moe)
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * products


def _mlp_products(config: TransformerConfig, is_moe: bool) -> int:
    """Return the multiplications of one token's MLP, forward."""
    matrices = 3 if config.gated_linear_unit else 2
    if not is_moe:
        return matrices * config.hidden_size * config.ffn_size
    routed = matrices * config.moe_hidden_size * config.moe_router_topk * config.moe_ffn_size
    shared = matrices * config.hidden_size * (config.moe_shared_expert_intermediate_size or 0)
    latent = 2 * config.hidden_size * (config.moe_latent_size or 0)  # there and back
    return routed + shared + latent
