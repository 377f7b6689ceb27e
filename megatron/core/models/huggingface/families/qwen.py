"""Qwen2, Qwen2.5, Qwen3, and their mixtures of experts."""

from megatron.core.models.huggingface.config_rows import (
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
from megatron.core.models.huggingface.weight_rows import (
    DENSE_MLP,
    NORMS,
    OUTER,
    SELF_ATTENTION,
)
from megatron.core.models.huggingface.windows import qwen2_windows

QWEN2 = Family(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    constants={**RMS_SWIGLU, "add_qkv_bias": True},
    rows=(
        vocabulary(151936),
        heads(4096, 32, 32),
        same("num_hidden_layers", "num_layers", 32),
        same("intermediate_size", "ffn_hidden_size", 22016),
        same("rms_norm_eps", "layernorm_epsilon", 1e-6),
        fixed("hidden_act", "silu", "swish"),
        rope(),
        tied(False),
        qwen2_windows(),
        dropouts("attention_dropout", None, default=0.0),
    ),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *DENSE_MLP),
    ignored_keys=(INV_FREQ,),
)

FAMILIES = {"qwen2": QWEN2}
