"""From the config to the parts of a dense MLP, which shared experts are made of too."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.activations import activation_of
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def get_mlp_submodules(config: TransformerConfig) -> MLPSubmodules:
    """Describe what fills the slots of an MLP."""
    return MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        linear_fc2=RowParallelLinear,
        activation=activation_of(config.activation_kind),
        gated=config.gated_linear_unit,
    )
