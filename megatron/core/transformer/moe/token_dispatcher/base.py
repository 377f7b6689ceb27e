"""What a token dispatcher promises; its neighbours keep the promise.

Shapes: h hidden size, num_tokens tokens of this rank, num_recv rows that this rank's experts
receive, num_local_experts = num_experts / ep.

With expert tensor parallelism the ranks of ``expt_tp`` hold slices of the same experts but
different tokens. Each of them gets the rows of all, in one order, and gives its part of every
output back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.flight import Meanwhile
from megatron.core.transformer.moe.permutation import IN_TORCH, RowMover

StateT = TypeVar("StateT")

During = Meanwhile | None
"""What is to be done while rows travel; None for nothing."""


@dataclass(frozen=True, kw_only=True)
class DispatchedTokens(Generic[StateT]):
    """Tokens at the experts, and what ``token_unpermutation`` needs to bring them home."""

    hidden_states: Tensor
    """[num_recv, h], by local expert; within an expert by source rank, then by token. The same
    on all ranks of ``expt_tp``."""
    probs: Tensor
    """[num_recv], the weight of each row's expert for its token."""
    tokens_per_expert: Tensor
    """[num_local_experts], int64; sums to num_recv."""
    state: StateT
    """Private to the dispatcher; lives as long as one forward, never on ``self``."""


class MoETokenDispatcher(ABC, Generic[StateT]):
    """Moves tokens to their experts and back.

    Holds process groups and sizes only. Two microbatches may be in flight at once, and an
    activation-checkpointed layer may dispatch twice, so nothing of a forward is kept here.

    Law, for every subclass (test_dispatcher_laws.py): with experts that do nothing but weight
    their rows by ``probs``, unpermuting what was permuted gives ``x * probs.sum(-1)``. The ranks of
    ``expt_tp`` each give a part of the rows, and the parts are summed.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        pg_collection: ProcessGroupCollection,
        topk: int | None = None,
        exact: bool = True,
        mover: RowMover = IN_TORCH,
    ) -> None:
        """Remember group and sizes.

        Args:
            num_experts: Of the layer, over all ranks.
            pg_collection: Rank r of its ``ep`` holds the r-th of equal blocks of experts, together
                with the other ranks of its ``expt_tp``.
            topk: Experts of every token. Unknown when None: in a group of one a CUDA device is
                then waited for in each forward.
            exact: False when a token may have fewer than ``topk`` experts.
            mover: What copies and sums rows.
        """
        self.num_experts = num_experts
        self.num_local_experts = local_expert_count(num_experts, pg_collection.ep.size())
        self.ep_group = pg_collection.ep
        self.expt_tp_group = pg_collection.expt_tp
        self.tp_ep_group = pg_collection.tp_ep
        self.topk = topk
        self.exact = exact
        self.mover = mover

    @abstractmethod
    def token_permutation(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        during: During = None,
        rows_per_expert: int | None = None,
    ) -> DispatchedTokens[StateT]:
        """Send tokens to the ranks of their experts.

        Args:
            hidden_states: [num_tokens, h]; any number of tokens, 0 included.
            probs: [num_tokens, num_experts], at least 0; differentiable.
            routing_map: [num_tokens, num_experts], bool.
            during: Done once, while rows are under way where rows are sent at all.
            rows_per_expert: True entries of every column of the routing map on every rank of
                ``ep``, where all of them know it and have the same number of tokens: then no
                counts need be exchanged.
        """

    @abstractmethod
    def token_unpermutation(
        self,
        expert_output: Tensor,
        dispatched: DispatchedTokens[StateT],
        *,
        during: During = None,
    ) -> Tensor:
        """Bring ``expert_output`` [num_recv, h] back to its tokens and sum: [num_tokens, h].

        ``during`` is as in ``token_permutation``.
        """


def local_expert_count(num_experts: int, ranks: int) -> int:
    """Return the experts of each of ``ranks`` ranks, which must divide ``num_experts``."""
    assert num_experts % ranks == 0, f"{num_experts=} do not spread evenly over {ranks=}"
    return num_experts // ranks


def rows_sent(send: Sequence[int], num_tokens: int, topk: int | None, *, exact: bool) -> int | None:
    """Return the (token, expert) pairs of this rank if the host knows them, else None.

    Args:
        send: Rows for each rank; empty when nobody was asked.
        num_tokens: Tokens of this rank.
        topk: Experts of a token, None when unknown.
        exact: Whether every token has ``topk`` of them.
    """
    if send:
        return sum(send)
    return num_tokens * topk if exact and topk is not None else None
