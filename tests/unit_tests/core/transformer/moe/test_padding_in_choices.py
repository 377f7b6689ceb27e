"""Padding crowds no expert, whichever rule balances the choice: the others choose as if alone."""

import pytest
import torch

from megatron.core.transformer.moe.expert_choice import expert_choice_routing
from megatron.core.transformer.moe.quantile_balancing import expert_quantiles
from megatron.core.transformer.moe.sinkhorn import expert_prices, sinkhorn_ranking

E, K = 6, 2


def _logits(num_tokens: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, E, generator=rng, dtype=torch.float64) * 2


def _padding(num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens) % 3 == 1


@pytest.mark.parametrize("num_tokens", [4, 12, 13, 31])
def test_quantiles_are_those_of_the_tokens_that_are_no_padding(num_tokens):
    logits, padding = _logits(num_tokens), _padding(num_tokens)
    beta = torch.linspace(-1, 1, E, dtype=torch.float64)
    got = expert_quantiles(logits, K, beta, padding)
    torch.testing.assert_close(got, expert_quantiles(logits[~padding], K, beta), rtol=0, atol=1e-12)
    assert not torch.equal(got, expert_quantiles(logits, K, beta))
    nothing = torch.zeros_like(padding)
    same = expert_quantiles(logits, K, beta, nothing)
    torch.testing.assert_close(same, expert_quantiles(logits, K, beta), rtol=0, atol=1e-12)
    assert expert_quantiles(logits, K, beta, ~nothing).tolist() == [0.0] * E


@pytest.mark.parametrize("num_tokens", [4, 13, 31])
def test_sinkhorn_prices_are_those_of_the_tokens_that_are_no_padding(num_tokens):
    logits, padding = _logits(num_tokens), _padding(num_tokens)
    alone = expert_prices(logits[~padding], tol=0.0)
    got = expert_prices(logits, padding, tol=0.0)
    # the logarithm of their number is common to all prices and decides nothing
    torch.testing.assert_close(got - got.mean(), alone - alone.mean(), rtol=0, atol=1e-9)
    ranking = sinkhorn_ranking(logits, padding)[~padding]
    assert torch.equal(ranking.argsort(dim=1), sinkhorn_ranking(logits[~padding]).argsort(dim=1))
    assert not torch.equal(
        sinkhorn_ranking(logits, padding), sinkhorn_ranking(logits, torch.zeros_like(padding))
    )
    assert sinkhorn_ranking(logits, torch.ones_like(padding)).isfinite().all()


def test_a_token_alone_among_padding_goes_to_its_best_experts():
    logits = _logits(4)
    for token in range(4):
        ranking = sinkhorn_ranking(logits, torch.arange(4) != token)
        assert torch.equal(ranking[token], logits[token])


def test_experts_take_padding_last():
    logits, padding = _logits(12), _padding(12)
    routing = expert_choice_routing(logits, K, padding=padding)
    assert routing.routing_map.sum(dim=0).tolist() == [4] * E
    assert not routing.routing_map[padding].any()
    assert expert_choice_routing(logits, K).routing_map[padding].any()
    crowded = expert_choice_routing(logits, K, padding=torch.arange(12) > 1)
    assert crowded.routing_map[:2].all()
    assert crowded.routing_map.sum(dim=0).tolist() == [4] * E
