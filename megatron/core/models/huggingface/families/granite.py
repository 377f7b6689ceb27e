"""GraniteMoE: experts stacked in two tensors, and a multiplier at every junction."""

from typing import Any

from megatron.core.models.huggingface.config_rows import (
    attention_bias,
    aux_loss,
    dropouts,
    fixed,
    heads,
    row,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.families.llama import INV_FREQ, RMS_SWIGLU
from megatron.core.models.huggingface.moe_rows import everywhere, expert_width
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.scales import attention_scale
from megatron.core.models.huggingface.tables import Family, Fields, Options, Weight
from megatron.core.models.huggingface.transforms import SHAPES, stacked, stacked_halves
from megatron.core.models.huggingface.weight_rows import (
    EXPERT,
    HF_LAYER,
    LAYER,
    NORMS,
    OUTER,
    SELF_ATTENTION,
    as_is,
)

_MOE = HF_LAYER + "block_sparse_moe."


def _read_logits(fields: Fields) -> dict[str, Any]:
    return {"logits_multiplier": 1.0 / fields["logits_scaling"]}


def _write_logits(options: Options) -> dict[str, Any]:
    factor = options["logits_multiplier"]
    short = float(f"{1.0 / factor:.12g}")  # 3 for 1/3, where 1 / (1/3) is not
    return {"logits_scaling": short if 1.0 / short == factor else 1.0 / factor}


GRANITE_MOE = Family(
    name="granitemoe",
    title="GraniteMoE",
    model_types=("granitemoe",),
    architecture="GraniteMoeForCausalLM",
    constants={**RMS_SWIGLU, "moe_router_pre_softmax": False},
    aliases={"num_experts": "num_local_experts"},
    rows=(
        vocabulary(32000),
        heads(4096, 32, None),
        same("num_hidden_layers", "num_layers", 32),
        expert_width("intermediate_size", 11008),
        everywhere("num_local_experts", 8),
        same("num_experts_per_tok", "moe_router_topk", 2),
        same("rms_norm_eps", "layernorm_epsilon", 1e-6),
        fixed("hidden_act", "silu", "swish"),
        rope(max_positions=2048),
        tied(False),
        attention_bias(),
        same("embedding_multiplier", "embedding_multiplier", 1.0),
        same("residual_multiplier", "residual_multiplier", 1.0),
        attention_scale("attention_multiplier", 1.0),
        row({"logits_scaling": 1.0}, _read_logits, _write_logits),
        aux_loss(0.001),
        dropouts("attention_dropout", None, default=0.0),
    ),
    weights=(
        *OUTER,
        *NORMS,
        *SELF_ATTENTION,
        as_is(_MOE + "router.layer.weight", LAYER + "mlp.router.weight", "router", layers="moe"),
        Weight(_MOE + "input_linear.weight", EXPERT + "linear_fc1.{part}.weight",
               stacked_halves(SHAPES["expert_fc1"]), layers="moe"),
        Weight(_MOE + "output_linear.weight", EXPERT + "linear_fc2.weight",
               stacked(SHAPES["expert_fc2"]), layers="moe"),
    ),
    ignored_keys=(INV_FREQ,),
)  # fmt: skip

FAMILIES = {"granitemoe": GRANITE_MOE}
