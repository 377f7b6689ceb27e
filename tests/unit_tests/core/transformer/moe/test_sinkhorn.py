"""Sinkhorn: the prices are those of plain alternate scaling, and numbers for any logits."""

import math

import pytest
import torch

from megatron.core.transformer.moe.routing import map_of_largest
from megatron.core.transformer.moe.sinkhorn import (
    ROUNDS,
    expert_prices,
    sinkhorn_ranking,
)
from tests.reference.balanced_choice import sinkhorn_chosen, sinkhorn_prices


def _logits(num_tokens: int, num_experts: int, scale: float = 1.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts, generator=rng, dtype=torch.float64)
    logits[:, 0] += 2.0  # a crowded expert
    return (logits * scale).to(dtype)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(40, 8), (7, 12), (1, 4), (200, 3)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("rounds", [1, 3, ROUNDS])
def test_prices_are_those_of_plain_scaling(num_tokens, num_experts, scale, rounds):
    logits = _logits(num_tokens, num_experts, scale)
    want = torch.tensor(sinkhorn_prices(logits, 1e-4, rounds), dtype=torch.float64).log()
    got = expert_prices(logits, rounds=rounds)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    if rounds == ROUNDS and num_tokens > 1:
        chosen = map_of_largest(sinkhorn_ranking(logits), 2)
        for row, experts in zip(chosen, sinkhorn_chosen(logits, 2), strict=True):
            assert row.nonzero().flatten().tolist() == sorted(experts)


def test_columns_of_the_matrix_sum_alike():
    plan = sinkhorn_ranking(_logits(60, 6), tol=1e-10).softmax(dim=1) / 60
    torch.testing.assert_close(plan.sum(dim=0), torch.full((6,), 1 / 6).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [100.0, 1000.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size_give_numbers_and_topk_experts(scale, dtype):
    logits = _logits(50, 8, scale, dtype)
    assert expert_prices(logits).isfinite().all()
    assert sinkhorn_ranking(logits).isfinite().all()
    assert (map_of_largest(sinkhorn_ranking(logits), 2).sum(dim=1) == 2).all()


def test_rounds_after_the_last_needed_one_change_nothing_and_are_bounded():
    for scale in (0.5, 3.0, 1000.0):
        logits = _logits(50, 8, scale)
        assert torch.equal(
            expert_prices(logits, early_exit=True), expert_prices(logits, early_exit=False)
        )
    few, many = (expert_prices(_logits(50, 8), rounds=rounds) for rounds in (ROUNDS, 10 * ROUNDS))
    assert torch.equal(few, many), "settled before the bound"


def test_nothing_waits_for_the_device():
    """A meta tensor has no values: whoever looks at one raises."""
    logits = torch.empty(6, 4, device="meta")
    assert sinkhorn_ranking(logits).shape == (6, 4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        expert_prices(logits, early_exit=True)


@pytest.mark.parametrize("topk", [1, 2])
def test_a_crowded_expert_is_relieved(topk):
    logits = _logits(4000, 8)
    even = 4000 * topk / 8
    plain = map_of_largest(logits, topk).sum(dim=0)
    balanced = map_of_largest(sinkhorn_ranking(logits), topk).sum(dim=0)
    assert plain.max() > 1.8 * even
    assert balanced.max() < 1.15 * even


def test_a_token_alone_goes_to_its_best_experts():
    logits = _logits(1, 8)
    chosen = map_of_largest(sinkhorn_ranking(logits), 2)
    assert torch.equal(chosen, map_of_largest(logits, 2))


def test_no_tokens_are_no_problem():
    logits = torch.zeros(0, 4)
    assert sinkhorn_ranking(logits).shape == (0, 4)
    assert math.isfinite(expert_prices(logits).sum())
