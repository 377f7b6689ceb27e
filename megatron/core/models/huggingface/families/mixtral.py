"""Mistral and Mixtral: Llamas with a sliding window, the latter with experts instead of MLPs."""

from megatron.core.models.huggingface.config_rows import (
    aux_loss,
    dropouts,
    fixed,
    heads,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.families.llama import INV_FREQ, RMS_SWIGLU
from megatron.core.models.huggingface.moe_rows import everywhere, expert_width
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family
from megatron.core.models.huggingface.weight_rows import (
    DENSE_MLP,
    NORMS,
    OUTER,
    SELF_ATTENTION,
    experts,
)
from megatron.core.models.huggingface.windows import one_window

_COMMON = (
    vocabulary(32000),
    heads(4096, 32, 8),
    same("num_hidden_layers", "num_layers", 32),
    fixed("hidden_act", "silu", "swish"),
    tied(False),
    dropouts("attention_dropout", None, default=0.0),
)

MISTRAL = Family(
    name="mistral",
    title="Mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    constants=RMS_SWIGLU,
    rows=(
        *_COMMON,
        same("intermediate_size", "ffn_hidden_size", 14336),
        same("rms_norm_eps", "layernorm_epsilon", 1e-6),
        rope(max_positions=131072),
        one_window(4096),
    ),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *DENSE_MLP),
    ignored_keys=(INV_FREQ,),
)

MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    constants={**RMS_SWIGLU, "moe_router_pre_softmax": False},
    aliases={"num_experts": "num_local_experts"},
    rows=(
        *_COMMON,
        expert_width("intermediate_size", 14336),
        everywhere("num_local_experts", 8),
        same("num_experts_per_tok", "moe_router_topk", 2),
        same("rms_norm_eps", "layernorm_epsilon", 1e-5),
        rope(1e6, max_positions=131072),
        one_window(None),
        aux_loss(0.001),
        fixed("router_jitter_noise", 0.0, None, why="train with --moe-input-jitter-eps instead"),
    ),
    weights=(
        *OUTER,
        *NORMS,
        *SELF_ATTENTION,
        *experts(
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
            "block_sparse_moe.experts.{expert}.w2.weight",
        ),
    ),
    ignored_keys=(INV_FREQ,),
)

FAMILIES = {"mistral": MISTRAL, "mixtral": MIXTRAL}
