"""Every rank sees all tokens and keeps those of its experts: simple, for few ranks or large topk.

Collectives of one layer: one exchange of sizes, then in each direction one all-gather of tokens and
one reduce-scatter, all over ``tp_ep``: the ranks that share an expert gather the same tokens. Probs
travel in a small all-to-all: a rank gets the columns of its experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.tensor_parallel.mappings import (
    RowSplits,
    all_gather_rows,
    all_to_all,
    gather_sizes,
    reduce_scatter_rows,
)
from megatron.core.transformer.moe.permutation import (
    RowPlan,
    permute,
    permute_probs,
    plan_rows,
    unpermute,
)
from megatron.core.transformer.moe.token_dispatcher.base import (
    DispatchedTokens,
    During,
    MoETokenDispatcher,
    rows_sent,
)


@dataclass(frozen=True, kw_only=True)
class AllGatherState:
    """How the rows of one dispatch were chosen."""

    plan: RowPlan
    """Tokens of all ranks -> rows of this rank's experts."""
    sizes: list[int]
    """Tokens of each rank."""


class MoEAllGatherTokenDispatcher(MoETokenDispatcher[AllGatherState]):
    """Gather tokens over tp_ep -> pick those of local experts, and sum the ranks' parts back."""

    def token_permutation(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        during: During = None,
        rows_per_expert: int | None = None,
    ) -> DispatchedTokens[AllGatherState]:
        """See ``MoETokenDispatcher.token_permutation``."""
        _run(during)
        num_tokens = hidden_states.shape[0]
        blocks = self.num_experts // self.num_local_experts
        pairs = routing_map.view(num_tokens, blocks, self.num_local_experts).sum(dim=(0, 2))
        each = None if rows_per_expert is None else rows_per_expert * self.num_local_experts
        sizes, wanted = gather_sizes(self.tp_ep_group, num_tokens, pairs, each=each)
        if wanted is None:  # no other rank: every pair is ours
            wanted = rows_sent([], num_tokens, self.topk, exact=self.exact)
        tokens = all_gather_rows(self.tp_ep_group, hidden_states, sizes)
        columns = self._own_columns(probs, routing_map, sizes)  # [sum(sizes), num_local_experts]
        routed = ~(columns.detach() < 0.0)  # so written, a NaN stays routed
        plan = plan_rows(
            routed, num_rows=wanted, max_rows_per_token=self._max_rows(), mover=self.mover
        )
        return DispatchedTokens(
            hidden_states=permute(tokens, plan),
            probs=permute_probs(columns, plan),
            tokens_per_expert=routed.sum(dim=0),
            state=AllGatherState(plan=plan, sizes=sizes),
        )

    def token_unpermutation(
        self,
        expert_output: Tensor,
        dispatched: DispatchedTokens[AllGatherState],
        *,
        during: During = None,
    ) -> Tensor:
        """See ``MoETokenDispatcher.token_unpermutation``."""
        _run(during)
        state = dispatched.state
        wide = torch.promote_types(expert_output.dtype, torch.float32)
        parts = unpermute(expert_output, state.plan, dtype=wide)
        return reduce_scatter_rows(self.tp_ep_group, parts, state.sizes).to(expert_output.dtype)

    def _own_columns(self, probs: Tensor, routing_map: Tensor, sizes: list[int]) -> Tensor:
        """Gather the probs of local experts, -1 where a token is not routed to them."""
        marked = probs.masked_fill(~routing_map, -1.0)
        num_tokens, n, sharers = probs.shape[0], self.num_local_experts, self.expt_tp_group.size()
        by_block = marked.view(num_tokens, self.num_experts // n, 1, n).transpose(0, 1)
        by_owner = by_block.expand(-1, -1, sharers, -1).transpose(1, 2)  # [ep, sharers, tokens, n]
        by_owner = by_owner.reshape(-1, n)
        splits = RowSplits(send=[num_tokens] * len(sizes), recv=sizes)
        return all_to_all(self.tp_ep_group, by_owner, splits)

    def _max_rows(self) -> int:
        return min(self.topk or self.num_local_experts, self.num_local_experts)


def _run(during: During) -> None:
    """Compute what was to be computed meanwhile; this dispatcher overlaps nothing."""
    if during is not None:
        during.forward()
