"""GPT-2: LayerNorm with biases, a table of positions, Conv1D weights [in, out]."""

from typing import Any

from megatron.core.models.huggingface.config_rows import (
    dropouts,
    fixed,
    row,
    same,
    tied,
    vocabulary,
)
from megatron.core.models.huggingface.tables import Family, Fields, Options, Weight
from megatron.core.models.huggingface.transforms import SHAPES, thirds, transposed
from megatron.core.models.huggingface.transforms import vocabulary as rows
from megatron.core.models.huggingface.weight_rows import ATTENTION, LAYER, as_is, untied

_HF = "transformer.h.{layer}."
_IGNORED = """
    n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj gradient_checkpointing
"""


def _read_ffn(fields: Fields) -> dict[str, Any]:
    width = fields["n_embd"]
    return {"hidden_size": width, "ffn_hidden_size": fields["n_inner"] or 4 * width}


def _write_ffn(options: Options) -> dict[str, Any]:
    return {"n_embd": options["hidden_size"], "n_inner": options["ffn_hidden_size"]}


def _norm(hf: str, ours: str) -> tuple[Weight, ...]:
    return tuple(as_is(f"{hf}.{kind}", f"{ours}.{kind}", "hidden") for kind in ("weight", "bias"))


GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    base_prefix="transformer.",
    constants={
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
        "openai_gelu": True,
        "group_query_attention": False,
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    rows=(
        vocabulary(50257),
        same("n_positions", "max_position_embeddings", 1024),
        row({"n_embd": 768, "n_inner": None}, _read_ffn, _write_ffn),
        same("n_layer", "num_layers", 12),
        same("n_head", "num_attention_heads", 12),
        same("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        fixed("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        fixed("scale_attn_weights", True, why="scores are divided by the root of the head size"),
        fixed("scale_attn_by_inverse_layer_idx", False),
        fixed("add_cross_attention", False),
        tied(True),
        dropouts("attn_pdrop", "resid_pdrop", "embd_pdrop", default=0.1),
    ),
    weights=(
        Weight("transformer.wte.weight", "embedding.word_embeddings.weight", rows),
        as_is("transformer.wpe.weight", "embedding.position_embeddings.weight", "positions"),
        *_norm("transformer.ln_f", "decoder.final_layernorm"),
        Weight("lm_head.weight", "output_layer.weight", rows, untied),
        *_norm(_HF + "ln_1", LAYER + "input_layernorm"),
        Weight(_HF + "attn.c_attn.weight", ATTENTION + "linear_qkv.weight", thirds()),
        Weight(_HF + "attn.c_attn.bias", ATTENTION + "linear_qkv.bias", thirds(is_bias=True)),
        Weight(_HF + "attn.c_proj.weight", ATTENTION + "linear_proj.weight",
               transposed(SHAPES["proj"])),
        as_is(_HF + "attn.c_proj.bias", ATTENTION + "linear_proj.bias", "hidden"),
        *_norm(_HF + "ln_2", LAYER + "pre_mlp_layernorm"),
        Weight(_HF + "mlp.c_fc.weight", LAYER + "mlp.linear_fc1.weight", transposed(SHAPES["fc1"])),
        as_is(_HF + "mlp.c_fc.bias", LAYER + "mlp.linear_fc1.bias", "fc1_bias"),
        Weight(_HF + "mlp.c_proj.weight", LAYER + "mlp.linear_fc2.weight",
               transposed(SHAPES["fc2"])),
        as_is(_HF + "mlp.c_proj.bias", LAYER + "mlp.linear_fc2.bias", "hidden"),
    ),
    ignored_fields=frozenset(_IGNORED.split()),
    ignored_keys=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)  # fmt: skip

FAMILIES = {"gpt2": GPT2}
