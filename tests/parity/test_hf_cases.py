"""The tiny checkpoints can tell: each field of config.json that is proved changes their logits.

A proof on a model in which a window, a scaling or a limit does nothing would prove nothing. Here
their model computes with the field and without, from the same weights.
"""

import collections
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.options import model_options
from tests.helpers.hf_cases import CASES, RICHEST, WINDOW
from tests.helpers.hf_models import batch, build, randomize
from tests.reference.grok import grok_logits, grok_shapes

SEEN = 1e-3
"""A hundred times what may differ in fp32."""
OTHER: dict[str, dict[str, list[Any]]] = {
    "gpt2": {"layer_norm_epsilon": [1e-5], "activation_function": ["relu"]},
    "llama2": {"rms_norm_eps": [1e-5]},
    "mistral": {"sliding_window": [6, 8, None]},
    "mixtral-window": {"sliding_window": [6, 8, None], "num_experts_per_tok": [1]},
    "qwen2-windows": {"sliding_window": [6, 8], "max_window_layers": [0, 1, 3, 4]},
    "smollm3": {"no_rope_layers": [[1, 1, 0, 1]]},
    "qwen2-moe": {"norm_topk_prob": [True], "num_experts_per_tok": [2]},
    "qwen2-moe-renormalised": {"norm_topk_prob": [False]},
    "qwen3-moe": {"norm_topk_prob": [False]},
    "qwen3-moe-not-renormalised": {"norm_topk_prob": [True]},
    "olmoe": {"norm_topk_prob": [True], "clip_qkv": [0.5]},
    "olmoe-renormalised": {"norm_topk_prob": [False]},
    "granite-moe": {
        "embedding_multiplier": [1.0],
        "logits_scaling": [1.0],
        "residual_multiplier": [1.0],
        "attention_multiplier": [8**-0.5],
    },
    "deepseek-v2-lite": {"routed_scaling_factor": [2.0]},
    "deepseek-v2": {
        "topk_method": ["greedy"],
        "routed_scaling_factor": [1.0],
        "n_group": [2],
        "topk_group": [3],
    },
    "deepseek-v3": {
        "routed_scaling_factor": [1.0],
        "norm_topk_prob": [False],
        "n_group": [2],
        "topk_group": [3],
        "rope_interleave": [False],
    },
    "deepseek-v3-plain": {"norm_topk_prob": [True]},
    "gpt-oss": {
        "sliding_window": [6, 8, 100],
        "layer_types": [["sliding_attention"] * 4, ["full_attention"] * 4],
        "swiglu_limit": [7.0],
        "swiglu_alpha": [1.0],
        "num_experts_per_tok": [2],
    },
    "grok-1": {
        "attn_output_multiplier": [1.0],
        "max_attn_value": [30.0],
        "embedding_multiplier_scale": [1.0],
        "output_multiplier_scale": [1.0],
        "num_experts_per_tok": [1],
    },
}
"""Case -> field -> other values."""
ALSO = {
    **{name: {"hidden_act": ["relu"]} for name in RICHEST if name not in ("gpt2", "grok-1")},
    "gpt2": {"activation_function": ["gelu"], "scale_attn_by_inverse_layer_idx": [True]},
    "llama3": {"attention_bias": [True], "mlp_bias": [True], "tie_word_embeddings": [True]},
    "mixtral": {"tie_word_embeddings": [True], "sliding_window": [WINDOW]},
    "deepseek-v2": {"attention_bias": [True], "v_head_dim": [12], "q_lora_rank": [None]},
    "deepseek-v3": {"attention_bias": [True], "first_k_dense_replace": [0], "moe_layer_freq": [2]},
    "gpt-oss": {"attention_bias": [False], "num_key_value_heads": [4]},
    "granite-moe": {"attention_bias": [True]},
    "grok-1": {"tie_word_embeddings": [False], "max_attn_value": [None]},
}
"""Fields that change the tensors too: case -> field -> other values."""
UNREAD = collections.defaultdict(
    lambda: {"rope_type"},
    {
        "llama-longrope": {"rope_type", "short_factor"},  # of shorter sequences
        "llama-longrope-short": {"rope_type", "long_factor", "original_max_position_embeddings"},
    },
)
SCALED = [name for name, case in CASES.items() if "rope_parameters" in case.config]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in OTHER.items() for field in fields]
)
def test_a_field_of_the_configuration_changes_the_logits(name, field):
    for value in OTHER[name][field]:
        changed = logits(name, {field: value})
        assert difference(changed, own_logits(name)) > SEEN, f"{field} {value}"


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for table in (OTHER, ALSO) for name in table for field in table[name]],
)
def test_a_field_of_the_configuration_is_read_or_refused_by_name(name, field):
    """What changes the logits there must change the model here, or be refused."""
    config = CASES[name].config
    for value in [*OTHER.get(name, {}).get(field, []), *ALSO.get(name, {}).get(field, [])]:
        options, refusal = _read(config | {field: value})
        assert options != model_options(config), value
        assert options or field in refusal, refusal


def _read(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what a config.json means, or why it means nothing here."""
    try:
        return model_options(config), ""
    except ConfigError as error:
        return {}, str(error)


@pytest.mark.parametrize("name", SCALED)
def test_the_rotary_positions_of_older_files_mean_the_same(name):
    """`rope_theta` and `rope_scaling`, as files from before transformers 5 say it."""
    config = CASES[name].config
    rope = dict(config["rope_parameters"])
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
    assert model_options(older) == model_options(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_each_number_of_the_rotary_positions_changes_the_logits(name):
    rope = CASES[name].config["rope_parameters"]
    others = [{field: _other(value)} for field, value in rope.items() if field not in UNREAD[name]]
    if rope["rope_type"] != "default":
        others.append({"rope_type": "default"})
    for other in others:
        changed = logits(name, {"rope_parameters": rope | other})
        assert difference(changed, own_logits(name)) > SEEN, other


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "deepseek-v3" in name])
def test_the_bias_of_balancing_changes_the_logits(name):
    for key, bias in weights(name).items():
        if key.endswith("e_score_correction_bias"):
            assert difference(logits(name, **{key: bias.flip(0)}), own_logits(name)) > SEEN, key


@functools.cache
def own_logits(name: str) -> Tensor:
    return logits(name)


@functools.cache
def weights(name: str) -> dict[str, Tensor]:
    """What is stored of a model, tied tensors once."""
    case = CASES[name]
    if case.family == "grok":
        found = {key: torch.empty(shape) for key, shape in grok_shapes(case.config).items()}
    else:
        model = build(case, torch.float32)
        found = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            del found["lm_head.weight"]
    randomize(found)
    return found


@torch.no_grad()
def logits(name: str, config: dict[str, Any] | None = None, **stored: Tensor) -> Tensor:
    """Logits of a case, with other fields and tensors where they are given."""
    case = CASES[name]
    changed = case._replace(config=case.config | (config or {}))
    tensors = weights(name) | stored
    if case.family == "grok":
        return grok_logits(tensors, changed.config, batch().tokens)
    model = build(changed, torch.float32)
    model.load_state_dict(tensors, strict=False)
    return model(input_ids=batch().tokens, use_cache=False).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [2.0 * one for one in value]
    return value * 2
