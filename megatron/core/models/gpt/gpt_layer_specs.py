"""From the config to the tree of classes a GPT is built of: every choice of a class is here."""

from megatron.core.models.gpt.mlp_module_specs import get_mlp_submodules
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.qk_norm import HEAD_NORMS, AllHeadsNorm
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNorm, RMSNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    ParallelTransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

NORMS: dict[str, type] = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
"""By the names that --normalization takes."""


def get_gpt_decoder_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Describe all layers, each dense or MoE by ``config.moe_layer_pattern``, and the last norm.

    Raises:
        ConfigError: ``config`` contradicts itself; see ``TransformerConfig.check``.
    """
    config.check()
    return TransformerBlockSubmodules(
        layer_specs=tuple(get_gpt_layer_spec(config, moe) for moe in config.moe_layer_pattern),
        layer_norm=NORMS[config.normalization],
        mtp_layer=get_mtp_layer_spec(config) if config.mtp_depths else None,
    )


def get_mtp_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Describe one depth of multi-token prediction, its layer of the kind of the last one."""
    norm = NORMS[config.normalization]
    return ModuleSpec(
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            transformer_layer=get_gpt_layer_spec(config, config.moe_layer_pattern[-1]),
            final_layernorm=norm,
        ),
    )


def get_gpt_layer_spec(config: TransformerConfig, moe: bool) -> ModuleSpec:
    """Describe one layer.

    Args:
        config: Of the model.
        moe: Whether its MLP is a mixture of experts.
    """
    norm = NORMS[config.normalization]
    attention = get_mla_spec if config.multi_latent_attention else get_self_attention_spec
    after_branches = norm if config.sandwich_norm else None
    return ModuleSpec(
        ParallelTransformerLayer if config.parallel_residual else TransformerLayer,
        TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention(config),
            pre_mlp_layernorm=None if config.parallel_residual_shared_norm else norm,
            mlp=get_moe_module_spec(config) if moe else get_mlp_spec(config),
            post_self_attn_layernorm=after_branches,
            post_mlp_layernorm=after_branches,
        ),
    )


def get_self_attention_spec(config: TransformerConfig) -> ModuleSpec:
    """Describe self-attention."""
    qk_norm = get_qk_norm(config)
    return ModuleSpec(
        SelfAttention,
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def get_mla_spec(config: TransformerConfig) -> ModuleSpec:
    """Describe multi-head latent attention."""
    norm = NORMS[config.normalization]
    return ModuleSpec(
        MLASelfAttention,
        MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ReplicatedLinear,
            q_layernorm=norm,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ReplicatedLinear,
            kv_layernorm=norm,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
        ),
    )


def get_qk_norm(config: TransformerConfig) -> type | None:
    """Return the class that normalises queries, and keys; None without --qk-layernorm."""
    if not config.qk_layernorm:
        return None
    return (
        AllHeadsNorm
        if config.qk_layernorm_scope == "all_heads"
        else HEAD_NORMS[config.normalization]
    )


def get_mlp_spec(config: TransformerConfig) -> ModuleSpec:
    """Describe the dense MLP."""
    return ModuleSpec(
        MLP,
        get_mlp_submodules(config),
    )
