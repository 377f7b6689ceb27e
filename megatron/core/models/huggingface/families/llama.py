"""Llama 2 and 3, and whatever else calls itself llama, such as SmolLM and SmolLM2."""

from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.config_rows import (
    dropouts,
    fixed,
    heads,
    row,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family, Fields, Options
from megatron.core.models.huggingface.weight_rows import (
    DENSE_MLP,
    NORMS,
    OUTER,
    SELF_ATTENTION,
)

RMS_SWIGLU = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}
"""What all descendants of Llama have."""

INV_FREQ = r".*rotary_emb\.inv_freq"


def _read_biases(fields: Fields) -> dict[str, Any]:
    attention, mlp = bool(fields["attention_bias"]), bool(fields["mlp_bias"])
    if attention and mlp:
        return {"add_bias_linear": True}
    return {
        "add_bias_linear": False,
        "add_qkv_bias": attention,
        "add_proj_bias": attention,
        "add_mlp_bias": mlp,
    }


def _write_biases(options: Options) -> dict[str, Any]:
    everywhere = options["add_bias_linear"]
    if options["add_qkv_bias"] != options["add_proj_bias"] and not everywhere:
        raise ConfigError(
            "--add-qkv-bias and --add-proj-bias go together in this family (attention_bias)"
        )
    return {
        "attention_bias": everywhere or options["add_qkv_bias"],
        "mlp_bias": everywhere or options["add_mlp_bias"],
    }


BIASES = row({"attention_bias": False, "mlp_bias": False}, _read_biases, _write_biases)
"""The row of the biases of attention and of MLPs, each its own field."""

LLAMA = Family(
    name="llama",
    title="Llama 2, Llama 3, SmolLM, SmolLM2",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    constants={"normalization": "RMSNorm", "swiglu": True},
    rows=(
        vocabulary(32000),
        heads(4096, 32, None),
        same("num_hidden_layers", "num_layers", 32),
        same("intermediate_size", "ffn_hidden_size", 11008),
        same("rms_norm_eps", "layernorm_epsilon", 1e-6),
        fixed("hidden_act", "silu", "swish"),
        rope(),
        tied(False),
        BIASES,
        dropouts("attention_dropout", None, default=0.0),
    ),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *DENSE_MLP),
    ignored_keys=(INV_FREQ,),
    ignored_fields=frozenset({"rope_interleaved"}),
)

FAMILIES = {"llama": LLAMA}
