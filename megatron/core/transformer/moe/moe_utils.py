"""Megatron's import path of routing, loss and permutation functions. No code."""

from megatron.core.transformer.moe.capacity import apply_router_token_dropping, get_capacity
from megatron.core.transformer.moe.load_balancing import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.permutation import permute, unpermute
from megatron.core.transformer.moe.routing import topk_routing
from megatron.core.transformer.moe.sinkhorn import sinkhorn

__all__ = [
    "MoEAuxLossAutoScaler",
    "apply_router_token_dropping",
    "get_capacity",
    "permute",
    "sinkhorn",
    "topk_routing",
    "unpermute",
]
