"""Each token is sent straight to the ranks of its experts: cost grows with topk, not with ep.

Collectives of one layer: one exchange of counts, then in each direction one all-to-all of rows
out and one back. Probs travel beside the rows in a small all-to-all of their own. With expert
tensor parallelism what arrived is gathered, and summed and scattered on the way back.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron.core.tensor_parallel.mappings import (
    RowSplits,
    all_gather_rows,
    all_to_all,
    all_to_all_together,
    exchange_counts,
    reduce_scatter_rows,
)
from megatron.core.transformer.moe.permutation import (
    ChunkOrder,
    RowPlan,
    permute,
    permute_probs,
    plan_rows,
    rank_major_to_expert_major,
    reorder,
    unpermute,
)
from megatron.core.transformer.moe.token_dispatcher.base import (
    DispatchedTokens,
    During,
    MoETokenDispatcher,
    rows_sent,
)


@dataclass(frozen=True, kw_only=True)
class AllToAllState:
    """How the rows of one dispatch were reordered and sent."""

    plan: RowPlan
    """Tokens of this rank -> rows it sent."""
    splits: RowSplits
    sizes: list[int]
    """Rows that arrived at each rank of ``expt_tp``."""
    order: ChunkOrder | None
    """Rows as they arrived -> rows by local expert."""


class MoEAlltoAllTokenDispatcher(MoETokenDispatcher[AllToAllState]):
    """Permute by expert -> all-to-all over ep -> sort by local expert, and the same backwards."""

    def token_permutation(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        during: During = None,
        rows_per_expert: int | None = None,
    ) -> DispatchedTokens[AllToAllState]:
        """See ``MoETokenDispatcher.token_permutation``."""
        received, splits, sizes = exchange_counts(
            self.ep_group, self.expt_tp_group, routing_map.sum(dim=0), each=rows_per_expert
        )
        plan = plan_rows(
            routing_map,
            num_rows=rows_sent(splits.send, hidden_states.shape[0], self.topk, exact=self.exact),
            max_rows_per_token=self.topk,
            mover=self.mover,
        )
        sent = permute(hidden_states, plan), permute_probs(probs, plan)
        rows, weights = all_to_all_together(self.ep_group, sent, splits, during=during)
        rows = all_gather_rows(self.expt_tp_group, rows, sizes)
        weights = all_gather_rows(self.expt_tp_group, weights, sizes)
        # Rows arrive rank-major, the block of each rank expert-major; experts need expert-major.
        order = rank_major_to_expert_major(received, rows.shape[0])
        return DispatchedTokens(
            hidden_states=reorder(rows, order),
            probs=reorder(weights, order),
            tokens_per_expert=received.sum(dim=(0, 1)),
            state=AllToAllState(plan=plan, splits=splits, sizes=sizes, order=order),
        )

    def token_unpermutation(
        self,
        expert_output: Tensor,
        dispatched: DispatchedTokens[AllToAllState],
        *,
        during: During = None,
    ) -> Tensor:
        """See ``MoETokenDispatcher.token_unpermutation``."""
        state = dispatched.state
        parts = reorder(expert_output, state.order, back=True)
        arrived = reduce_scatter_rows(self.expt_tp_group, parts, state.sizes)
        rows = all_to_all(self.ep_group, arrived, state.splits.reversed(), during=during)
        return unpermute(rows, state.plan)
