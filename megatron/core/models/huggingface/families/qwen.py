"""Qwen2, Qwen2.5, Qwen3, and their mixtures of experts."""

from megatron.core.models.huggingface.config_rows import (
    attention_bias,
    aux_loss,
    dropouts,
    fixed,
    heads,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.families.llama import INV_FREQ, RMS_SWIGLU
from megatron.core.models.huggingface.moe_rows import renormalised, sparse_steps
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family
from megatron.core.models.huggingface.weight_rows import (
    DENSE_MLP,
    HF_LAYER,
    LAYER,
    NORMS,
    OUTER,
    QK_NORMS,
    QWEN_EXPERTS,
    SELF_ATTENTION,
    as_is,
    shared_experts,
)
from megatron.core.models.huggingface.windows import qwen2_windows, switched

_COMMON = (
    vocabulary(151936),
    same("rms_norm_eps", "layernorm_epsilon", 1e-6),
    fixed("hidden_act", "silu", "swish"),
    fixed("use_mrope", False),
    rope(max_positions=32768),
    tied(False),
    dropouts("attention_dropout", None, default=0.0),
)
_DENSE_SIZES = (
    same("num_hidden_layers", "num_layers", 32),
    same("intermediate_size", "ffn_hidden_size", 22016),
)

QWEN2 = Family(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    constants={**RMS_SWIGLU, "add_qkv_bias": True},
    rows=(*_COMMON, *_DENSE_SIZES, heads(4096, 32, 32), qwen2_windows()),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *DENSE_MLP),
    ignored_keys=(INV_FREQ,),
)

QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    constants={**RMS_SWIGLU, "qk_layernorm": True},
    rows=(
        *_COMMON,
        *_DENSE_SIZES,
        heads(4096, 32, 32, head_dim=128),
        attention_bias(),
        qwen2_windows(),
    ),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *QK_NORMS, *DENSE_MLP),
    ignored_keys=(INV_FREQ,),
)

_MOE = (
    same("num_hidden_layers", "num_layers", 24),
    renormalised(False),
    aux_loss(0.001),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    title="Qwen1.5-MoE, Qwen2-MoE",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    constants={**RMS_SWIGLU, "moe_shared_expert_gate": True},
    aliases={"num_local_experts": "num_experts"},
    rows=(
        *_COMMON,
        *_MOE,
        heads(2048, 16, 16),
        same("intermediate_size", "ffn_hidden_size", 5632),
        same("moe_intermediate_size", "moe_ffn_hidden_size", 1408),
        same("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 5632),
        sparse_steps("num_experts", 60),
        same("num_experts_per_tok", "moe_router_topk", 4),
        same("qkv_bias", "add_qkv_bias", True),
        qwen2_windows(is_moe=True),
    ),
    weights=(
        *OUTER,
        *NORMS,
        *SELF_ATTENTION,
        *DENSE_MLP,
        *QWEN_EXPERTS,
        *shared_experts("shared_expert"),
        as_is(
            HF_LAYER + "mlp.shared_expert_gate.weight",
            LAYER + "mlp.shared_experts.gate_weight",
            "shared_gate",
            layers="moe",
        ),
    ),
    ignored_keys=(INV_FREQ,),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    constants={**RMS_SWIGLU, "qk_layernorm": True},
    aliases={"num_local_experts": "num_experts"},
    rows=(
        *_COMMON,
        *_MOE,
        heads(2048, 32, 4),
        attention_bias(),
        same("intermediate_size", "ffn_hidden_size", 6144),
        same("moe_intermediate_size", "moe_ffn_hidden_size", 768),
        sparse_steps("num_experts", 128),
        same("num_experts_per_tok", "moe_router_topk", 8),
        switched(),
    ),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *QK_NORMS, *DENSE_MLP, *QWEN_EXPERTS),
    ignored_fields=frozenset({"max_window_layers"}),
    ignored_keys=(INV_FREQ,),
)

FAMILIES = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}
