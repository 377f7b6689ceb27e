"""Each token travels once to a rank, however many of its experts live there; sums come back.

Collectives are those of alltoall.py. Beside a token travels a row of probs over the experts of its
destination, -1 where it is not routed. Bytes are saved when topk is large against ep.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron.core.tensor_parallel.mappings import (
    RowSplits,
    all_gather_rows,
    all_to_all,
    all_to_all_together,
    exchange_rows_and_pairs,
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
class AllToAllDedupState:
    """How tokens were sent, and copied on arrival."""

    sent: RowPlan
    """Tokens of this rank -> rows by destination rank, one each."""
    order: ChunkOrder | None
    """Tokens as they were gathered over ``expt_tp`` -> tokens by source rank."""
    copies: RowPlan
    """Tokens that arrived -> rows by local expert."""
    splits: RowSplits
    sizes: list[int]
    """Tokens that arrived at each rank of ``expt_tp``."""


class MoEAlltoAllDedupTokenDispatcher(MoETokenDispatcher[AllToAllDedupState]):
    """Pick by rank -> all-to-all over ep -> copy by local expert; sum there, and sum here."""

    def token_permutation(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        during: During = None,
        rows_per_expert: int | None = None,
    ) -> DispatchedTokens[AllToAllDedupState]:
        """See ``MoETokenDispatcher.token_permutation``.

        How many rows a rank gets depends on which experts a token has in common with it, so
        counts are exchanged whatever ``rows_per_expert`` says.
        """
        del rows_per_expert
        num_tokens = hidden_states.shape[0]
        blocks = self.num_experts // self.num_local_experts
        by_rank = routing_map.view(num_tokens, blocks, self.num_local_experts)
        wanted = by_rank.any(dim=2)  # [num_tokens, ranks]
        received, splits, sizes, pairs = exchange_rows_and_pairs(
            self.ep_group, self.expt_tp_group, wanted.sum(dim=0), by_rank.sum(dim=(0, 2))
        )
        order = rank_major_to_expert_major(received, sum(sizes))
        if pairs is None:  # no other rank: every pair is ours
            pairs = rows_sent([], num_tokens, self.topk, exact=self.exact)
        most = self.topk or self.num_experts
        alone = self.topk and 1  # rows of each token in a group of one
        sent = plan_rows(
            wanted,
            num_rows=rows_sent(splits.send, num_tokens, alone, exact=self.exact),
            max_rows_per_token=min(most, blocks),
            mover=self.mover,
        )
        marked = probs.masked_fill(~routing_map, -1.0).view(-1, self.num_local_experts)
        columns = marked.index_select(0, sent.pair_of_row)  # [rows sent, num_local_experts]
        tokens, columns = all_to_all_together(
            self.ep_group, (permute(hidden_states, sent), columns), splits, during=during
        )
        tokens = reorder(all_gather_rows(self.expt_tp_group, tokens, sizes), order)
        columns = reorder(all_gather_rows(self.expt_tp_group, columns, sizes), order)
        routed = ~(columns.detach() < 0.0)  # so written, a NaN stays routed
        copies = plan_rows(
            routed,
            num_rows=pairs,
            max_rows_per_token=min(most, self.num_local_experts),
            mover=self.mover,
        )
        return DispatchedTokens(
            hidden_states=permute(tokens, copies),
            probs=permute_probs(columns, copies),
            tokens_per_expert=routed.sum(dim=0),
            state=AllToAllDedupState(
                sent=sent, order=order, copies=copies, splits=splits, sizes=sizes
            ),
        )

    def token_unpermutation(
        self,
        expert_output: Tensor,
        dispatched: DispatchedTokens[AllToAllDedupState],
        *,
        during: During = None,
    ) -> Tensor:
        """See ``MoETokenDispatcher.token_unpermutation``."""
        state = dispatched.state
        parts = unpermute(expert_output, state.copies)  # of each token that arrived, summed here
        parts = reorder(parts, state.order, back=True)
        arrived = reduce_scatter_rows(self.expt_tp_group, parts, state.sizes)
        rows = all_to_all(self.ep_group, arrived, state.splits.reversed(), during=during)
        return unpermute(rows, state.sent)
