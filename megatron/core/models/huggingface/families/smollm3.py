"""SmolLM3: a Llama some of whose layers know no positions; only those without such layers."""

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
from megatron.core.models.huggingface.families.llama import (
    BIASES,
    INV_FREQ,
)
from megatron.core.models.huggingface.rope import rope
from megatron.core.models.huggingface.tables import Family, Fields, Options
from megatron.core.models.huggingface.weight_rows import (
    DENSE_MLP,
    NORMS,
    OUTER,
    SELF_ATTENTION,
)


def _read(fields: Fields) -> dict[str, Any]:
    layers, every = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    rotated = fields["no_rope_layers"]
    if rotated is None:
        rotated = [int((layer + 1) % every != 0) for layer in range(layers)]
    bare = [layer for layer, is_rotated in enumerate(rotated) if not is_rotated]
    if bare:
        raise ConfigError(
            f"config.json: no_rope_layers leaves layers {', '.join(map(str, bare))} without "
            "positions; here all layers of a model are rotated, or none"
        )
    return {}


def _write(options: Options) -> dict[str, Any]:
    return {"no_rope_layers": [1] * options["num_layers"]}


SMOLLM3 = Family(
    name="smollm3",
    title="SmolLM3",
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    constants={"normalization": "RMSNorm", "swiglu": True},
    rows=(
        vocabulary(128256),
        heads(2048, 16, 4),
        same("num_hidden_layers", "num_layers", 36),
        same("intermediate_size", "ffn_hidden_size", 11008),
        same("rms_norm_eps", "layernorm_epsilon", 1e-6),
        fixed("hidden_act", "silu", "swish"),
        rope(2e6, max_positions=32768),
        tied(True),
        BIASES,
        row(
            {"no_rope_layers": None, "no_rope_layer_interval": 4, "num_hidden_layers": None},
            _read,
            _write,
        ),
        fixed("use_sliding_window", False),
        dropouts("attention_dropout", None, default=0.0),
    ),
    weights=(*OUTER, *NORMS, *SELF_ATTENTION, *DENSE_MLP),
    ignored_keys=(INV_FREQ,),
    ignored_fields=frozenset({"sliding_window", "layer_types", "max_window_layers"}),
    notes=("Layers without positions, which the published ones have, are refused by name.",),
)

FAMILIES = {"smollm3": SMOLLM3}
