"""May this run go on from that checkpoint? Pure comparisons of settings, everything named.

What would change the model is refused; what would change the schedule is refused unless the user
overrides it; what else differs is told. Shapes are compared again, tensor by tensor, at load.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron.core.errors import CheckpointError
from megatron.core.transformer.config.pipeline import PIPELINE_OPTIONS
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig

# flag -> attribute of TransformerConfig, resolved: what the function of the network depends on
ARCHITECTURE = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "query_groups",
    "--kv-channels": "head_dim",
    "--multi-latent-attention": "multi_latent_attention",
    "--q-lora-rank": "q_lora_rank",
    "--kv-lora-rank": "kv_lora_rank",
    "--qk-head-dim": "qk_head_dim",
    "--qk-pos-emb-head-dim": "qk_pos_emb_head_dim",
    "--v-head-dim": "v_head_dim",
    "--add-qkv-bias": "add_qkv_bias",
    "--add-proj-bias": "add_proj_bias",
    "--qk-layernorm": "qk_layernorm",
    "--qk-layernorm-scope": "qk_layernorm_scope",
    "--position-embedding-type": "position_kind",
    "--softmax-scale": "softmax_scale",
    "windows of the layers (--window-size, --window-attn-skip-freq)": "attention_windows",
    "--softmax-type": "softmax_type",
    "--attn-logit-softcapping": "attn_logit_softcapping",
    "--rotary-base": "rotary_base",
    "--rotary-percent": "rotary_percent",
    "--rotary-interleaved": "rotary_interleaved",
    "--rope-scaling-type": "rope_scaling",
    "--rope-scaling-factor": "rope_factor",
    "--rope-scaling-original-max-position-embeddings": "rope_original_length",
    "--rope-scaling-low-freq-factor": "rope_scaling_low_freq_factor",
    "--rope-scaling-high-freq-factor": "rope_scaling_high_freq_factor",
    "--rope-attention-factor": "rope_attention_factor",
    "--yarn-beta-fast": "yarn_beta_fast",
    "--yarn-beta-slow": "yarn_beta_slow",
    "--yarn-correction-range-round-to-int": "yarn_correction_range_round_to_int",
    "--mscale": "mscale",
    "--mscale-all-dim": "mscale_all_dim",
    "--longrope-short-factor": "longrope_short_factor",
    "--longrope-long-factor": "longrope_long_factor",
    "--swiglu": "swiglu",
    "--geglu": "geglu",
    "--quick-geglu": "quick_geglu",
    "--openai-gelu": "openai_gelu",
    "--squared-relu": "squared_relu",
    "--glu-linear-offset": "glu_linear_offset",
    "--activation-func-clamp-value": "activation_func_clamp_value",
    "--add-bias-linear": "add_bias_linear",
    "--add-mlp-bias": "has_mlp_bias",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "--embedding-multiplier": "embedding_multiplier",
    "--residual-multiplier": "residual_multiplier",
    "--logits-multiplier": "logits_multiplier",
    "--final-logit-softcapping": "final_logit_softcapping",
    "--parallel-residual": "parallel_residual",
    "--parallel-residual-shared-norm": "parallel_residual_shared_norm",
    "--sandwich-norm": "sandwich_norm",
    "--untie-embeddings-and-output-weights": "untie_embeddings_and_output_weights",
    "--mtp-num-layers": "mtp_num_layers",
    "--num-experts": "num_moe_experts",
    "--moe-num-experts-per-layer": "moe_experts_by_layer",
    "--moe-layer-freq": "moe_layer_pattern",
    "--moe-ffn-hidden-size": "moe_ffn_size",
    "--moe-shared-expert-intermediate-size": "moe_shared_expert_intermediate_size",
    "--moe-shared-expert-gate": "moe_shared_expert_gate",
    "--moe-latent-size": "moe_latent_size",
    "--moe-router-type": "moe_router_type",
    "--moe-router-topk": "moe_router_topk",
    "--moe-router-topk-per-layer": "moe_topk_by_layer",
    "--moe-router-pre-softmax": "moe_router_pre_softmax",
    "--moe-router-score-function": "moe_router_score_function",
    "--moe-router-num-groups": "moe_router_num_groups",
    "--moe-router-group-topk": "moe_router_group_topk",
    "--moe-router-group-score-topk": "moe_router_group_score_topk",
    "--moe-router-bias": "moe_router_bias",
    "weights over their sum (--no-moe-router-norm-topk-prob)": "moe_router_norm_topk_prob",
    "--moe-router-enable-expert-bias": "moe_router_enable_expert_bias",
    "choice of experts (--moe-router-load-balancing-type)": "moe_router_choice",
    "--moe-router-topk-scaling-factor": "moe_router_topk_scaling_factor",
    "number format (--bf16, --fp16, --fp64)": "params_dtype_name",
}
_ONLY_WITH = {
    "--rotary-base": ("has_rotary_positions", True),
    "--rotary-percent": ("has_rotary_positions", True),
    "--rotary-interleaved": ("has_rotary_positions", True),
    "--rope-scaling-low-freq-factor": ("rope_scaling", "llama3"),
    "--rope-scaling-high-freq-factor": ("rope_scaling", "llama3"),
    "--yarn-beta-fast": ("rope_scaling", "yarn"),
    "--yarn-beta-slow": ("rope_scaling", "yarn"),
    "--yarn-correction-range-round-to-int": ("rope_scaling", "yarn"),
    "--mscale": ("rope_scaling", "yarn"),
    "--mscale-all-dim": ("rope_scaling", "yarn"),
    "--kv-channels": ("multi_latent_attention", False),
    "--q-lora-rank": ("multi_latent_attention", True),
    "--kv-lora-rank": ("multi_latent_attention", True),
    "--qk-head-dim": ("multi_latent_attention", True),
    "--qk-pos-emb-head-dim": ("multi_latent_attention", True),
    "--v-head-dim": ("multi_latent_attention", True),
    "--qk-layernorm-scope": ("qk_layernorm", True),
}
_BY_LAYER = {  # told for each layer where layers differ, else by the flag for all
    "--moe-num-experts-per-layer": "--num-experts",
    "--moe-router-topk-per-layer": "--moe-router-topk",
}
_ONLY_MOE = tuple(flag for flag in ARCHITECTURE if flag.startswith("--moe-"))

# these may change from start to start without a word
_FREE_SECTIONS = (
    "checkpoint",
    "logging",
    "distributed",
    "ddp",
    "validation",
    "tokenizer",
    "dry_run",
)
_FREE = {
    "micro_batch_size",
    "num_workers",
    "data_cache_path",
    "moe_token_dispatcher_type",
    "moe_dispatcher_node_size",
    "moe_experts_type",
    "moe_enable_routing_replay",
    "moe_grouped_mm_backend",
    "moe_fused_activation",
    "bias_swiglu_fusion",
    "moe_permute_fusion",
    "moe_expert_chunk_tokens",
    "moe_shared_expert_overlap",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "cache_mla_latents",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    *PIPELINE_OPTIONS,
    "context_parallel_size",
    "cp_comm_type",
    "sequence_parallel",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "exit_interval",
    "exit_duration_in_mins",
    "exit_signal_handler",
    "skip_train",
}


def architecture(config: TransformerConfig) -> dict[str, Any]:
    """Return flag -> resolved value of everything that makes the model what it is; plain JSON."""
    facts = {flag: getattr(config, name) for flag, name in ARCHITECTURE.items()}
    for flag, (name, value) in _ONLY_WITH.items():
        if getattr(config, name) != value:
            facts[flag] = None
    for flag, of_all in _BY_LAYER.items():
        numbers = dict(zip(config.moe_layers, facts[flag], strict=True))
        facts[of_all] = max(numbers.values(), default=None)
        by_layer = [numbers.get(layer, 0) for layer in range(config.num_layers)]
        facts[flag] = by_layer if len(set(numbers.values())) > 1 else None
    if config.num_moe_experts is None:
        facts.update(dict.fromkeys(_ONLY_MOE))
    pattern = facts["--moe-layer-freq"]
    facts["--moe-layer-freq"] = pattern and [int(is_moe) for is_moe in pattern]
    return facts


def stored_architecture(common: dict[str, Any]) -> dict[str, Any]:
    """Return what ``architecture`` says of the model of a checkpoint, of whichever age.

    What an older version did not know of is what its options give with the new ones at their
    defaults, by which a new option changes nothing.

    Args:
        common: The ``common.json`` of the checkpoint.
    """
    stored: dict[str, Any] = dict(common["architecture"])
    if not ARCHITECTURE.keys() <= stored.keys():
        neutral = architecture(RunConfig.from_flat(flat(common["config"])).model)
        stored = neutral | stored
    return stored


def schedule(config: RunConfig) -> dict[str, Any]:
    """Return setting -> value of learning rate and weight decay, lengths in samples (R13).

    Settings that have no effect under the chosen style are left out.
    """
    scheduler, optimizer, training = config.scheduler, config.optimizer, config.training
    batch = training.global_batch_size or 1
    decay = scheduler.lr_decay_iters or training.train_iters or 0
    warmup: float = scheduler.lr_warmup_iters * batch
    if scheduler.lr_warmup_fraction is not None:
        warmup = scheduler.lr_warmup_fraction * (decay * batch)  # the same for any batch
    found: dict[str, Any] = {
        "--lr": optimizer.lr,
        "--lr-decay-style": scheduler.lr_decay_style,
        "--lr-warmup-iters": warmup,
        "--weight-decay-incr-style": scheduler.weight_decay_incr_style,
    }
    if scheduler.weight_decay_incr_style == "constant":
        found["--weight-decay"] = optimizer.weight_decay
    else:
        found |= {
            "--start-weight-decay": scheduler.start_weight_decay,
            "--end-weight-decay": scheduler.end_weight_decay,
            "--train-iters": (training.train_iters or 0) * batch,
        }
    if warmup:
        found["--lr-warmup-init"] = scheduler.lr_warmup_init
    if scheduler.lr_decay_style != "constant":
        found |= {"--min-lr": optimizer.min_lr, "--lr-decay-iters": decay * batch}
    if scheduler.lr_decay_style == "WSD":
        found["--lr-wsd-decay-style"] = scheduler.lr_wsd_decay_style
        found["--lr-wsd-decay-iters"] = (scheduler.lr_wsd_decay_iters or 0) * batch
    return found


def architecture_problems(stored: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each flag that makes this run's model another one.

    Args:
        stored: See ``stored_architecture``; both say all that ``architecture`` says.
        current: Of this run.
    """
    for flag, value in current.items():
        if stored[flag] != value:
            yield f"{flag} is {stored[flag]} in the checkpoint and {value} in this run"


