"""Balance losses: formulas, gradients, and how they enter backward."""

import math

import pytest
import torch

from megatron.core.transformer.moe.load_balancing import (
    MoEAuxLossAutoScaler,
    balance_loss_of_shares,
    router_entropy,
    router_z_loss,
    sequence_balance_loss,
    switch_load_balancing_loss,
    updated_expert_bias,
)
from megatron.core.transformer.moe.routing import topk_routing


def _logits(num_tokens: int = 9, num_experts: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(num_tokens, num_experts, generator=rng).double().requires_grad_()


def _counts(logits: torch.Tensor, topk: int) -> torch.Tensor:
    return topk_routing(logits, topk).routing_map.sum(dim=0)


def test_balance_loss_is_experts_times_share_times_mean_probability():
    logits = _logits()
    counts = _counts(logits, 2)
    want = 5 * (counts / 18 * logits.softmax(dim=1).mean(dim=0)).sum()
    got = switch_load_balancing_loss(logits, counts, 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


def test_balance_loss_is_1_for_even_use_and_experts_over_topk_for_the_worst():
    even = torch.zeros(8, 4)
    assert switch_load_balancing_loss(even, torch.full((4,), 4), 2).item() == pytest.approx(1.0)
    worst = torch.zeros(8, 4)
    worst[:, 0] = 100.0
    counts = torch.tensor([8, 0, 0, 0])
    assert switch_load_balancing_loss(worst, counts, 1).item() == pytest.approx(4.0)


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits = _logits()
    want = logits.logsumexp(dim=1).square().mean()
    got = router_z_loss(logits)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


def test_losses_have_the_right_gradient_by_finite_differences():
    logits = _logits(4, 3)
    counts = _counts(logits, 2)
    assert torch.autograd.gradcheck(lambda x: switch_load_balancing_loss(x, counts, 2), logits)
    assert torch.autograd.gradcheck(router_z_loss, logits)
    best = topk_routing(logits, 2).routing_map
    assert torch.autograd.gradcheck(lambda x: sequence_balance_loss(x, best, 2, 2), logits)


def test_losses_of_no_tokens_are_zero_and_have_an_empty_gradient():
    logits = torch.zeros(0, 4, requires_grad=True)
    counts = torch.zeros(4, dtype=torch.int64)
    total = switch_load_balancing_loss(logits, counts, 2) + router_z_loss(logits)
    best = torch.zeros(0, 4, dtype=torch.bool)
    total = total + sequence_balance_loss(logits, best, 2, num_samples=3)
    total = total + balance_loss_of_shares(logits, torch.zeros(4))
    total.backward()
    assert total.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 4)
    assert router_entropy(logits).item() == 0.0


def test_entropy_is_ln_experts_for_equal_logits_and_0_for_a_certain_router():
    assert router_entropy(torch.zeros(3, 8)).item() == pytest.approx(math.log(8))
    certain = torch.zeros(3, 8)
    certain[:, 1] = 200.0
    assert router_entropy(certain).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
def test_attached_loss_enters_backward_with_the_scale_whatever_the_main_gradient(scale):
    output, source = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    attached = MoEAuxLossAutoScaler.apply(output, source * 10.0, scale)
    assert torch.equal(attached, output)
    (attached.sum() * 1000.0).backward()
    assert source.grad is not None
    assert output.grad is not None
    assert source.grad.item() == 2.5
    assert torch.equal(output.grad, torch.full((3,), 1000.0))


def test_bias_goes_by_the_sign_of_the_difference_to_the_exact_mean():
    large = 2**55  # fp64 would not tell it from its neighbours
    counts = torch.tensor([[large, large + 1, large - 1, large], [3, 3, 3, 3]])
    bias = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 2.0, 3.0]])
    got = updated_expert_bias(bias, counts, 0.25)
    assert got.tolist() == [[0.5, 0.25, 0.75, 0.5], [0.0, 1.0, 2.0, 3.0]]
    got = updated_expert_bias(bias, torch.tensor([[5, 6, 4, 5], [0, 0, 0, 1]]), 0.25)
    assert got.tolist() == [[0.5, 0.25, 0.75, 0.5], [0.25, 1.25, 2.25, 2.75]]
