"""Rows by expert and back: order, sums and gradients."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.core.transformer.moe import permutation
from megatron.core.transformer.moe.permutation import (
    permute,
    permute_probs,
    plan_rows,
    rank_major_to_expert_major,
    reorder,
    unpermute,
)

maps = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=7).map(
    lambda rows: torch.tensor(rows, dtype=torch.bool).view(-1, 4)
)
PROPERTY = settings(max_examples=40, deadline=None)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


@given(maps)
@PROPERTY
def test_rows_are_expert_major_and_in_token_order_within_an_expert(routing_map):
    tokens = torch.arange(len(routing_map)).double().unsqueeze(1)
    probs = _random(*routing_map.shape)
    plan = plan_rows(routing_map)
    want = [
        (t, probs[t, e].item()) for e in range(4) for t in range(len(tokens)) if routing_map[t, e]
    ]
    rows = permute(tokens, plan).flatten().tolist()
    assert list(zip(rows, permute_probs(probs, plan).tolist(), strict=True)) == want


@given(maps)
@PROPERTY
def test_unpermuting_what_was_permuted_counts_the_experts_of_each_token(routing_map):
    tokens = _random(len(routing_map), 3).requires_grad_()
    plan = plan_rows(routing_map)
    out = unpermute(permute(tokens, plan), plan)
    times = routing_map.sum(dim=1, keepdim=True)
    torch.testing.assert_close(out, tokens * times)
    (gradient,) = torch.autograd.grad(out.sum(), tokens)
    torch.testing.assert_close(gradient, times.expand_as(tokens).double())


@given(maps)
@PROPERTY
def test_the_sum_by_slots_equals_the_sum_by_index_add(routing_map):
    rows = _random(int(routing_map.sum()), 3).float()
    plan = plan_rows(routing_map, num_rows=len(rows))
    want = unpermute(rows, plan)
    with patch.object(torch.Tensor, "index_add_", side_effect=AssertionError("not meant")):
        got = unpermute(rows, plan, dtype=torch.float64)  # another dtype goes by slots
    torch.testing.assert_close(got.float(), want)


def test_a_narrow_sum_is_rounded_once():
    rows = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().unsqueeze(1)  # 256 + 1 rounds to 256
    plan = plan_rows(torch.ones(1, 4, dtype=torch.bool), max_rows_per_token=4)
    assert unpermute(rows, plan).item() == torch.tensor(259.0).bfloat16().item()


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
@PROPERTY
def test_reordering_groups_chunks_by_expert_keeping_source_order(sizes):
    counts = torch.tensor(sizes).view(3, 2)  # [sources, experts]
    arrived = [(e, s, i) for s in range(3) for e in range(2) for i in range(int(counts[s, e]))]
    rows = torch.arange(len(arrived)).double().requires_grad_()
    order = rank_major_to_expert_major(counts, len(arrived))
    moved = reorder(rows, order)
    assert [arrived[int(i)] for i in moved] == sorted(arrived)
    assert torch.equal(reorder(moved, order, back=True), rows)
    (gradient,) = torch.autograd.grad((moved * rows.detach()).sum(), rows)
    assert torch.equal(gradient[moved.long()], rows.detach())


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_rows_of_one_source_or_one_expert_lie_right_already(shape):
    rows = _random(10, 2)
    assert reorder(rows, rank_major_to_expert_major(torch.full(shape, 2), 10)) is rows


def test_gradients_are_right_by_finite_differences():
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    plan = plan_rows(routing_map)
    tokens, rows = _random(3, 2).requires_grad_(), _random(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), tokens)
    assert torch.autograd.gradcheck(lambda x: unpermute(x, plan), rows)


def test_plans_know_no_process_group():
    assert not hasattr(permutation, "dist")
