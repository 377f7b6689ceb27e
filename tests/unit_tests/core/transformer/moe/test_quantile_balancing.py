"""Quantile balancing: prices are the plain quantiles, and even the load of a skewed router."""

import pytest
import torch

from megatron.core.transformer.moe.quantile_balancing import (
    expert_quantiles,
    quantile_choice,
    updated_beta,
)
from megatron.core.transformer.moe.slot_means import SlotMeans
from tests.helpers.models import world_of_one
from tests.reference.balanced_choice import quantile_chosen, quantiles


def _logits(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(100 * num_tokens + seed)
    logits = torch.randn(num_tokens, num_experts, generator=rng, dtype=torch.float64)
    return logits + torch.linspace(0.0, 2.0, num_experts)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "topk"),
    [(16, 8, 2), (17, 8, 2), (1, 8, 2), (3, 8, 1), (40, 5, 4), (41, 5, 3), (2, 5, 4)],
)
def test_choice_and_quantiles_are_those_of_the_plain_loop(num_tokens, num_experts, topk):
    logits = _logits(num_tokens, num_experts)
    beta = torch.linspace(-0.5, 0.75, num_experts)
    want = torch.tensor(quantiles(logits, topk, beta.tolist()), dtype=torch.float64)
    torch.testing.assert_close(expert_quantiles(logits, topk, beta), want, rtol=1e-12, atol=1e-12)
    chosen = quantile_choice(logits, topk, beta)
    for row, experts in zip(chosen, quantile_chosen(logits, topk, beta.tolist()), strict=True):
        assert row.nonzero().flatten().tolist() == sorted(experts)


def test_a_whole_share_of_tokens_pays_more_than_the_price():
    logits, beta = _logits(32, 8), torch.zeros(8)
    price = expert_quantiles(logits, 2, beta)
    cutoff = logits.sort(dim=1, descending=True).values[:, 2:3]
    assert ((logits - cutoff) > price).sum(dim=0).tolist() == [8] * 8


def test_no_tokens_ask_nothing():
    assert expert_quantiles(torch.zeros(0, 4), 2, torch.zeros(4)).tolist() == [0.0] * 4


def test_nothing_waits_for_the_device():
    """A meta tensor has no values: whoever looks at one raises."""
    logits, beta = torch.empty(9, 4, device="meta"), torch.empty(4, device="meta")
    assert expert_quantiles(logits, 3, beta).shape == (4,)


def test_new_prices_are_a_mix_of_mean_zero():
    beta = torch.tensor([1.0, -1.0, 0.0])
    asked = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    assert updated_beta(beta, asked, 0.0).tolist() == [2.0, -1.0, -1.0]
    assert updated_beta(beta, asked, 0.5).tolist() == [1.5, -1.0, -0.5]
    assert updated_beta(beta, asked, 0.5).dtype == torch.float32


@pytest.mark.parametrize(("num_tokens", "ema"), [(8000, 0.0), (8001, 0.5)])
def test_prices_even_out_a_skewed_router(num_tokens, ema):
    beta = torch.zeros(8)
    even = num_tokens * 2 / 8
    loads = []
    for step in range(30):
        logits = _logits(num_tokens, 8, step)
        loads.append(quantile_choice(logits, 2, beta).sum(dim=0).max().item() / even)
        beta = updated_beta(beta, expert_quantiles(logits, 2, beta), ema)
    assert loads[0] > 1.8
    assert max(loads[-10:]) < 1.1


def test_a_mean_is_over_tokens_and_a_recomputed_forward_counts_once():
    slots = SlotMeans(2, 3, 2, torch.device("cpu"))
    group = world_of_one().dp_cp
    for _recompute in range(2):
        slots.assign(0, 0, torch.tensor([1.0, 2.0]), 3)
        slots.assign(0, 2, torch.tensor([5.0, 6.0]), 1)
        slots.assign(1, 1, torch.tensor([7.0, 7.0]), 0)
    means, weights = slots.means(group)
    assert means.tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert weights.tolist() == [4.0, 0.0]
    slots.clear()
    assert not slots.means(group)[1].any()
