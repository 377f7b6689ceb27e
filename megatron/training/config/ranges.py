"""What numbers each option may hold, on its own: a table, and the sentence when it does not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.training.config.options import Option


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``open_low`` and ``open_high`` leave the end out."""

    low: float = 0
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Return whether ``value`` is in the range."""
        if value < self.low or (self.open_low and value == self.low):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.open_high)

    def __str__(self) -> str:
        """Say it in words."""
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high is None:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


_NAMES_BY_RANGE = {
    Range(1): """
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        expert_model_parallel_size expert_tensor_parallel_size num_layers hidden_size
        ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings
        moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk
        moe_router_group_score_topk
        moe_shared_expert_intermediate_size
        moe_latent_size
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
        micro_batch_size global_batch_size train_iters exit_interval exit_duration_in_mins
        lr_decay_iters lr_wsd_decay_iters seq_length
        vocab_size make_vocab_size_divisible_by padded_vocab_size unpadded_vocab_size
        save_interval keep_last
        save_retain_interval non_persistent_save_interval
        ckpt_step eval_interval log_interval tensorboard_log_interval tensorboard_queue_size
        distributed_timeout_minutes bucket_size moe_dispatcher_node_size
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
        microbatch_group_size_per_virtual_pipeline_stage
        decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        check_replica_hash moe_routing_trace_max_training_iters
        moe_expert_chunk_tokens moe_upcycling_granularity recompute_num_layers
        dry_run_world_size loss_scale_window hysteresis mtp_num_layers
        rope_scaling_factor rotary_seq_len_interpolation_factor
        rope_scaling_original_max_position_embeddings
    """,
    Range(0): """
        num_moe_experts moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate
        seed lr min_lr weight_decay clip_grad
        lr_warmup_iters lr_warmup_init start_weight_decay end_weight_decay num_workers eval_iters
        tiktoken_num_special_tokens mtp_loss_scaling_factor mscale mscale_all_dim
    """,
    Range(0, 1e6, open_low=True): "moe_expert_capacity_factor",
    Range(0, 2.0**64, open_low=True): "loss_scale initial_loss_scale min_loss_scale",
    Range(0, open_low=True): "init_method_std layernorm_epsilon adam_eps rotary_base "
    "rope_scaling_low_freq_factor rope_scaling_high_freq_factor rope_attention_factor "
    "yarn_beta_fast yarn_beta_slow longrope_short_factor longrope_long_factor "
    "softmax_scale attn_logit_softcapping activation_func_clamp_value "
    "moe_router_topk_scaling_factor moe_routing_trace_max_mb dry_run_memory_gib "
    "embedding_multiplier residual_multiplier logits_multiplier final_logit_softcapping",
    Range(-1e3, 1e3): "moe_router_force_biased glu_linear_offset",
    Range(0, 1, open_high=True): """
        moe_router_quantile_balancing_ema
        attention_dropout hidden_dropout adam_beta1 adam_beta2 sgd_momentum lr_warmup_fraction
    """,
    Range(0, 1, open_low=True): "rotary_percent",
    Range(0, 1, open_low=True, open_high=True): "moe_input_jitter_eps",
}
RANGES: dict[str, Range] = {
    name: limits for limits, names in _NAMES_BY_RANGE.items() for name in names.split()
}


def range_problems(values: dict[str, Any], options: dict[str, Option]) -> Iterator[tuple[str, str]]:
    """Yield (field name, sentence) for each value, or element of a list, out of its range."""
    for name, value in values.items():
        limits = RANGES.get(name)
        numbers = value if isinstance(value, list) else [value]
        wrong = [n for n in numbers if limits is not None and n is not None and not limits.holds(n)]
        if wrong:
            yield name, f"{options[name].show(value)} must be {limits}"
