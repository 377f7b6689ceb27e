"""Token dispatchers; Megatron's import path."""

from megatron.core.transformer.moe.token_dispatcher.allgather import MoEAllGatherTokenDispatcher
from megatron.core.transformer.moe.token_dispatcher.alltoall import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.moe.token_dispatcher.alltoall_dedup import (
    MoEAlltoAllDedupTokenDispatcher,
)
from megatron.core.transformer.moe.token_dispatcher.alltoall_hierarchical import (
    MoEHierarchicalTokenDispatcher,
)
from megatron.core.transformer.moe.token_dispatcher.base import (
    DispatchedTokens,
    MoETokenDispatcher,
)

__all__ = [
    "DispatchedTokens",
    "MoEAllGatherTokenDispatcher",
    "MoEAlltoAllDedupTokenDispatcher",
    "MoEAlltoAllTokenDispatcher",
    "MoEHierarchicalTokenDispatcher",
    "MoETokenDispatcher",
]
