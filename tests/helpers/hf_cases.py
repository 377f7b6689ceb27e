"""Tiny Hugging Face checkpoints of every family, as data: one row a case, fields as config.json.

Small, yet hard enough to tell layouts apart: sequences (`SEQ`) beyond the sliding windows and the
original lengths of scaled rotary positions, query groups of two heads, heads that are not
hidden / heads wide where a family allows it, a vocabulary that fills no padding, fewer experts a
token than a group of experts has. Imports neither torch nor transformers.
"""

from typing import Any, NamedTuple

VOCAB, SEQ, SAMPLES = 70, 24, 2
WINDOW = 7
EPSILON = 2e-3


class Case(NamedTuple):
    """A tiny checkpoint."""

    family: str
    config: dict[str, Any]
    """What config.json says, `model_type` included."""
    experts: int = 0
    """Of each MoE layer; 0: a dense model, which no expert parallelism can split."""


DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPSILON,
    "tie_word_embeddings": False,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": None,
    "attention_dropout": 0.0,
}
LLAMA = DENSE | {"model_type": "llama"}
QWEN2 = DENSE | {"model_type": "qwen2"}
QWEN3 = DENSE | {"model_type": "qwen3", "head_dim": 16}
SPARSE = DENSE | {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}
MOE_WIDTH = {"moe_intermediate_size": 24}
LATENT = DENSE | {
    "rms_norm_eps": 1e-6,  # of the norms inside the attention too, whatever is said here
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}


