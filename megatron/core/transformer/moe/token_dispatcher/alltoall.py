"""Each token is sent straight to the ranks of its experts: cost grows with topk, not with ep.

Collectives of one layer: one exchange of counts, then in each direction one all-to-all of rows
out and one back. Probs travel beside the rows in a small all-to-all of their own.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import RowSplits, all_to_all, exchange_counts
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
    MoETokenDispatcher,
    local_expert_count,
    rows_sent,
)


@dataclass(frozen=True, kw_only=True)
class AllToAllState:
    """How the rows of one dispatch were reordered and sent."""

    plan: RowPlan
    """Tokens of this rank -> rows it sent."""
    splits: RowSplits
    order: ChunkOrder | None
    """Rows as they arrived -> rows by local expert."""


class MoEAlltoAllTokenDispatcher(MoETokenDispatcher[AllToAllState]):
    """Permute by expert -> all-to-all over ep -> sort by local expert, and the same backwards."""

    def __init__(
        self,
        num_experts: int,
        *,
        pg_collection: ProcessGroupCollection,
        topk: int | None = None,
        exact: bool = True,
    ) -> None:
        """Remember group and sizes.

        Args:
            num_experts: Of the layer, over all ranks.
            pg_collection: Rank r of its ``ep`` holds the r-th of equal blocks of experts.
            topk: Experts of every token. Unknown when None: in a group of one a CUDA device is
                then waited for in each forward.
            exact: False when a token may have fewer than ``topk`` experts.
        """
        local_expert_count(num_experts, pg_collection.ep.size())
        self.ep_group = pg_collection.ep
        self.topk = topk
        self.exact = exact

    def token_permutation(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> DispatchedTokens[AllToAllState]:
        """See ``MoETokenDispatcher.token_permutation``."""
        received, splits = exchange_counts(self.ep_group, routing_map.sum(dim=0))
        plan = plan_rows(
            routing_map,
            num_rows=rows_sent(splits.send, hidden_states.shape[0], self.topk, exact=self.exact),
            max_rows_per_token=self.topk,
        )
        rows = all_to_all(self.ep_group, permute(hidden_states, plan), splits)
        weights = all_to_all(self.ep_group, permute_probs(probs, plan), splits)
        # Rows arrive rank-major, the block of each rank expert-major; experts need expert-major.
        order = rank_major_to_expert_major(received, rows.shape[0])
        return DispatchedTokens(
            hidden_states=reorder(rows, order),
            probs=reorder(weights, order),
            tokens_per_expert=received.sum(dim=0),
            state=AllToAllState(plan=plan, splits=splits, order=order),
        )

    def token_unpermutation(
        self, expert_output: Tensor, dispatched: DispatchedTokens[AllToAllState]
    ) -> Tensor:
        """See ``MoETokenDispatcher.token_unpermutation``."""
        state = dispatched.state
        arrived = reorder(expert_output, state.order, back=True)
        rows = all_to_all(self.ep_group, arrived, state.splits.reversed())
        return unpermute(rows, state.plan)
