import json
from dataclasses import fields
from typing import Any

import pytest

from megatron.core.errors import CheckpointError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import (
    ARCHITECTURE,
    architecture,
    architecture_problems,
    changed_options,
    config_data,
    config_from_data,
    schedule,
    schedule_problems,
    stored_architecture,
)

_LATENT = {"multi_latent_attention": True, "position_embedding_type": "rope"}

# options of the model that may differ between a checkpoint and the run that loads it
MAY_DIFFER = {
    "cache_mla_latents",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "pipeline_schedule",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
    "context_parallel_size",
    "cp_comm_type",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "init_method_std",
    "apply_wd_to_qk_layernorm",
    "hidden_dropout",
    "attention_dropout",
    "moe_router_dtype",
    "moe_router_quantile_balancing_ema",
    "moe_router_force_biased",
    "moe_enable_routing_replay",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_input_jitter_eps",
    "moe_router_force_load_balancing",
    "moe_token_dispatcher_type",
    "moe_dispatcher_node_size",
    "moe_experts_type",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_pad_expert_input_to_capacity",
    "moe_grouped_mm_backend",
    "moe_fused_activation",
    "bias_swiglu_fusion",
    "moe_permute_fusion",
    "moe_expert_chunk_tokens",
    "moe_shared_expert_overlap",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "mtp_loss_scaling_factor",
    "max_position_embeddings",  # its table is compared by shape
}
RESOLVED = {
    "add_mlp_bias": "has_mlp_bias",
    "ffn_hidden_size": "ffn_size",
    "num_query_groups": "query_groups",
    "group_query_attention": "query_groups",
    "kv_channels": "head_dim",
    "window_size": "attention_windows",
    "window_attn_skip_freq": "attention_windows",
    "moe_layer_freq": "moe_layer_pattern",
    "moe_ffn_hidden_size": "moe_ffn_size",
    "moe_router_load_balancing_type": "moe_router_choice",
    "moe_num_experts_per_layer": "moe_experts_by_layer",
    "moe_router_topk_per_layer": "moe_topk_by_layer",
    "position_embedding_type": "position_kind",
    "rope_type": "rope_scaling",
    "use_rope_scaling": "rope_scaling",
    "rope_scaling_type": "rope_scaling",
    "rope_scaling_factor": "rope_factor",
    "rotary_seq_len_interpolation_factor": "rope_factor",
    "rope_scaling_original_max_position_embeddings": "rope_original_length",
    "bf16": "params_dtype_name",
    "fp16": "params_dtype_name",
    "fp64": "params_dtype_name",
}


def run_config(**options: object) -> RunConfig:
    defaults: dict = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "lr": 1e-3,
        "train_iters": 10,
        "lr_decay_iters": 10,
        "global_batch_size": 8,
    }
    return RunConfig.from_flat(defaults | options)


def stored(config: RunConfig) -> dict[str, Any]:
    common = {"schedule": schedule(config), "config": config_data(config)}
    return json.loads(json.dumps(common))


def problems(then: dict, now: dict) -> list[str]:
    old = json.loads(json.dumps(architecture(run_config(**then).model)))
    return list(architecture_problems(old, architecture(run_config(**now).model)))


# what the first checkpoints said of their model; all else came later
FIRST = {
    "--num-layers",
    "--hidden-size",
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--num-query-groups",
    "--kv-channels",
    "--add-qkv-bias",
    "--position-embedding-type",
    "--rotary-base",
    "--rotary-percent",
    "--swiglu",
    "--add-bias-linear",
    "--normalization",
    "--norm-epsilon",
    "--untie-embeddings-and-output-weights",
    "--num-experts",
    "number format (--bf16, --fp16, --fp64)",
}


def problems_with_an_old_checkpoint(then: dict, now: dict) -> list[str]:
    """As ``problems``, where the checkpoint knows nothing of options that came later."""
    old = run_config(**then)
    names = then.keys() | {"num_layers", "hidden_size", "num_attention_heads"}
    kept = {key: value for key, value in config_data(old)["model"].items() if key in names}
    facts = {key: value for key, value in architecture(old.model).items() if key in FIRST}
    common = json.loads(json.dumps({"config": {"model": kept}, "architecture": facts}))
    found = stored_architecture(common)
    return list(architecture_problems(found, architecture(run_config(**now).model)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_embedding_type": "rope", "normalization": "RMSNorm"},
        {"add_bias_linear": False, "swiglu": True},
        {"num_moe_experts": 4, "moe_router_topk": 2},
    ],
)
def test_a_checkpoint_from_before_new_options_goes_on_without_them(options: dict) -> None:
    assert problems_with_an_old_checkpoint(options, options) == []


