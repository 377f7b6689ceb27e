"""The MoE layer: route, permute, compute, unpermute. Each part is a slot and knows no other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.moe.token_dispatcher.base import local_expert_count
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

_PLAIN = ForwardContext()


@dataclass(frozen=True, kw_only=True)
class MoESubmodules:
    """What fills the slots of a MoE layer."""

    experts: ModuleSpec | type
    """Bank of experts, such as ``GroupedMLP``."""
    router: ModuleSpec | type = TopKRouter
    """Returns a ``Routing``."""
    token_dispatcher: Callable[..., MoETokenDispatcher[Any]] = MoEAlltoAllTokenDispatcher
    """Class of the dispatcher."""


class MoELayer(nn.Module):
    """A mixture of experts in place of an MLP.

    ``output = sum over chosen experts e of probs[e] * expert_e(input)``, for each token; no token
    is dropped.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the parts.

        Args:
            config: Of the model.
            submodules: What to build.
            layer_number: Global index of the layer, from 0.
            pg_collection: Experts are spread over its ``ep``.
        """
        super().__init__()
        assert config.num_moe_experts is not None, "a MoE layer needs num_moe_experts"
        self.router = build_module(
            submodules.router, config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.token_dispatcher = submodules.token_dispatcher(
            config.num_moe_experts, ep_group=pg_collection.ep, topk=config.moe_router_topk
        )
        self.experts = build_module(
            submodules.experts,
            local_expert_count(config.num_moe_experts, pg_collection.ep.size()),
            config,
            pg_collection=pg_collection,
        )

    def forward(
        self, hidden_states: Tensor, context: ForwardContext = _PLAIN
    ) -> tuple[Tensor, None]:
        """Apply to ``hidden_states`` [s, b, h].

        Returns:
            The output [s, b, h]; and None, for no bias is left to add.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [s*b, h]
        probs, routing_map = self.router(hidden_states, context)
        sent = self.token_dispatcher.token_permutation(tokens, probs, routing_map)
        output, _ = self.experts(sent.hidden_states, sent.tokens_per_expert, sent.probs)
        combined = self.token_dispatcher.token_unpermutation(output, sent)
        return combined.view(hidden_states.shape), None
