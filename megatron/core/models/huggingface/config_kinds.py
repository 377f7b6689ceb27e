"""What a field of config.json may be: a number, a name, a list. Before rows calculate with it."""

from collections.abc import Iterator, Mapping
from typing import Any

_COUNTS_TEXT = """
    hidden_size n_embd num_attention_heads n_head num_hidden_layers n_layer vocab_size n_positions
    intermediate_size moe_intermediate_size shared_expert_intermediate_size num_key_value_heads
    num_experts_per_tok kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    max_position_embeddings decoder_sparse_step no_rope_layer_interval
"""
_COUNTS = frozenset(_COUNTS_TEXT.split())
"""Whole numbers that are at least 1."""
_MAY_BE_NULL_TEXT = """
    num_key_value_heads head_dim sliding_window q_lora_rank n_group topk_group n_shared_experts
    n_inner attention_dropout attn_pdrop router_aux_loss_coef router_jitter_noise
    num_nextn_predict_layers
"""
_MAY_BE_NULL = frozenset(_MAY_BE_NULL_TEXT.split())
"""Numbers that families read null of."""
_NEEDED = frozenset({"num_experts_per_tok"})
"""Numbers without which there is no model, even where a family has no default of them."""
_KINDS: Mapping[type, str] = {
    int: "num_key_value_heads head_dim n_inner n_group topk_group sliding_window "
    "num_experts_per_tok",
    float: "rope_theta partial_rotary_factor",
    list: "layer_types mlp_only_layers no_rope_layers",
    dict: "rope_parameters rope_scaling",
}
_WITHOUT_DEFAULT = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def kind_problems(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each field that is of another kind than its family reads.

    Args:
        fields: Of config.json.
        defaults: Of the family, see ``family_defaults``.
    """
    for name in sorted(_NEEDED & defaults.keys() - fields.keys()):
        if defaults[name] is None:
            yield f"config.json: {name} is missing"
    for name in sorted(fields.keys() & defaults.keys()):
        value, default = fields[name], defaults[name]
        kind = _WITHOUT_DEFAULT.get(name) if default is None else type(default)
        if kind is None or (value is None and not _needs_number(name, default)):
            continue
        shown = f"config.json: {name} {value!r} must be"
        if not _is(value, kind):
            yield f"{shown} {_NAMES.get(kind, kind.__name__)}"
        elif name in _COUNTS and value < 1:
            yield f"{shown} at least 1"
        elif name == "logits_scaling" and not value > 0:
            yield f"{shown} above 0: logits are divided by it"


def _needs_number(name: str, default: Any) -> bool:
    return name in _NEEDED or (type(default) in (int, float) and name not in _MAY_BE_NULL)


def _is(value: Any, kind: type) -> bool:
    return type(value) in ((int, float) if kind is float else (kind,))
