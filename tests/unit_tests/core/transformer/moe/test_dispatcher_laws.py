"""Every dispatcher obeys the law in token_dispatcher/base.py, and one that does not is seen."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.transformer.moe.permutation import reorder
from megatron.core.transformer.moe.routing import Routing, topk_routing
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    count_collectives,
    make_groups,
    make_tokens,
)

TOPK = 3
SIZES = [(7, 12, 5, 9), (0, 6, 0, 3), (0, 0, 0, 0)]
LAYOUTS = [(1, 1, 1), (2, 2, 1), (4, 2, 1), (4, 4, 1)]  # (ranks, ep, etp)
SHARED = [(2, 1, 2), (4, 2, 2), (4, 1, 4), (4, 1, 2)]


def _route(tokens: Tensor) -> Routing:
    """Route by the token itself; expert 0 gets nothing, and rank 0 sends more than it gets."""
    logits = tokens.detach()[:, :NUM_EXPERTS] * 2.0
    logits[:, 0] = -50.0
    logits[:, -1] += 1.0
    probs, routing_map = topk_routing(logits, TOPK)
    return Routing(probs.requires_grad_(), routing_map)


def _check(dispatcher, groups, sizes: tuple[int, ...]) -> None:
    """Check law, outputs and all gradients with experts that scale each feature.

    The ranks that share an expert give unequal parts of its output.
    """
    rank, n, sharers = dist.get_rank(), NUM_EXPERTS // groups.ep.size(), groups.expt_tp.size()
    part = torch.arange(1.0, sharers + 1).double()
    part = (part / part.sum())[groups.expt_tp.rank()]
    scales = torch.linspace(0.5, 3.0, NUM_EXPERTS * H, dtype=torch.float64).view(-1, H)
    first = groups.ep.rank() * n
    own_scales = scales[first : first + n].clone().requires_grad_()

    tokens = make_tokens(sizes[rank], torch.float64, rank)
    probs, routing_map = _route(tokens)
    sent = dispatcher.token_permutation(tokens, probs, routing_map)
    num_recv = sent.hidden_states.shape[0]
    assert sent.tokens_per_expert.shape == (n,)
    assert int(sent.tokens_per_expert.sum()) == num_recv == sent.probs.shape[0]
    law = dispatcher.token_unpermutation(part * sent.hidden_states * sent.probs[:, None], sent)
    torch.testing.assert_close(law, tokens * probs.sum(dim=1, keepdim=True))

    scale_of_row = own_scales.repeat_interleave(sent.tokens_per_expert, dim=0)
    rows = part * sent.hidden_states * scale_of_row * sent.probs[:, None]
    output = dispatcher.token_unpermutation(rows, sent)
    output.square().sum().backward()
    assert own_scales.grad is not None
    dist.all_reduce(own_scales.grad, group=groups.expt_dp)
    dist.all_reduce(own_scales.grad, group=groups.expt_tp)

    size = groups.tp_ep.size()
    mates = range(rank // size * size, rank // size * size + size)
    counts = sum(_route(make_tokens(sizes[i], torch.float64, i)).routing_map.sum(0) for i in mates)
    assert torch.equal(sent.tokens_per_expert, counts[first : first + n])

    all_scales = scales.clone().requires_grad_()
    for other, size in enumerate(sizes):
        inputs = make_tokens(size, torch.float64, other)
        weights = _route(inputs).probs
        want = (weights @ all_scales) * inputs
        want.square().sum().backward()
        if other == rank:
            torch.testing.assert_close(output, want)
            torch.testing.assert_close(tokens.grad, inputs.grad)
            got, expected = probs.grad * routing_map, weights.grad * routing_map
            torch.testing.assert_close(got, expected)
    torch.testing.assert_close(own_scales.grad, all_scales.grad[first : first + n])


def _laws(name: str, ep: int, etp: int = 1, node_size: int | None = None) -> None:
    groups = make_groups(ep, node_size, etp=etp)
    for sizes, topk in product(SIZES, (TOPK, None)):
        dispatcher = TOKEN_DISPATCHERS[name](NUM_EXPERTS, pg_collection=groups, topk=topk)
        _check(dispatcher, groups, sizes[: dist.get_world_size()])


@pytest.mark.parametrize(("world_size", "ep", "etp"), LAYOUTS + SHARED)
@pytest.mark.parametrize("name", TOKEN_DISPATCHERS)
def test_dispatcher_obeys_the_law_and_agrees_with_one_rank(name, world_size, ep, etp):
    run_ranks(_laws, world_size, name, ep, etp)


NODES = [(2, 2, 1, 1), (4, 4, 1, 2), (4, 4, 1, 1), (4, 2, 1, 4), (4, 2, 1, 1), (4, 2, 2, 2)]


@pytest.mark.parametrize(("world_size", "ep", "etp", "node_size"), NODES)
def test_two_hops_obey_the_law_with_nodes_of_any_size(world_size, ep, etp, node_size):
    run_ranks(_laws, world_size, "alltoall_hierarchical", ep, etp, node_size)


def _hops(node_size: int, hops: int) -> None:
    groups = make_groups(4, node_size)
    size = (7, 0, 5, 9)[dist.get_rank()]
    results = []
    for name in ("alltoall", "alltoall_hierarchical"):
        tokens = make_tokens(size, torch.float32, dist.get_rank())
        probs, routing_map = _route(tokens)
        dispatcher = TOKEN_DISPATCHERS[name](NUM_EXPERTS, pg_collection=groups, topk=TOPK)
        with count_collectives() as forward:
            sent = dispatcher.token_permutation(tokens, probs, routing_map)
            scale = torch.arange(2).add(0.3).repeat_interleave(sent.tokens_per_expert)
            rows = sent.hidden_states * (sent.probs * scale)[:, None]
            output = dispatcher.token_unpermutation(rows, sent)
        with count_collectives() as backward:
            output.square().sum().backward()
        assert tokens.grad is not None
        results.append([sent.hidden_states, sent.probs, output, tokens.grad, probs.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    kinds = sorted(dim for _, dim in forward)
    assert kinds == [1] * 2 * hops + [2] * 2 * hops  # counts and probs; rows out and back
    assert sorted(dim for _, dim in backward) == [1] * hops + [2] * 2 * hops


@pytest.mark.parametrize(("node_size", "hops"), [(2, 2), (1, 1), (4, 1)])
def test_two_hops_give_the_bits_of_one_with_the_same_collectives_in_each(node_size, hops):
    run_ranks(_hops, 4, node_size, hops)


def _order(name: str, ep: int, etp: int) -> None:
    groups = make_groups(ep, etp=etp)
    rank = dist.get_rank()
    numbers = torch.arange(6).double() + 100 * rank  # in the global token order
    logits = torch.randn(6, NUM_EXPERTS, generator=torch.Generator().manual_seed(rank)).double()
    dispatcher = TOKEN_DISPATCHERS[name](NUM_EXPERTS, pg_collection=groups, topk=TOPK)
    sent = dispatcher.token_permutation(numbers.unsqueeze(1), *topk_routing(logits, TOPK))
    groups_of_rows = sent.hidden_states.flatten().split(sent.tokens_per_expert.tolist())
    assert sum(len(rows) > 1 for rows in groups_of_rows) > 2
    assert all(torch.equal(rows, rows.sort().values) for rows in groups_of_rows)


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", TOKEN_DISPATCHERS)
def test_rows_of_an_expert_are_in_global_token_order(name, ep, etp):
    run_ranks(_order, ep * etp, name, ep, etp)


class EachRankItsOwn(MoEAlltoAllTokenDispatcher):
    """Forgets that other ranks hold slices of its experts."""

    def __init__(self, num_experts, *, pg_collection, **options):
        alone = make_groups(pg_collection.ep.size()).expt_tp
        super().__init__(num_experts, pg_collection=pg_collection, **options)
        self.expt_tp_group = alone


class UnsortedRows(MoEAlltoAllTokenDispatcher):
    """Hands the rows to the experts as they arrived."""

    def token_permutation(self, hidden_states, probs, routing_map):
        sent = super().token_permutation(hidden_states, probs, routing_map)
        return replace(
            sent,
            hidden_states=reorder(sent.hidden_states, sent.state.order, back=True),
            probs=reorder(sent.probs, sent.state.order, back=True),
            state=replace(sent.state, order=None),
        )


class SwappedSplits(MoEAlltoAllTokenDispatcher):
    """Sends back by the splits of the way out."""

    def token_permutation(self, hidden_states, probs, routing_map):
        sent = super().token_permutation(hidden_states, probs, routing_map)
        return replace(sent, state=replace(sent.state, splits=sent.state.splits.reversed()))


class WrongProbs(MoEAllGatherTokenDispatcher):
    """Gives each row the weight of its neighbour."""

    def token_permutation(self, hidden_states, probs, routing_map):
        sent = super().token_permutation(hidden_states, probs, routing_map)
        return replace(sent, probs=sent.probs.roll(1))


class ReversedCounts(MoEAlltoAllTokenDispatcher):
    """Counts the experts from the other end."""

    def token_permutation(self, hidden_states, probs, routing_map):
        sent = super().token_permutation(hidden_states, probs, routing_map)
        return replace(sent, tokens_per_expert=sent.tokens_per_expert.flip(0))


class HalfGradient(MoEAlltoAllTokenDispatcher):
    """Right forward, half the gradient: a missing sum over ranks looks like this."""

    def token_permutation(self, hidden_states, probs, routing_map):
        sent = super().token_permutation(hidden_states, probs, routing_map)
        half = (sent.hidden_states + sent.hidden_states.detach()) / 2
        return replace(sent, hidden_states=half)


BROKEN = [
    (UnsortedRows, 2, 1),
    (SwappedSplits, 2, 1),
    (WrongProbs, 2, 1),
    (WrongProbs, 1, 2),
    (ReversedCounts, 2, 1),
    (ReversedCounts, 1, 2),
    (HalfGradient, 2, 1),
    (HalfGradient, 1, 2),
    (EachRankItsOwn, 1, 2),
]


def _is_caught(broken: Callable, ep: int, etp: int) -> None:
    groups = make_groups(ep, etp=etp)
    # every bug is seen on every rank before its next collective, so none waits for another
    with pytest.raises((AssertionError, RuntimeError)):
        _check(broken(NUM_EXPERTS, pg_collection=groups, topk=TOPK), groups, SIZES[0])
    dist.barrier()


@pytest.mark.parametrize(("broken", "ep", "etp"), BROKEN)
def test_a_planted_bug_is_caught(broken, ep, etp):
    run_ranks(_is_caught, 2, broken, ep, etp)


def _state() -> None:
    for make in TOKEN_DISPATCHERS.values():
        dispatcher = make(NUM_EXPERTS, pg_collection=make_groups(1), topk=TOPK)
        before = dict(vars(dispatcher))
        tokens = make_tokens(4, torch.float64)
        sent = dispatcher.token_permutation(tokens, *_route(tokens))
        dispatcher.token_unpermutation(sent.hidden_states, sent)
        assert vars(dispatcher) == before
        with pytest.raises(FrozenInstanceError):
            sent.probs = sent.probs  # type: ignore[misc]
        nan = torch.full_like(sent.probs.new_zeros(4, NUM_EXPERTS), float("nan"))
        got = dispatcher.token_permutation(tokens, nan, _route(tokens).routing_map)
        assert got.hidden_states.shape[0] == 4 * TOPK  # a diverged step must not crash here


def test_dispatchers_keep_nothing_and_survive_nan():
    run_ranks(_state, 1)


def _identity() -> None:
    groups = make_groups(1)
    dispatcher = MoEAlltoAllTokenDispatcher(NUM_EXPERTS, pg_collection=groups, topk=1)
    tokens = make_tokens(4, torch.float32)
    sent = dispatcher.token_permutation(tokens, *topk_routing(torch.eye(4, NUM_EXPERTS), 1))
    assert sent.state.order is None
    assert sent.hidden_states.grad_fn is not None
    assert "Permute" in sent.hidden_states.grad_fn.name()  # the gather, and nothing after it


def test_alltoall_in_a_group_of_one_only_permutes():
    run_ranks(_identity, 1)
