"""Grok-1 as its open weights were ported: sandwich norms, capped scores, tanh GELU in experts."""

from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.config_rows import (
    aux_loss,
    heads,
    row,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.families.llama import INV_FREQ
from megatron.core.models.huggingface.moe_rows import everywhere, expert_width
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.scales import attention_scale
from megatron.core.models.huggingface.tables import Family, Fields, Weight
from megatron.core.models.huggingface.transforms import qkv
from megatron.core.models.huggingface.transforms import vocabulary as rows
from megatron.core.models.huggingface.weight_rows import (
    ATTENTION,
    EXPERT,
    HF_LAYER,
    LAYER,
    as_is,
    untied,
)

_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


def _read_activation(fields: Fields) -> dict[str, Any]:
    kind = fields["hidden_act"]
    if kind not in (*_TANH, "gelu"):
        raise ConfigError(f"config.json: hidden_act {kind!r} is not offered, only gelu, {_TANH[0]}")
    return {"geglu": True, "openai_gelu": kind != "gelu"}


GROK = Family(
    name="grok",
    title="Grok-1",
    model_types=("grok-1",),
    architecture="Grok1ModelForCausalLM",
    constants={
        "normalization": "RMSNorm",
        "geglu": True,
        "add_bias_linear": False,
        "sandwich_norm": True,
        "moe_router_pre_softmax": True,
    },
    rows=(
        vocabulary(131072),
        heads(6144, 48, 8),
        same("num_hidden_layers", "num_layers", 64),
        expert_width("intermediate_size", 32768),
        everywhere("num_experts", 8),
        same("num_experts_per_tok", "moe_router_topk", 2),
        same("rms_norm_eps", "layernorm_epsilon", 1e-5),
        row({"hidden_act": _TANH[0]}, _read_activation,
            lambda options: {"hidden_act": _TANH[0] if options["openai_gelu"] else "gelu"}),
        rope(max_positions=8192),
        tied(True),
        attention_scale("attn_output_multiplier", 0.08838834764831845),
        same("max_attn_value", "attn_logit_softcapping", 30.0),
        same("embedding_multiplier_scale", "embedding_multiplier", 78.38367176906169),
        same("output_multiplier_scale", "logits_multiplier", 0.5773502691896257),
        row({}, lambda fields: {"attention_dropout": 0.0, "hidden_dropout": 0.0},
            lambda options: {}),
        aux_loss(0.001),
    ),
    weights=(
        Weight("model.embed_tokens.weight", "embedding.word_embeddings.weight", rows),
        as_is("model.norm.scale", "decoder.final_layernorm.weight", "hidden"),
        Weight("lm_head.weight", "output_layer.weight", rows, untied),
        as_is(HF_LAYER + "pre_attn_norm.scale", LAYER + "input_layernorm.weight", "hidden"),
        as_is(HF_LAYER + "post_attn_norm.scale", LAYER + "post_self_attn_layernorm.weight",
              "hidden"),
        as_is(HF_LAYER + "pre_moe_norm.scale", LAYER + "pre_mlp_layernorm.weight", "hidden"),
        as_is(HF_LAYER + "post_moe_norm.scale", LAYER + "post_mlp_layernorm.weight", "hidden"),
        *(
            Weight(HF_LAYER + f"attn.{part}_proj.weight", ATTENTION + "linear_qkv.weight",
                   qkv(part))
            for part in "qkv"
        ),
        as_is(HF_LAYER + "attn.o_proj.weight", ATTENTION + "linear_proj.weight", "proj"),
        as_is(HF_LAYER + "moe_block.gate.weight", LAYER + "mlp.router.weight", "router"),
        as_is(HF_LAYER + "moe_block.experts.{expert}.linear.weight",
              EXPERT + "linear_fc1.gate.weight", "expert_fc1"),
        as_is(HF_LAYER + "moe_block.experts.{expert}.linear_v.weight",
              EXPERT + "linear_fc1.up.weight", "expert_fc1"),
        as_is(HF_LAYER + "moe_block.experts.{expert}.linear_1.weight",
              EXPERT + "linear_fc2.weight", "expert_fc2"),
    ),
    ignored_keys=(INV_FREQ,),
)  # fmt: skip

FAMILIES = {"grok": GROK}
