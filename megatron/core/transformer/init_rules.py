"""How initial weights are drawn: the same two rules for attention, dense MLP and experts.

Biases are zeros and norms ones; those need no rule.
"""

import math

from megatron.core.param_role import Init
from megatron.core.transformer.transformer_config import TransformerConfig


def input_init(config: TransformerConfig) -> Init:
    """Return the draw of matrices that read the residual stream, and of embeddings."""
    return Init(kind="normal", std=config.init_method_std)


def output_init(config: TransformerConfig) -> Init:
    """Return the draw of matrices that write to the residual stream: linear_proj and linear_fc2.

    Their sum over 2 x num_layers branches keeps the variance of one.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    assert config.num_layers is not None, "num_layers is resolved before a model is built"
    return Init(kind="normal", std=config.init_method_std / math.sqrt(2 * config.num_layers))
