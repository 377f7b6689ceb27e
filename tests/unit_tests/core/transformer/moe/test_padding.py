"""Padding is routed like any token, and is in no loss, count, entropy, bias or dropped share."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.load_balancing import (
    balance_loss_of_shares,
    router_entropy,
    router_z_loss,
    sequence_balance_loss,
    switch_load_balancing_loss,
)
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_updates import update_expert_biases
from tests.helpers.models import world_of_one
from tests.helpers.ranks import run_ranks
from tests.reference.padding import padded_figures
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    make_groups,
    make_layer,
    make_reference,
    make_rule,
    make_tokens,
    moe_config,
)

S, B = 7, 3
SCOPES = ["aux_loss", "seq_aux_loss", "global_aux_loss"]
CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre_softmax": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
    "bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}


def _mask(share: float = 0.4) -> torch.Tensor:
    """[b, s]: uneven, and sample 1 is padding alone."""
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) < share
    mask[1] = True
    return mask


def _router(**options: Any) -> TopKRouter:
    config = moe_config(fp64=True, **options)
    router = TopKRouter(config, layer_number=1, pg_collection=world_of_one())
    with torch.no_grad():
        weight = torch.randn(NUM_EXPERTS, H, generator=torch.Generator().manual_seed(2))
        router.weight.copy_(weight * 0.3)
    return router


@pytest.mark.parametrize("case", CASES)
def test_losses_gradient_and_counts_equal_the_loop_that_leaves_padding_out(case):
    coeffs = {"aux_loss": 0.5, "seq_aux_loss": 0.25, "global_aux_loss": 0.125}
    router = _router(
        moe_router_load_balancing_type=list(coeffs),
        moe_aux_loss_coeff=list(coeffs.values()),
        moe_z_loss_coeff=0.1,
        **CASES[case],
    )
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, NUM_EXPERTS))
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    tokens = make_tokens(S * B, torch.float64).detach().view(S, B, H)
    probs, _ = router(tokens, ForwardContext(moe_metrics=tracker, padding_mask=_mask()))
    (got,) = torch.autograd.grad(probs.sum() * 0.0, router.weight)
    logits = tokens @ router.weight.t()
    want = padded_figures(logits, _mask(), make_rule(moe_config(**CASES[case])), router.expert_bias)
    total = 0.625 * want.aux_loss + 0.25 * want.seq_aux_loss + 0.1 * want.z_loss
    torch.testing.assert_close(got, torch.autograd.grad(total, router.weight)[0])
    assert tracker._counts[0, 0].tolist() == want.tokens_per_expert
    losses = (want.aux_loss, want.z_loss, want.entropy, want.seq_aux_loss, want.aux_loss)
    torch.testing.assert_close(tracker._losses[0, 0, :5], torch.stack(losses).detach())


@pytest.mark.parametrize("case", CASES)
def test_a_mask_without_padding_changes_nothing(case):
    router = _router(
        moe_router_load_balancing_type=SCOPES, moe_aux_loss_coeff=[0.5] * 3, **CASES[case]
    )
    tokens = make_tokens(S * B, torch.float64).detach().view(S, B, H)
    found = []
    for mask in (None, torch.zeros(B, S, dtype=torch.bool)):
        tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
        probs, _ = router(tokens, ForwardContext(moe_metrics=tracker, padding_mask=mask))
        (gradient,) = torch.autograd.grad(probs.square().sum(), router.weight)
        found.append((gradient, tracker._counts, tracker._losses))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_a_microbatch_of_padding_has_loss_0_gradient_0_and_counts_0():
    router = _router(
        moe_router_load_balancing_type=SCOPES,
        moe_aux_loss_coeff=[0.5] * 3,
        moe_z_loss_coeff=0.1,
    )
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    tokens = make_tokens(S * B, torch.float64).detach().view(S, B, H)
    mask = torch.ones(B, S, dtype=torch.bool)
    probs, routing_map = router(tokens, ForwardContext(moe_metrics=tracker, padding_mask=mask))
    (gradient,) = torch.autograd.grad(probs.sum() * 0.0, router.weight)
    assert not gradient.any()
    assert not tracker._counts.any()
    assert not tracker._losses.any()
    assert (routing_map.sum(dim=1) == 2).all(), "padding is routed"


def test_what_padding_holds_does_not_matter_even_when_it_is_nan():
    clean = torch.randn(S * B, NUM_EXPERTS, generator=torch.Generator().manual_seed(1)).double()
    padding = _mask().t().reshape(-1)
    best = (clean > 0.5) & ~padding[:, None]
    counts = best.sum(dim=0)
    found = []
    for filler in (0.0, 1e30, float("nan"), float("inf")):
        logits = clean.masked_fill(padding[:, None], filler).requires_grad_()
        losses = (
            switch_load_balancing_loss(logits, counts, 2, padding),
            sequence_balance_loss(logits, best, 2, B, padding),
            balance_loss_of_shares(logits, counts.double() / counts.sum(), padding),
            router_z_loss(logits, padding),
        )
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
        assert not gradient[padding].any()
        found.append(torch.stack([*losses, router_entropy(logits, padding), gradient.sum()]))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_gradients_with_padding_are_those_of_the_losses(num_samples):
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    logits.requires_grad_()
    padding = torch.tensor([0, 1, 0, 0, 1, 0, 1, 1, 0]).bool()
    best = (logits > 0.3) & ~padding[:, None]

    def losses(x: torch.Tensor) -> torch.Tensor:
        sequence = sequence_balance_loss(x, best, 2, num_samples, padding)
        return sequence + router_z_loss(x, padding) + router_z_loss(x, padding, torch.tensor(3.5))

    assert torch.autograd.gradcheck(losses, logits)


def test_an_expert_bias_moves_by_tokens_that_are_no_padding():
    """Megatron-LM 0.19.2 raises a RuntimeError about shapes here."""
    options = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    router = _router(moe_router_bias_update_rate=0.1, **options)
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    tokens = make_tokens(S * B, torch.float64).detach().view(S, B, H)
    router(tokens, ForwardContext(moe_metrics=tracker, padding_mask=_mask()))
    logits = (tokens @ router.weight.t()).detach()
    counts = padded_figures(logits, _mask(), make_rule(moe_config(**options))).tokens_per_expert
    update_expert_biases(router, tracker, dist.ProcessGroup(0, 1))
    mean = sum(counts) / NUM_EXPERTS
    want = [0.1 * ((count < mean) - (count > mean)) for count in counts]
    assert router.expert_bias.tolist() == pytest.approx(want)


def _dropped_share(layer: Any, tokens: torch.Tensor) -> float:
    """Share of the pairs of valid tokens that do not fit, one pair after another."""
    probs, routing_map = layer.router(tokens, ForwardContext())
    valid = ~_mask().t().reshape(-1)
    capacity = math.ceil(S * B * 2 / NUM_EXPERTS * 0.75)
    pairs = dropped = 0
    for expert in range(NUM_EXPERTS):
        chosen = routing_map[:, expert].nonzero().flatten().tolist()
        chosen.sort(key=lambda token: -probs[token, expert].item())
        pairs += sum(bool(valid[token]) for token in chosen)
        dropped += sum(bool(valid[token]) for token in chosen[capacity:])
    return dropped / pairs


def _layer(ep: int) -> None:
    groups = make_groups(ep)
    config = moe_config(moe_expert_capacity_factor=0.75, moe_aux_loss_coeff=[0.5], fp64=True)
    layer = make_layer(config, groups, make_reference(config))
    tokens = make_tokens(S * B, torch.float64).view(S, B, H)
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    context = ForwardContext(moe_metrics=tracker)
    got, _ = layer(tokens, context, padding_mask=_mask())
    counted, share = tracker._counts.clone(), tracker._losses[0, 0, 5].item()
    want, _ = layer(tokens, context)
    assert torch.equal(got, want), "padding is computed like any token"
    assert counted.sum() == 2 * int((~_mask()).sum())
    assert tracker._counts.sum() == 2 * S * B
    assert share == pytest.approx(_dropped_share(layer, tokens))
    assert share != tracker._losses[0, 0, 5].item()
    layer(tokens, ForwardContext(moe_metrics=tracker, padding_mask=_mask()))
    assert torch.equal(tracker._counts, counted)
    assert tracker._losses[0, 0, 5].item() == share


@pytest.mark.parametrize("ep", [1, 2])
def test_a_layer_takes_the_mask_as_argument_or_from_its_context(ep):
    run_ranks(_layer, ep, ep)
