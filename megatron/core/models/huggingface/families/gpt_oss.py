"""GPT-OSS: biases everywhere, sinks, every second layer a window, experts stacked and turned."""

from megatron.core.models.huggingface.config_rows import (
    aux_loss,
    dropouts,
    fixed,
    heads,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.moe_rows import everywhere, expert_width
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family, Weight
from megatron.core.models.huggingface.transforms import SHAPES, stacked, stacked_columns
from megatron.core.models.huggingface.weight_rows import (
    ATTENTION,
    EXPERT,
    HF_LAYER,
    LAYER,
    NORMS,
    OUTER,
    SELF_ATTENTION,
    as_is,
)
from megatron.core.models.huggingface.windows import alternating

_MLP = HF_LAYER + "mlp."

GPT_OSS = Family(
    name="gpt_oss",
    title="GPT-OSS",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    constants={
        "normalization": "RMSNorm",
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "moe_router_bias": True,
        "moe_router_pre_softmax": False,
        "softmax_type": "learnable",
    },
    aliases={"num_experts": "num_local_experts"},
    rows=(
        vocabulary(201088),
        heads(2880, 64, 8, head_dim=64),
        same("num_hidden_layers", "num_layers", 36),
        expert_width("intermediate_size", 2880),
        everywhere("num_local_experts", 128),
        same("num_experts_per_tok", "moe_router_topk", 4),
        same("rms_norm_eps", "layernorm_epsilon", 1e-5),
        fixed("hidden_act", "silu", "swish"),
        fixed("swiglu_alpha", 1.702),
        same("swiglu_limit", "activation_func_clamp_value", 7.0),
        fixed("attention_bias", True),
        rope(150000.0, max_positions=131072, rope_type="yarn", factor=32.0, beta_fast=32.0,
             beta_slow=1.0, truncate=False, original_max_position_embeddings=4096),
        tied(False),
        alternating(128),
        aux_loss(0.001),
        dropouts("attention_dropout", None, default=0.0),
    ),
    weights=(
        *OUTER,
        *NORMS,
        *SELF_ATTENTION,
        as_is(HF_LAYER + "self_attn.sinks", ATTENTION + "core_attention.softmax_offset", "heads"),
        as_is(_MLP + "router.weight", LAYER + "mlp.router.weight", "router", layers="moe"),
        as_is(_MLP + "router.bias", LAYER + "mlp.router.bias", "experts", layers="moe"),
        Weight(_MLP + "experts.gate_up_proj", EXPERT + "linear_fc1.{part}.weight",
               stacked_columns(SHAPES["expert_fc1"]), layers="moe"),
        Weight(_MLP + "experts.gate_up_proj_bias", EXPERT + "linear_fc1.{part}.bias",
               stacked_columns(SHAPES["expert_fc1_bias"]), layers="moe"),
        Weight(_MLP + "experts.down_proj", EXPERT + "linear_fc2.weight",
               stacked(SHAPES["expert_fc2"], is_transposed=True), layers="moe"),
        Weight(_MLP + "experts.down_proj_bias", EXPERT + "linear_fc2.bias",
               stacked(SHAPES["hidden"]), layers="moe"),
    ),
    ignored_fields=frozenset({"experts_per_token", "initial_context_length"}),
)  # fmt: skip

FAMILIES = {"gpt_oss": GPT_OSS}
