"""OLMoE: experts in all layers, and norms of queries and keys over all heads at once."""

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
from megatron.core.models.huggingface.moe_rows import everywhere, expert_width, renormalised
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family
from megatron.core.models.huggingface.weight_rows import (
    ATTENTION,
    HF_LAYER,
    NORMS,
    OUTER,
    QWEN_EXPERTS,
    SELF_ATTENTION,
    as_is,
)

OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    constants={**RMS_SWIGLU, "qk_layernorm": True, "qk_layernorm_scope": "all_heads"},
    aliases={"num_local_experts": "num_experts"},
    rows=(
        vocabulary(50304),
        heads(2048, 16, None),
        same("num_hidden_layers", "num_layers", 16),
        expert_width("intermediate_size", 2048),
        everywhere("num_experts", 64),
        same("num_experts_per_tok", "moe_router_topk", 8),
        renormalised(False),
        same("rms_norm_eps", "layernorm_epsilon", 1e-5),
        fixed("hidden_act", "silu", "swish"),
        rope(max_positions=4096),
        tied(False),
        attention_bias(),
        fixed("clip_qkv", None, why="queries, keys and values are not clamped here"),
        aux_loss(0.01),
        dropouts("attention_dropout", None, default=0.0),
    ),
    weights=(
        *OUTER,
        *NORMS,
        *SELF_ATTENTION,
        as_is(HF_LAYER + "self_attn.q_norm.weight", ATTENTION + "q_layernorm.weight", "all_heads"),
        as_is(HF_LAYER + "self_attn.k_norm.weight", ATTENTION + "k_layernorm.weight", "all_groups"),
        *QWEN_EXPERTS,
    ),
    ignored_keys=(INV_FREQ,),
)

FAMILIES = {"olmoe": OLMOE}
