"""Megatron's import path of routing, loss and permutation functions. No code."""

from megatron.core.transformer.moe.load_balancing import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.permutation import permute, unpermute
from megatron.core.transformer.moe.routing import topk_routing

__all__ = ["MoEAuxLossAutoScaler", "permute", "topk_routing", "unpermute"]
