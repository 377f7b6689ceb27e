"""What the plan of weights must know of a model: sizes, and what its layers are made of. Pure.

Options of a model are field names of RunConfig's model section (and ``padded_vocab_size``). Some
belong to features that this version may not have: their neutral values are listed here, and a
model that needs another value is refused by name.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron.core.transformer.config.rotary import written_out
from megatron.core.transformer.transformer_config import TransformerConfig

NEUTRAL: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "add_mlp_bias": False,
    "add_proj_bias": False,
    "attn_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "geglu": False,
    "glu_linear_offset": 0.0,
    "kv_lora_rank": None,
    "layernorm_zero_centered_gamma": False,
    "logits_multiplier": 1.0,
    "longrope_long_factor": None,
    "longrope_short_factor": None,
    "moe_router_bias": False,
    "moe_router_group_score_topk": None,
    "moe_router_norm_topk_prob": True,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "openai_gelu": False,
    "parallel_residual": False,
    "parallel_residual_shared_norm": False,
    "q_lora_rank": None,
    "qk_head_dim": None,
    "qk_layernorm": False,
    "qk_layernorm_scope": "head",
    "qk_pos_emb_head_dim": None,
    "quick_geglu": False,
    "residual_multiplier": 1.0,
    "rope_attention_factor": None,
    "rope_scaling_factor": None,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_original_max_position_embeddings": None,
    "rope_scaling_type": "none",
    "rotary_interleaved": False,
    "sandwich_norm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "squared_relu": False,
    "v_head_dim": None,
    "window_attn_skip_freq": None,
    "window_size": None,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
"""Option -> value under which it changes nothing."""

_FIELDS = {entry.name: entry for entry in fields(TransformerConfig)}


def default_of(name: str) -> Any:
    """Return the default of an option of the model."""
    entry = _FIELDS.get(name)
    if entry is None:
        return NEUTRAL[name]
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` and the defaults of all others of the model; scaling is written out."""
    defaults = {name: default_of(name) for name in (*NEUTRAL, *_FIELDS)}
    found = defaults | {"padded_vocab_size": None} | dict(options)
    return found | written_out(found)


def is_option(name: str) -> bool:
    """Tell whether this version has an option of the model, or the size of the vocabulary."""
    return name in _FIELDS or name == "padded_vocab_size"


def unknown_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options that differ from their neutral value and that this version lacks."""
    return [
        name
        for name, value in options.items()
        if name in NEUTRAL and name not in _FIELDS and value != NEUTRAL[name]
    ]


@dataclass(frozen=True)
class ModelFacts:
    """A model as the plan of weights sees it."""

    options: Mapping[str, Any]
    """All options, defaults included."""
    config: TransformerConfig
    """Those that this version has; its properties are the derived sizes."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "ModelFacts":
        """Derive the facts from options of a model; those left out have their defaults."""
        known = {name: value for name, value in options.items() if name in _FIELDS}
        return cls(with_defaults(options), TransformerConfig(**known))

    def __getitem__(self, option: str) -> Any:
        return self.options[option]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config.num_attention_heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.config.query_groups

    def num_experts_of(self, layer: int) -> int:
        """Return the experts of a layer; those behind the last are as the last."""
        last = self.config.num_layers - 1
        return self.config.for_layer(min(layer, last)).num_moe_experts or 0

    @property
    def has_linear_bias(self) -> bool:
        """Whether every linear layer has a bias."""
        return bool(self.config.add_bias_linear)

    @property
    def is_gated(self) -> bool:
        """Whether MLPs have three matrices."""
        return any(self[name] for name in ("swiglu", "geglu", "quick_geglu"))
