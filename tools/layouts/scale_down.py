"""A small model with the features of a large one: what is kept, what is cut, and to what. Pure.

Kept: every choice (kinds of router, balancing, activation, positions, tying), dropout, the ratio of
widths and of heads to query groups, groups of experts, which layers are dense. Cut: layers to 4,
heads to 4 of 4 elements, experts to 8, sequences to 16, the vocabulary to 64; lengths that rotary
positions are stretched from, with them.
"""

import math
from collections.abc import Mapping
from typing import Any

LAYERS, HEADS, HEAD_DIM, EXPERTS, LENGTH, VOCAB = 4, 4, 4, 8, 16, 64
SPREAD = 0.2
"""Standard deviation of weights: with that of a large model, attention and gates of so narrow a one
would be flat, and a mistake in them too small to see."""
WINDOW, CAP = 5, 1.0
"""Reach of a sliding window, which ends within the slices that ranks hold of a sequence; and the
cap of attention scores, which those of so narrow a model do come near."""
UNIT = 8
"""Widths are multiples of it, so that they split over up to 8 ranks."""


def scaled_down(values: Mapping[str, Any], layer_pattern: list[bool]) -> dict[str, Any]:
    """Return the options of a small model.

    Args:
        values: Options of the user's model by field name; what is not given stays derived.
        layer_pattern: For each layer of the user's model, whether it is a MoE layer.
    """
    found = dict(values)
    kept = kept_layers(layer_pattern)
    _widths(found, values)
    _heads(found, values)
    _positions(found, values)
    _scores(found, values, kept)
    _latents(found, values)
    if "num_moe_experts" in values or "moe_num_experts_per_layer" in values:
        _experts(found, values)
        _per_layer(found, values, kept)
        if "moe_layer_freq" in values:
            found["moe_layer_freq"] = [int(layer_pattern[layer]) for layer in kept]
    cut = {
        "num_layers": len(kept),
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "vocab_size": VOCAB - 1,
        "padded_vocab_size": VOCAB,
        "init_method_std": SPREAD,
        "micro_batch_size": 2,
        "global_batch_size": 8,
    }
    return found | cut


def kept_layers(pattern: list[bool]) -> list[int]:
    """Return which layers stay: evenly spread, first and last among them, of both kinds if any."""
    count = min(LAYERS, len(pattern))
    last = len(pattern) - 1
    kept = [round(n * last / max(count - 1, 1)) for n in range(count)]
    for kind in (True, False):
        if kind in pattern and not any(pattern[layer] == kind for layer in kept):
            kept[1 % count] = pattern.index(kind)
    return sorted(kept)


def _widths(found: dict[str, Any], values: Mapping[str, Any]) -> None:
    hidden = HEADS * HEAD_DIM
    factor = hidden / values.get("hidden_size", hidden)
    found["hidden_size"] = hidden
    for name in (
        "ffn_hidden_size",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
    ):
        if values.get(name) is not None:
            found[name] = max(UNIT, round(values[name] * factor / UNIT) * UNIT)
    if "moe_expert_chunk_tokens" in values:
        found["moe_expert_chunk_tokens"] = 5


def _heads(found: dict[str, Any], values: Mapping[str, Any]) -> None:
    found["num_attention_heads"] = HEADS
    if values.get("kv_channels") is not None:
        found["kv_channels"] = HEAD_DIM
    if "num_query_groups" in values and "num_attention_heads" in values:
        share = values["num_attention_heads"] / values["num_query_groups"]
        groups = max(1, round(HEADS / share))
        found["num_query_groups"] = max(d for d in (1, 2, 4) if d <= groups)