def schedule_problems(stored: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each learning-rate or weight-decay setting that differs.

    Args:
        stored: The ``common.json`` of the checkpoint.
        config: Of this run.
    """
    then, now = stored["schedule"], schedule(config)
    old = flat(stored["config"])
    batches = old["global_batch_size"] or 1, config.training.global_batch_size or 1
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if not name.endswith("-iters"):
            yield f"{name} is {before} in the checkpoint and {after} in this run"
            continue
        yield (
            f"{name} {_length(before, batches[0])} in the checkpoint and "
            f"{_length(after, batches[1])} in this run"
        ) + _why_length(name, before, old, config)


def _length(samples: float | None, batch: int) -> str:
    if samples is None:
        return "has no effect"
    whole = f"x --global-batch-size {batch} = {_number(samples)} samples"
    return f"is {_number(samples / batch)} ({whole})"


def _number(value: float) -> str:
    """Write a whole number as flags take it, never as 1.5e+06."""
    return str(round(value)) if _is_whole(value) else f"{value:.10g}"


def _is_whole(value: float) -> bool:
    return math.isclose(value, round(value), rel_tol=1e-12)  # 0.07 * 100 is 7 as well


def _why_length(name: str, before: float | None, old: dict[str, Any], config: RunConfig) -> str:
    then, now = old["train_iters"], config.training.train_iters
    if then == now or before is None or config.given(name[2:].replace("-", "_")):
        return ""
    keep = before / (config.training.global_batch_size or 1)
    advice = f"; {name} {_number(keep)} keeps the checkpoint's" if _is_whole(keep) else ""
    return f", because --train-iters was {then} and is {now} now{advice}"


def tokenizer_problem(stored: dict[str, Any] | None, current: dict[str, Any] | None) -> str:
    """Say what differs between two tokenizers' facts; empty when one of them is unknown."""
    if not stored or not current or stored["fingerprint"] == current["fingerprint"]:
        return ""
    return (
        f"the checkpoint was trained with tokenizer {_name(stored)}, this run has "
        f"{_name(current)}: the same ids would mean other text"
    )


def _name(facts: dict[str, Any]) -> str:
    return f"{facts['type']} of {facts['vocab_size']} ids (content {facts['fingerprint'][:12]})"


def changed_options(stored: dict[str, Any], config: RunConfig) -> list[str]:
    """List the options that differ and are worth a line: data, batch, seed, dropout, losses."""
    old, now = flat(stored["config"]), config.flat()
    free = set(_FREE)
    if config.model.num_moe_experts is not None:
        free.discard("micro_batch_size")  # balance losses are those of a microbatch
    return [
        f"{option.flag} was {old[name]} and now is {plain(now[name])}"
        for name, option in options_of(RunConfig).items()
        if option.section not in _FREE_SECTIONS and name not in free
        if name in old and old[name] != plain(now[name])
    ]


def config_data(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the whole configuration as JSON: section -> option -> value."""
    return {
        name: {field.name: plain(getattr(section, field.name)) for field in fields(section)}
        for name, section in config.sections()
    }


def config_from_data(data: dict[str, dict[str, Any]]) -> RunConfig:
    """Rebuild the configuration that ``config_data`` saved.

    Raises:
        CheckpointError: It holds an option that this version does not have.
    """
    values = flat(data)
    if unknown := sorted(values.keys() - options_of(RunConfig).keys()):
        raise CheckpointError(
            f"the checkpoint was saved with options this version does not have: {unknown}"
        )
    return RunConfig.from_flat(values)


def model_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of the model, field -> value, without those that any start may choose."""
    named = {field.name: getattr(config.model, field.name) for field in fields(config.model)}
    return {name: value for name, value in named.items() if name not in _FREE}


def flat(data: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Merge the sections of saved configuration: option -> value."""
    return {name: value for section in data.values() for name, value in section.items()}


def plain(value: Any) -> Any:
    """Return ``value`` as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value