@pytest.mark.parametrize(
    ("options", "new", "flag"),
    [
        ({}, {"qk_layernorm": True}, "--qk-layernorm is False in the checkpoint and True"),
        ({}, {"embedding_multiplier": 2.0}, "--embedding-multiplier is 1.0"),
        ({}, {"window_size": [3, 0]}, "(--window-size, --window-attn-skip-freq) is None"),
        ({}, {"squared_relu": True}, "--squared-relu is False"),
        ({}, {"parallel_residual": True}, "--parallel-residual is False"),
        ({"add_bias_linear": False}, {"add_mlp_bias": True}, "--add-mlp-bias is False"),
        (
            {"position_embedding_type": "rope"},
            {"rotary_interleaved": True},
            "--rotary-interleaved is False",
        ),
        (
            {"position_embedding_type": "rope"},
            {"use_rope_scaling": True},
            "--rope-scaling-type is none in the checkpoint and llama3",
        ),
        (
            {"num_moe_experts": 4, "moe_router_score_function": "sigmoid"},
            {"moe_router_norm_topk_prob": False},
            "(--no-moe-router-norm-topk-prob) is True",
        ),
    ],
)
def test_a_new_option_makes_another_model_of_an_old_checkpoint(
    options: dict, new: dict, flag: str
) -> None:
    assert flag in " ".join(problems_with_an_old_checkpoint(options, options | new))


def test_every_option_of_the_model_is_compared_or_known_to_be_free() -> None:
    compared = set(ARCHITECTURE.values())
    for field in fields(TransformerConfig):
        is_compared = RESOLVED.get(field.name, field.name) in compared
        assert is_compared != (field.name in MAY_DIFFER), field.name


@pytest.mark.parametrize(
    ("then", "now", "flag"),
    [
        ({}, {"num_layers": 3}, "--num-layers is 2 in the checkpoint and 3 in this run"),
        ({}, {"swiglu": True, "ffn_hidden_size": 128}, "--swiglu is False"),
        ({"num_moe_experts": 4}, {"num_moe_experts": 8}, "--num-experts is 4"),
        ({"num_moe_experts": 4}, {}, "--num-experts is 4 in the checkpoint and None"),
        ({"num_moe_experts": 4}, {"num_moe_experts": 4, "moe_router_topk": 1}, "--moe-router-topk"),
        ({"num_moe_experts": 4}, {"num_moe_experts": 4, "moe_layer_freq": [0, 1]}, "[1, 1]"),
        ({}, {"bf16": True}, "--bf16"),
        ({}, {"qk_layernorm": True}, "--qk-layernorm is False"),
        (
            {"qk_layernorm": True},
            {"qk_layernorm": True, "qk_layernorm_scope": "all_heads"},
            "--qk-layernorm-scope is head in the checkpoint and all_heads",
        ),
        (
            {"position_embedding_type": "rope"},
            {"position_embedding_type": "rope", "rotary_interleaved": True},
            "--rotary-interleaved is False",
        ),
        (
            {"position_embedding_type": "rope"},
            {"position_embedding_type": "rope", "use_rope_scaling": True},
            "--rope-scaling-type is none in the checkpoint and llama3",
        ),
        (
            {"position_embedding_type": "yarn", "rope_scaling_factor": 4.0},
            {"position_embedding_type": "yarn", "rope_scaling_factor": 8.0},
            "--rope-scaling-factor is 4.0 in the checkpoint and 8.0",
        ),
        ({}, {"window_size": [3, 0]}, "is None in the checkpoint and [3, 3]"),
        ({}, {"softmax_type": "off-by-one"}, "--softmax-type is vanilla"),
        ({}, _LATENT, "--multi-latent-attention is False in the checkpoint and True"),
        (_LATENT, _LATENT | {"q_lora_rank": 8}, "--q-lora-rank is None in the checkpoint and 8"),
        (_LATENT, _LATENT | {"v_head_dim": 8}, "--v-head-dim is 128 in the checkpoint and 8"),
        ({}, {"softmax_scale": 0.5}, "--softmax-scale is None"),
        ({"attn_logit_softcapping": 30.0}, {}, "--attn-logit-softcapping is 30.0"),
        ({"num_moe_experts": 4}, {"num_moe_experts": 4, "moe_router_type": "hash"}, "is topk in"),
        (
            {
                "num_layers": 3,
                "moe_layer_freq": [0, 1, 1],
                "num_moe_experts": 4,
                "moe_num_experts_per_layer": [0, 2, 4],
            },
            {"num_layers": 3, "moe_layer_freq": [0, 1, 1], "num_moe_experts": 4},
            "--moe-num-experts-per-layer is [0, 2, 4] in the checkpoint and None in this run",
        ),
        (
            {"num_moe_experts": 4, "moe_router_topk_per_layer": [2, 1]},
            {"num_moe_experts": 4, "moe_router_topk_per_layer": [1, 2]},
            "--moe-router-topk-per-layer is [2, 1] in the checkpoint and [1, 2]",
        ),
        (
            {"num_moe_experts": 4},
            {"num_moe_experts": 4, "moe_router_load_balancing_type": ["sinkhorn"]},
            "choice of experts (--moe-router-load-balancing-type) is topk in the checkpoint and",
        ),
    ],
)
def test_another_architecture_is_named(then: dict, now: dict, flag: str) -> None:
    assert any(flag in problem for problem in problems(then, now))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"ffn_hidden_size": 128}),
        ({"num_moe_experts": 4}, {"num_moe_experts": 4, "moe_layer_freq": [1, 1]}),
        ({}, {"moe_router_topk": 1}),
        (
            {"num_moe_experts": 4, "moe_router_topk": 1},
            {
                "num_moe_experts": 4,
                "moe_num_experts_per_layer": [4, 4],
                "moe_router_topk_per_layer": [1, 1],
            },
        ),
        ({}, {"rotary_base": 500000}),
        ({}, {"window_size": [-1, 0]}),
        (
            {"window_size": [3, 0], "window_attn_skip_freq": 2},
            {"window_size": [3, 0], "window_attn_skip_freq": [1, 0]},
        ),
        ({}, {"hidden_dropout": 0.0, "expert_model_parallel_size": 2}),
    ],
)
def test_the_same_model_said_otherwise_is_accepted(then: dict, now: dict) -> None:
    assert problems(then, now) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 2e-3}, "--lr is 0.001 in the checkpoint and 0.002"),
        ({"min_lr": 1e-4}, "--min-lr is 0.0 in the checkpoint and 0.0001"),
        ({"weight_decay": 0.1}, "--weight-decay is 0.01 in the checkpoint and 0.1"),
        ({"lr_decay_style": "cosine"}, "--lr-decay-style is linear in the checkpoint and cosine"),
        ({"lr_warmup_iters": 2}, "--lr-warmup-iters is 0 (x --global-batch-size 8 = 0 samples)"),
        ({"lr_decay_iters": 20}, "20 (x --global-batch-size 8 = 160 samples)"),
        ({"global_batch_size": 16}, "10 (x --global-batch-size 16 = 160 samples)"),
    ],
)
def test_a_changed_schedule_is_named_with_both_values(changes: dict, words: str) -> None:
    found = list(schedule_problems(stored(run_config()), run_config(**changes)))
    assert any(words in problem for problem in found), found


