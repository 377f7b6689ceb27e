"""DeepSeek-V2 and V3: latent attention, first layers dense, shared experts, groups of experts."""

from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.config_rows import (
    attention_bias,
    dropouts,
    fixed,
    row,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.families.llama import INV_FREQ, RMS_SWIGLU
from megatron.core.models.huggingface.model_facts import ModelFacts
from megatron.core.models.huggingface.moe_rows import first_dense, groups, shared_width
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import ConfigRow, Family, Fields, Options
from megatron.core.models.huggingface.weight_rows import (
    ATTENTION,
    DENSE_MLP,
    HF_LAYER,
    LAYER,
    NORMS,
    OUTER,
    QWEN_EXPERTS,
    as_is,
    shared_experts,
)

_EPSILON = 1e-6
_RANKS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Field of config.json -> option of latent attention."""


def _read_heads(fields: Fields) -> dict[str, Any]:
    total, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if kv_heads not in (None, total):
        raise ConfigError(
            f"config.json: num_key_value_heads {kv_heads} must be num_attention_heads {total}: "
            "latent attention makes keys for every head"
        )
    found = {option: fields[name] for name, option in _RANKS.items()}
    return found | {"hidden_size": fields["hidden_size"], "num_attention_heads": total}


def _write_heads(options: Options) -> dict[str, Any]:
    total = options["num_attention_heads"]
    found = {name: options[option] for name, option in _RANKS.items()}
    return found | {
        "hidden_size": options["hidden_size"],
        "num_attention_heads": total,
        "num_key_value_heads": total,
    }


def _latent_heads(hidden: int, heads: int) -> ConfigRow:
    defaults = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    return row(defaults, _read_heads, _write_heads)


def _read_epsilon(fields: Fields) -> dict[str, Any]:
    if fields["rms_norm_eps"] != _EPSILON:
        raise ConfigError(
            f"config.json: rms_norm_eps {fields['rms_norm_eps']} is not offered, only {_EPSILON}: "
            "transformers has that in the norms of latents whatever is said, and here all are alike"
        )
    return {"layernorm_epsilon": _EPSILON}


def _write_epsilon(options: Options) -> dict[str, Any]:
    if options["layernorm_epsilon"] != _EPSILON:
        raise ConfigError(
            f"--norm-epsilon {options['layernorm_epsilon']}: transformers has {_EPSILON} in the "
            "norms of latents whatever config.json says"
        )
    return {"rms_norm_eps": _EPSILON}


def _read_scale(fields: Fields) -> dict[str, Any]:
    factor = fields["routed_scaling_factor"]
    return {"moe_router_topk_scaling_factor": None if factor == 1.0 else factor}


def _write_scale(options: Options) -> dict[str, Any]:
    return {"routed_scaling_factor": options["moe_router_topk_scaling_factor"] or 1.0}


_V2_GROUPS = groups((None, None))
_V3_GROUPS = groups((8, 4))


def _read_v2_groups(fields: Fields) -> dict[str, Any]:
    method = fields["topk_method"]
    if method == "greedy":
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if method != "group_limited_greedy":
        raise ConfigError(
            f"config.json: topk_method {method!r} is not offered, only greedy and "
            "group_limited_greedy"
        )
    return _judged_by(1, _V2_GROUPS.read(fields))


def _write_v2_groups(options: Options) -> dict[str, Any]:
    _refuse_other_judges(1, options)
    is_limited = options["moe_router_num_groups"] is not None
    method = "group_limited_greedy" if is_limited else "greedy"
    return {"topk_method": method, **_V2_GROUPS.write(options)}


def _read_v3_groups(fields: Fields) -> dict[str, Any]:
    return _judged_by(2, _V3_GROUPS.read(fields))


def _write_v3_groups(options: Options) -> dict[str, Any]:
    _refuse_other_judges(2, options)
    return _V3_GROUPS.write(options)


def _judged_by(number: int, found: dict[str, Any]) -> dict[str, Any]:
    """Add how many of its experts judge a group, where there are groups."""
    has_groups = found["moe_router_num_groups"] is not None
    return found | ({"moe_router_group_score_topk": number} if has_groups else {})


def _refuse_other_judges(number: int, options: Options) -> None:
    used = options["moe_router_group_topk"]
    if used is None:
        return
    judges = options["moe_router_group_score_topk"] or options["moe_router_topk"] // used
    if judges != number:
        raise ConfigError(
            f"--moe-router-group-score-topk {judges}: in this family {number} of its experts judge "
            "a group"
        )


def _has_query_latent(facts: ModelFacts) -> bool:
    return facts["q_lora_rank"] is not None


def _has_whole_query(facts: ModelFacts) -> bool:
    return facts["q_lora_rank"] is None


def _has_bias(facts: ModelFacts) -> bool:
    return bool(facts["add_qkv_bias"])


def _has_query_bias(facts: ModelFacts) -> bool:
    return _has_bias(facts) and _has_query_latent(facts)


_HF = HF_LAYER + "self_attn."
_WEIGHTS = (
    *OUTER,
    *NORMS,
    as_is(_HF + "q_proj.weight", ATTENTION + "linear_q_proj.weight", "q_whole",
          when=_has_whole_query),
    as_is(_HF + "q_a_proj.weight", ATTENTION + "linear_q_down_proj.weight", "q_down",
          when=_has_query_latent),
    as_is(_HF + "q_a_proj.bias", ATTENTION + "linear_q_down_proj.bias", "q_rank",
          when=_has_query_bias),
    as_is(_HF + "q_a_layernorm.weight", ATTENTION + "q_layernorm.weight", "q_rank",
          when=_has_query_latent),
    as_is(_HF + "q_b_proj.weight", ATTENTION + "linear_q_up_proj.weight", "q_up",
          when=_has_query_latent),
    as_is(_HF + "kv_a_proj_with_mqa.weight", ATTENTION + "linear_kv_down_proj.weight", "kv_down"),
    as_is(_HF + "kv_a_proj_with_mqa.bias", ATTENTION + "linear_kv_down_proj.bias", "kv_down_bias",
          when=_has_bias),
    as_is(_HF + "kv_a_layernorm.weight", ATTENTION + "kv_layernorm.weight", "kv_rank"),
    as_is(_HF + "kv_b_proj.weight", ATTENTION + "linear_kv_up_proj.weight", "kv_up"),
    as_is(_HF + "o_proj.weight", ATTENTION + "linear_proj.weight", "latent_proj"),
    as_is(_HF + "o_proj.bias", ATTENTION + "linear_proj.bias", "hidden", when=_has_bias),
    *DENSE_MLP,
    *QWEN_EXPERTS,
    *shared_experts("shared_experts"),
)  # fmt: skip
_IGNORED = frozenset({"qk_head_dim", "head_dim", "aux_loss_alpha", "ep_size", "seq_aux"})
_COMMON = (
    row({"rms_norm_eps": _EPSILON}, _read_epsilon, _write_epsilon),
    fixed("hidden_act", "silu", "swish"),
    tied(False),
    attention_bias(),
    dropouts("attention_dropout", None, default=0.0),
)

V2 = Family(
    name="deepseek_v2",
    title="DeepSeek-V2",
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    constants={
        **RMS_SWIGLU,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "rotary_interleaved": True,
        "group_query_attention": False,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
    },
    aliases={"num_experts": "n_routed_experts"},
    rows=(
        *_COMMON,
        vocabulary(102400),
        _latent_heads(4096, 32),
        same("moe_intermediate_size", "moe_ffn_hidden_size", 1407),
        row({"routed_scaling_factor": 1.0}, _read_scale, _write_scale),
        same("num_hidden_layers", "num_layers", 32),
        same("intermediate_size", "ffn_hidden_size", 11008),
        same("n_routed_experts", "num_moe_experts", 64),
        same("num_experts_per_tok", "moe_router_topk"),
        first_dense(0),
        shared_width("n_shared_experts", "moe_intermediate_size", 2),
        row({"topk_method": "greedy", "n_group": None, "topk_group": None},
            _read_v2_groups, _write_v2_groups),
        fixed("norm_topk_prob", False, None, why="transformers does not divide either"),
        fixed("scoring_func", "softmax"),
        fixed("mlp_bias", False),
        rope(max_positions=2048),
    ),
    weights=_WEIGHTS,
    ignored_fields=_IGNORED,
    ignored_keys=(INV_FREQ,),
)  # fmt: skip

V3 = Family(
    name="deepseek_v3",
    title="DeepSeek-V3, DeepSeek-R1",
    model_types=("deepseek_v3",),
    architecture="DeepseekV3ForCausalLM",
    constants={
        **RMS_SWIGLU,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "group_query_attention": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": ["none"],
    },
    aliases={"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
    rows=(
        *_COMMON,
        vocabulary(129280),
        _latent_heads(7168, 128),
        same("moe_intermediate_size", "moe_ffn_hidden_size", 2048),
        row({"routed_scaling_factor": 2.5}, _read_scale, _write_scale),
        same("num_hidden_layers", "num_layers", 61),
        same("intermediate_size", "ffn_hidden_size", 18432),
        same("n_routed_experts", "num_moe_experts", 256),
        same("num_experts_per_tok", "moe_router_topk", 8),
        first_dense(3),
        shared_width("n_shared_experts", "moe_intermediate_size", 1),
        row({"n_group": 8, "topk_group": 4}, _read_v3_groups, _write_v3_groups),
        same("norm_topk_prob", "moe_router_norm_topk_prob", True),
        same("rope_interleave", "rotary_interleaved", True),
        fixed("scoring_func", "sigmoid"),
        fixed("topk_method", "noaux_tc"),
        row({"num_nextn_predict_layers": 0},
            lambda fields: {"mtp_num_layers": fields["num_nextn_predict_layers"] or None},
            lambda options: {"num_nextn_predict_layers": options["mtp_num_layers"] or 0}),
        rope(max_positions=4096),
    ),
    weights=(
        *_WEIGHTS,
        as_is(HF_LAYER + "mlp.gate.e_score_correction_bias", LAYER + "mlp.router.expert_bias",
              "experts", layers="moe", is_fp32=True),
    ),
    ignored_fields=_IGNORED,
    prediction_weights=(
        as_is(HF_LAYER + "enorm.weight", "mtp.layers.{depth}.enorm.weight", "hidden"),
        as_is(HF_LAYER + "hnorm.weight", "mtp.layers.{depth}.hnorm.weight", "hidden"),
        as_is(HF_LAYER + "eh_proj.weight", "mtp.layers.{depth}.eh_proj.weight", "mtp_proj"),
        as_is(HF_LAYER + "shared_head.norm.weight", "mtp.layers.{depth}.final_layernorm.weight",
              "hidden"),
    ),
    prediction_repeats={
        HF_LAYER + "embed_tokens.weight": "model.embed_tokens.weight",
        HF_LAYER + "shared_head.head.weight": "lm_head.weight",
    },
    ignored_keys=(INV_FREQ,),
)  # fmt: skip

FAMILIES = {"deepseek_v2": V2, "deepseek_v3": V3}
