"""Mixtral: a Llama with experts instead of MLPs, and sliding windows."""

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
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family
from megatron.core.models.huggingface.weight_rows import NORMS, OUTER, SELF_ATTENTION, experts
from megatron.core.models.huggingface.windows import one_window

MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    constants={**RMS_SWIGLU, "moe_layer_freq": 1, "moe_router_pre_softmax": False},
    rows=(
        vocabulary(32000),
        heads(4096, 32, 8),
        same("num_hidden_layers", "num_layers", 32),
        same("intermediate_size", "ffn_hidden_size", 14336),
        same("rms_norm_eps", "layernorm_epsilon", 1e-5),
        same("num_local_experts", "num_moe_experts", 8),
        same("num_experts_per_tok", "moe_router_topk", 2),
        fixed("hidden_act", "silu", "swish"),
        rope(1e6),
        tied(False),
        one_window(None),
        aux_loss(0.001),
        dropouts("attention_dropout", None, default=0.0),
        fixed("router_jitter_noise", 0.0, why="train with --moe-input-jitter-eps instead"),
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

FAMILIES = {"mixtral": MIXTRAL}
