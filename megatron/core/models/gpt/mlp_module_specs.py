"""From the config to the parts of a dense MLP, which shared experts are made of too."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.activations import gelu, swiglu
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


def get_mlp_submodules(config: TransformerConfig) -> MLPSubmodules:
    """Describe what fills the slots of an MLP."""
    return MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        linear_fc2=RowParallelLinear,
        activation=swiglu if config.swiglu else gelu,
        gated=config.swiglu,
    )