def _positions(found: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Rotate at least one pair, and stretch so that the frequencies of so few pairs differ."""
    if (share := values.get("rotary_percent")) is not None:
        found["rotary_percent"] = max(2 * round(share * HEAD_DIM / 2), 2) / HEAD_DIM
    kinds = {values.get(name) for name in ("position_embedding_type", "rope_type")}
    kinds |= {values.get("rope_scaling_type"), "llama3" if values.get("use_rope_scaling") else None}
    name = "rope_scaling_original_max_position_embeddings"
    if kinds & {"yarn", "llama3", "longrope"}:
        is_long = "longrope" in kinds and values.get("seq_length", LENGTH) > values.get(
            name, LENGTH
        )
        found[name] = LENGTH // 2 if is_long else LENGTH
    pairs = round(HEAD_DIM * found.get("rotary_percent", 1.0)) // 2
    for name in ("longrope_short_factor", "longrope_long_factor"):
        if values.get(name) is not None:
            found[name] = values[name][-pairs:]


def _scores(found: dict[str, Any], values: Mapping[str, Any], kept: list[int]) -> None:
    window, freq = values.get("window_size"), values.get("window_attn_skip_freq")
    if window is not None:
        hides = window[0] + 1 < values.get("seq_length", window[0] + 2)
        found["window_size"] = [min(window[0], WINDOW) if hides else LENGTH, *window[1:]]
    if freq is not None:
        layers = range(values.get("num_layers", len(kept)))
        whole = [int((n + 1) % freq != 0) for n in layers] if isinstance(freq, int) else freq
        few = [whole[n] for n in kept]
        found["window_attn_skip_freq"] = (
            few if set(few) == set(whole) else [int(n % 2 == 0) for n in range(len(kept))]
        )
    if values.get("attn_logit_softcapping") is not None:
        found["attn_logit_softcapping"] = min(values["attn_logit_softcapping"], CAP)
    if values.get("softmax_scale") is not None and "num_attention_heads" in values:
        size = values.get("kv_channels") or values["hidden_size"] // values["num_attention_heads"]
        found["softmax_scale"] = values["softmax_scale"] * math.sqrt(size / HEAD_DIM)


def _latents(found: dict[str, Any], values: Mapping[str, Any]) -> None:
    if not values.get("multi_latent_attention"):
        return
    share = values.get("v_head_dim", 128) / values.get("qk_head_dim", 128)
    found["qk_head_dim"], found["qk_pos_emb_head_dim"] = HEAD_DIM + 2, HEAD_DIM
    found["v_head_dim"] = max(2, round(found["qk_head_dim"] * share))
    found["kv_lora_rank"] = UNIT
    if values.get("q_lora_rank") is not None:
        found["q_lora_rank"] = UNIT + UNIT // 2
    if values.get("softmax_scale") is not None:
        size = values.get("qk_head_dim", 128) + values.get("qk_pos_emb_head_dim", 64)
        small = found["qk_head_dim"] + found["qk_pos_emb_head_dim"]
        found["softmax_scale"] = values["softmax_scale"] * math.sqrt(size / small)


def _experts(found: dict[str, Any], values: Mapping[str, Any]) -> None:
    experts = values.get("num_moe_experts") or max(values["moe_num_experts_per_layer"])
    few = min(experts, EXPERTS)
    if "num_moe_experts" in values:
        found["num_moe_experts"] = few
    groups = values.get("moe_router_num_groups")
    if groups is not None:
        found["moe_router_num_groups"] = math.gcd(groups, few // 2) or 1
        if values.get("moe_router_group_topk") is not None:
            share = values["moe_router_group_topk"] / groups
            found["moe_router_group_topk"] = max(1, round(share * found["moe_router_num_groups"]))
    if "moe_router_topk" in values:
        found["moe_router_topk"] = _topk(values["moe_router_topk"], few, found)


def _topk(topk: int, experts: int, found: Mapping[str, Any]) -> int:
    """Return top-k: at most half of the experts, spread evenly over the groups a token may use."""
    topk = min(topk, max(1, experts // 2))
    unit = found.get("moe_router_group_topk") or 1
    return max(unit, topk // unit * unit)


def _per_layer(found: dict[str, Any], values: Mapping[str, Any], kept: list[int]) -> None:
    experts = values.get("moe_num_experts_per_layer")
    if experts is not None:
        found["moe_num_experts_per_layer"] = [min(experts[n], EXPERTS) for n in kept]
    topk = values.get("moe_router_topk_per_layer")
    if topk is not None:
        found["moe_router_topk_per_layer"] = [min(topk[n], EXPERTS // 2) for n in kept]
    kinds = values.get("cp_comm_type")
    if kinds is not None and len(kinds) > 1:
        found["cp_comm_type"] = [kinds[n] for n in kept]
