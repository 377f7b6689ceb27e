"""From the config to the parts of a MoE layer; the flags' values are named here."""

from typing import Any

from megatron.core.models.gpt.mlp_module_specs import get_mlp_submodules
from megatron.core.tensor_parallel.layers import Linear
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllDedupTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEHierarchicalTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERTS: dict[str, type] = {"grouped": GroupedMLP, "sequential": SequentialMLP}
"""By the names that --moe-experts-type takes."""

TOKEN_DISPATCHERS: dict[str, type[MoETokenDispatcher[Any]]] = {
    "allgather": MoEAllGatherTokenDispatcher,
    "alltoall": MoEAlltoAllTokenDispatcher,
    "alltoall_dedup": MoEAlltoAllDedupTokenDispatcher,
    "alltoall_hierarchical": MoEHierarchicalTokenDispatcher,
}
"""By the names that --moe-token-dispatcher-type takes."""


def get_moe_module_spec(config: TransformerConfig) -> ModuleSpec:
    """Describe the MoE layer that ``config`` asks for.

    Raises:
        ConfigError: ``config`` contradicts itself; see ``TransformerConfig.check``.
    """
    config.check()
    has_shared = config.moe_shared_expert_intermediate_size is not None
    shared = ModuleSpec(SharedExpertMLP, get_mlp_submodules(config)) if has_shared else None
    return ModuleSpec(
        MoELayer,
        MoESubmodules(
            experts=EXPERTS[config.moe_experts_type],
            shared_experts=shared,
            latent_proj=None if config.moe_latent_size is None else Linear,
            router=TopKRouter,
            token_dispatcher=TOKEN_DISPATCHERS[config.moe_token_dispatcher_type],
        ),
    )
