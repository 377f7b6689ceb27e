"""The all-to-all in two hops: within the node, then across nodes, each over its own group.

A row goes to the rank of its own node that holds the place of its destination, and from there to
the destination's node: a rank then sends one message to each node instead of one to each rank.
Rows arrive in the order of alltoall.py, so outputs and gradients equal its, bit for bit.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    RowSplits,
    all_gather_rows,
    all_to_all,
    all_to_all_together,
    exchange_counts_in_hops,
    reduce_scatter_rows,
)
from megatron.core.transformer.moe.permutation import (
    IN_TORCH,
    ChunkOrder,
    RowMover,
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
class HierarchicalState:
    """How the rows of one dispatch were reordered and sent; None where they lay right."""

    plan: RowPlan
    """Tokens of this rank -> rows it sent, by node, place in the node, expert."""
    by_place: ChunkOrder | None
    """Rows as planned -> rows by place, node, expert, as the first hop sends them."""
    within: RowSplits
    by_node: ChunkOrder | None
    """Rows after the first hop, by source place and then node -> rows by node."""
    across: RowSplits
    sizes: list[int]
    """Rows that arrived at each rank of ``expt_tp``."""
    by_expert: ChunkOrder | None
    """Rows as they arrived, by source rank -> rows by local expert."""


class MoEHierarchicalTokenDispatcher(MoETokenDispatcher[HierarchicalState]):
    """Permute -> all-to-all over ep_node -> all-to-all over ep_across -> sort by local expert."""

    def __init__(
        self,
        num_experts: int,
        *,
        pg_collection: ProcessGroupCollection,
        topk: int | None = None,
        exact: bool = True,
        mover: RowMover = IN_TORCH,
    ) -> None:
        """See ``MoETokenDispatcher``; rank r of ``ep`` is place r % n of node r // n.

        n is the size of ``ep_node``.
        """
        super().__init__(
            num_experts, pg_collection=pg_collection, topk=topk, exact=exact, mover=mover
        )
        self.node_group = pg_collection.ep_node
        self.across_group = pg_collection.ep_across

    def token_permutation(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        during: During = None,
        rows_per_expert: int | None = None,
    ) -> DispatchedTokens[HierarchicalState]:
        """See ``MoETokenDispatcher.token_permutation``."""
        hops = exchange_counts_in_hops(
            self.node_group,
            self.across_group,
            self.expt_tp_group,
            routing_map.sum(dim=0),
            each=rows_per_expert,
        )
        num_rows = rows_sent(hops.within.send, hidden_states.shape[0], self.topk, exact=self.exact)
        plan = plan_rows(
            routing_map, num_rows=num_rows, max_rows_per_token=self.topk, mover=self.mover
        )
        by_place = rank_major_to_expert_major(hops.sent, sum(hops.within.send))
        by_node = rank_major_to_expert_major(hops.passed, sum(hops.across.send))
        by_expert = rank_major_to_expert_major(hops.received, sum(hops.sizes))

        within, across = self._under(during)
        sent = permute(hidden_states, plan), permute_probs(probs, plan)
        placed = tuple(reorder(x, by_place) for x in sent)
        halfway = all_to_all_together(self.node_group, placed, hops.within, during=within)
        passed = tuple(reorder(x, by_node) for x in halfway)
        arrived = all_to_all_together(self.across_group, passed, hops.across, during=across)
        rows, weights = (
            reorder(all_gather_rows(self.expt_tp_group, x, hops.sizes), by_expert) for x in arrived
        )
        return DispatchedTokens(
            hidden_states=rows,
            probs=weights,
            tokens_per_expert=hops.received.sum(dim=(0, 1)),
            state=HierarchicalState(
                plan=plan,
                by_place=by_place,
                within=hops.within,
                by_node=by_node,
                across=hops.across,
                sizes=hops.sizes,
                by_expert=by_expert,
            ),
        )

    def token_unpermutation(
        self,
        expert_output: Tensor,
        dispatched: DispatchedTokens[HierarchicalState],
        *,
        during: During = None,
    ) -> Tensor:
        """See ``MoETokenDispatcher.token_unpermutation``."""
        state = dispatched.state
        within, across = self._under(during)
        parts = reorder(expert_output, state.by_expert, back=True)
        arrived = reduce_scatter_rows(self.expt_tp_group, parts, state.sizes)
        halfway = all_to_all(self.across_group, arrived, state.across.reversed(), during=across)
        passed = reorder(halfway, state.by_node, back=True)
        rows = all_to_all(self.node_group, passed, state.within.reversed(), during=within)
        return unpermute(reorder(rows, state.by_place, back=True), state.plan)

    def _under(self, during: During) -> tuple[During, During]:
        """Return what is done under the hop within the node, and under the slow one across.

        In a single node nothing crosses.
        """
        return (None, during) if self.across_group.size() > 1 else (during, None)
