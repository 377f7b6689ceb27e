"""Megatron's import path of its MoE functions, by its names and signatures. No code.

For users' scripts. Our own code calls the pure functions that these stand on.
"""

from megatron.core.transformer.moe.capacity import apply_router_token_dropping, get_capacity
from megatron.core.transformer.moe.megatron_group_names import (
    get_default_pg_collection,
    get_updated_expert_bias,
    maybe_move_tensor_to_cpu,
)
from megatron.core.transformer.moe.megatron_loss_names import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
    z_loss_func,
)
from megatron.core.transformer.moe.megatron_routing_names import (
    apply_biased_logits,
    apply_random_logits,
    group_limited_topk,
    qb_dual_update,
    router_gating_linear,
    sinkhorn,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.megatron_row_names import (
    pad_routing_map,
    permute,
    sort_chunks_by_idxs,
    unpermute,
)
from megatron.core.transformer.moe.megatron_tracker_names import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
    save_to_aux_losses_tracker,
    track_moe_metrics,
)
from megatron.core.transformer.moe.routing import topk_routing

__all__ = [
    "MoEAuxLossAutoScaler",
    "apply_biased_logits",
    "apply_random_logits",
    "apply_router_token_dropping",
    "clear_aux_losses_tracker",
    "compute_routing_scores_for_aux_loss",
    "get_capacity",
    "get_default_pg_collection",
    "get_moe_layer_wise_logging_tracker",
    "get_tokens_per_expert_and_token_count",
    "get_updated_expert_bias",
    "group_limited_topk",
    "maybe_move_tensor_to_cpu",
    "pad_routing_map",
    "permute",
    "qb_dual_update",
    "reduce_aux_losses_tracker_across_ranks",
    "router_gating_linear",
    "save_to_aux_losses_tracker",
    "sinkhorn",
    "sort_chunks_by_idxs",
    "switch_load_balancing_loss_func",
    "topk_routing",
    "topk_routing_with_score_function",
    "track_moe_metrics",
    "unpermute",
    "z_loss_func",
]