def _rope(theta: float, kind: str = "default", **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def _yarn(factor: float, **fields: Any) -> dict[str, Any]:
    # so small a base that each of the few pairs of a tiny head has its part of the ramp
    return _rope(100.0, "yarn", factor=factor, original_max_position_embeddings=16, **fields)


LLAMA3 = _rope(
    500000.0,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
LONG = {
    "long_factor": [1.0, 1.7, 2.5, 3.5],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
}

BETAS = {"beta_fast": 0.5, "beta_slow": 0.15}

_DENSE_CASES = {
    "gpt2": Case(
        "gpt2",
        {
            "model_type": "gpt2",
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 4,
            "n_positions": 32,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": EPSILON,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 3,
            "eos_token_id": 5,
        },
    ),
    "llama2": Case("llama", LLAMA | {"num_key_value_heads": 4} | _rope(10000.0)),
    "llama3": Case("llama", LLAMA | {"head_dim": 16} | LLAMA3),
    "llama3-tied": Case("llama", LLAMA | {"tie_word_embeddings": True} | LLAMA3),
    "llama-biases": Case(
        "llama", LLAMA | {"attention_bias": True, "mlp_bias": True} | _rope(10000.0)
    ),
    "llama-attention-biases": Case("llama", LLAMA | {"attention_bias": True} | _rope(10000.0)),
    "llama-mlp-biases": Case("llama", LLAMA | {"mlp_bias": True, "head_dim": 16} | _rope(10000.0)),
    "llama-linear": Case("llama", LLAMA | _rope(10000.0, "linear", factor=4.0)),
    "llama-yarn": Case(
        "llama",
        LLAMA | {"head_dim": 16} | _yarn(4.0, beta_fast=1.0, beta_slow=0.25, attention_factor=1.3),
    ),
    "llama-longrope": Case(
        "llama",
        LLAMA | _rope(10000.0, "longrope", original_max_position_embeddings=8, **LONG),
    ),
    "llama-longrope-short": Case(
        "llama",
        LLAMA | _rope(10000.0, "longrope", original_max_position_embeddings=32, **LONG),
    ),
    "mistral": Case(
        "mistral",
        DENSE
        | {"model_type": "mistral", "head_dim": 16, "sliding_window": WINDOW}
        | _rope(10000.0),
    ),
    "mistral-no-window": Case(
        "mistral", DENSE | {"model_type": "mistral", "sliding_window": None} | _rope(1e6)
    ),
    "qwen2": Case("qwen2", QWEN2 | {"tie_word_embeddings": True} | _rope(1e6)),
    "qwen2-windows": Case(
        "qwen2",
        QWEN2
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
        | _rope(1e6),
    ),
    "qwen2.5-yarn": Case("qwen2", QWEN2 | _yarn(4.0)),
    "qwen3": Case("qwen3", QWEN3 | {"tie_word_embeddings": True} | _rope(1e6)),
    "qwen3-biases": Case("qwen3", QWEN3 | {"attention_bias": True} | _rope(1e6)),
    "smollm": Case(
        "llama",
        LLAMA
        | {"hidden_size": 48, "num_attention_heads": 6, "tie_word_embeddings": True}
        | _rope(10000.0),
    ),
    "smollm3": Case(
        "smollm3",
        DENSE
        | {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 1], "tie_word_embeddings": True}
        | _rope(2e6),
    ),
}
_SOFTMAX_CASES = {
    "mixtral": Case(
        "mixtral",
        DENSE
        | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
        | _rope(1e6),
        8,
    ),
    "mixtral-window": Case(
        "mixtral",
        DENSE
        | {
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "head_dim": 16,
        }
        | _rope(10000.0),
        4,
    ),
    "qwen2-moe": Case(
        "qwen2_moe",
        SPARSE
        | MOE_WIDTH
        | {
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": 36,
            "decoder_sparse_step": 2,
            "use_sliding_window": False,
        }
        | _rope(1e6),
        8,
    ),
    "qwen2-moe-renormalised": Case(
        "qwen2_moe",
        SPARSE
        | MOE_WIDTH
        | {
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": 36,
            "norm_topk_prob": True,
            "mlp_only_layers": [2],
            "qkv_bias": False,
            "use_sliding_window": False,
        }
        | _rope(1e6),
        8,
    ),
    "qwen3-moe": Case(
        "qwen3_moe",
        SPARSE
        | MOE_WIDTH
        | {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True}
        | _rope(1e6),
        8,
    ),
    "qwen3-moe-not-renormalised": Case(
        "qwen3_moe",
        SPARSE
        | MOE_WIDTH
        | {"model_type": "qwen3_moe", "head_dim": 16, "mlp_only_layers": [1]}
        | _rope(1e6),
        8,
    ),
    "olmoe": Case("olmoe", SPARSE | {"model_type": "olmoe"} | _rope(10000.0), 8),
    "olmoe-renormalised": Case(
        "olmoe",
        SPARSE
        | {"model_type": "olmoe", "num_key_value_heads": 4, "norm_topk_prob": True}
        | _rope(10000.0),
        8,
    ),
    "granite-moe": Case(
        "granitemoe",
        DENSE
        | {
            "model_type": "granitemoe",
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
        }
        | _rope(10000.0),
        8,
    ),
}
_LATENT_CASES = {
    "deepseek-v2-lite": Case(
        "deepseek_v2",
        LATENT
        | {
            "model_type": "deepseek_v2",
            "q_lora_rank": None,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
        }
        | _rope(10000.0),
        8,
    ),
    "deepseek-v2": Case(
        "deepseek_v2",
        LATENT
        | {
            "model_type": "deepseek_v2",
            "q_lora_rank": 16,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
            "n_group": 4,
            "topk_group": 2,
        }
        | _yarn(4.0, mscale=0.707, mscale_all_dim=0.707, **BETAS),
        8,
    ),
    "deepseek-v3": Case(
        "deepseek_v3",
        LATENT
        | {
            "model_type": "deepseek_v3",
            "q_lora_rank": 16,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
            "num_nextn_predict_layers": 0,
        }
        | _yarn(4.0, mscale=1.0, mscale_all_dim=1.0, **BETAS),
        8,
    ),
    "deepseek-v3-plain": Case(
        "deepseek_v3",
        LATENT
        | {
            "model_type": "deepseek_v3",
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
        }
        | _rope(10000.0),
        8,
    ),
}
_OTHER_CASES = {
    "gpt-oss": Case(
        "gpt_oss",
        DENSE
        | {
            "model_type": "gpt_oss",
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": WINDOW,
            "attention_bias": True,
            "swiglu_limit": 1.0,
        }
        | _yarn(32.0, beta_fast=1.0, beta_slow=0.25, truncate=False),
        8,
    ),
    "grok-1": Case(
        "grok",
        {
            "model_type": "grok-1",
            "architectures": ["Grok1ModelForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attn_output_multiplier": 0.5,
            "max_attn_value": 2.0,
            "embedding_multiplier_scale": 3.0,
            "output_multiplier_scale": 0.6,
            "max_position_embeddings": 64,
            "rms_norm_eps": EPSILON,
            "tie_word_embeddings": True,
            "bos_token_id": 3,
            "eos_token_id": 5,
            "pad_token_id": 0,
        },
        8,
    ),
}
CASES = {**_DENSE_CASES, **_SOFTMAX_CASES, **_LATENT_CASES, **_OTHER_CASES}
"""Name -> case, dense families first."""

RICHEST = (
    *("gpt2", "llama3", "mistral", "qwen2-windows", "qwen3-biases", "smollm3"),
    *("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "granite-moe"),
    *("deepseek-v2", "deepseek-v3", "gpt-oss", "grok-1"),
)
"""One case of each family: what quick tests look at."""
