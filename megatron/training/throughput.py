"""How much a step computes and how fast: floating-point operations by formula, nothing measured.

The count is Megatron's, so that figures compare: matrix products only, causal half of attention,
the top-k experts of each token whether or not they were dropped, the shared
experts, no router, backward = 2 x forward.
"""

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
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.query_groups * config.head_dim
    projections = hidden * (queries + keys_and_values) + queries * hidden
    causal_core = 2 * queries * seq_length / 2  # scores and weighted values, half of the square
    matrices = 3 if config.swiglu else 2
    products = float(vocab_size * hidden)
    for is_moe in config.moe_layer_pattern:
        width = config.moe_width_per_token if is_moe else config.ffn_size
        products += projections + causal_core + matrices * hidden * width
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * products