def test_a_decay_that_follows_more_iterations_is_explained() -> None:
    longer = run_config(train_iters=20, lr_decay_iters=20)
    (problem,) = schedule_problems(stored(run_config()), longer)
    assert "because --train-iters was 10 and is 20 now" in problem
    assert "--lr-decay-iters 10 keeps the checkpoint's" in problem


@pytest.mark.parametrize(
    ("iters", "words"),
    [(1_500_000, "--lr-decay-iters 1500000 keeps"), (12_345_678, "(x --global-batch-size 8 = 98")],
)
def test_large_lengths_are_written_as_the_flags_take_them(iters: int, words: str) -> None:
    longer = run_config(train_iters=2 * iters, lr_decay_iters=2 * iters)
    now = run_config(train_iters=iters, lr_decay_iters=iters)
    (problem,) = schedule_problems(stored(now), longer)
    assert words in problem
    assert f"is {iters} (x --global-batch-size 8 = {8 * iters} samples)" in problem
    assert "e+" not in problem


def test_a_length_that_no_flag_can_say_is_not_advised() -> None:
    now = run_config(train_iters=20, lr_decay_iters=20, global_batch_size=12)
    (problem,) = schedule_problems(stored(run_config()), now)
    assert problem.endswith("because --train-iters was 10 and is 20 now")


def test_settings_without_effect_are_not_compared() -> None:
    constant = run_config(lr_decay_style="constant")
    changed = run_config(
        lr_decay_style="constant", lr_decay_iters=99, min_lr=1e-5, lr_warmup_init=1e-6
    )
    assert list(schedule_problems(stored(constant), changed)) == []


def test_what_else_changed_is_told() -> None:
    changed = run_config(seed=5, data_path=["a"], micro_batch_size=2, log_interval=7)
    assert changed_options(stored(run_config()), changed) == [
        "--seed was 1234 and now is 5",
        "--data-path was None and now is ['a']",
    ]


def test_another_microbatch_is_told_where_balance_losses_are_those_of_one() -> None:
    one, two = (run_config(num_moe_experts=4, micro_batch_size=size) for size in (1, 2))
    assert changed_options(stored(one), two) == ["--micro-batch-size was 1 and now is 2"]


def test_a_configuration_comes_back_from_json() -> None:
    config = run_config(moe_layer_freq=[0, 1], data_path=["0.5", "a"], lr=1 / 3)
    again = config_from_data(json.loads(json.dumps(config_data(config))))
    assert again.flat() == config.flat()


def test_an_option_of_another_version_is_named() -> None:
    data = config_data(run_config())
    data["model"]["warp_drive"] = True
    with pytest.raises(CheckpointError, match="warp_drive"):
        config_from_data(data)
