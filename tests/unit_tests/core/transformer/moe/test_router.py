"""TopKRouter: precision, balance losses, and what it records."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_updates import update_expert_biases
from megatron.core.transformer.moe.routing import topk_routing
from tests.helpers.models import world_of_one
from tests.unit_tests.core.transformer.moe.layers import NUM_EXPERTS, H, make_tokens, moe_config


def _router(**options: Any) -> TopKRouter:
    router = TopKRouter(moe_config(**options), layer_number=1, pg_collection=world_of_one())
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        router.weight.copy_(torch.randn(NUM_EXPERTS, H, generator=rng) * 0.3)
    return router


def _gradient(router: TopKRouter, main: float, context: ForwardContext) -> torch.Tensor:
    dtype = router.weight.dtype
    probs, _ = router(make_tokens(200, dtype), context)
    weight = torch.linspace(main / 2, main, NUM_EXPERTS, dtype=probs.dtype)
    (gradient,) = torch.autograd.grad((probs * weight).sum(), router.weight)
    return gradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        {"moe_router_topk": 1, "moe_router_score_function": "sqrtsoftplus"},
        {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    ],
)
def test_router_learns_from_the_main_loss_alone(options):
    assert _gradient(_router(**options), 1.0, ForwardContext()).abs().amin() > 0


@pytest.mark.parametrize("name", ["aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss"])
def test_balance_gradient_is_linear_in_coefficient_and_scale_and_ignores_the_main_one(name):
    def balance(coefficient: float, scale: float, main: float) -> torch.Tensor:
        options: dict[str, Any] = {"moe_z_loss_coeff": coefficient}
        if name != "z_loss":
            options = {"moe_router_load_balancing_type": [name]}
            options["moe_aux_loss_coeff"] = [coefficient]
        router, plain = _router(fp64=True, **options), _router(fp64=True)
        context = ForwardContext(aux_loss_scale=scale)
        return _gradient(router, main, context) - _gradient(plain, main, context)

    one = balance(0.1, 1.0, 0.0)
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(balance(0.2, 1.0, 0.0), 2 * one, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(balance(0.1, 0.125, 0.0), one / 8, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(balance(0.1, 1.0, 5.0), one, rtol=1e-10, atol=1e-12)


def test_bf16_weights_are_multiplied_in_fp32():
    router = _router(bf16=True)
    tokens = make_tokens(50, torch.bfloat16)
    logits = router.gating(tokens)
    assert logits.dtype == torch.float32
    want = tokens.detach().double() @ router.weight.detach().double().t()
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-6)
    logits.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.dtype == torch.bfloat16


def test_router_dtype_fp64_scores_in_fp64():
    assert _router(moe_router_dtype="fp64").gating(make_tokens(3, torch.float32)).dtype == (
        torch.float64
    )


def test_a_second_forward_routes_the_same_and_is_counted_once():
    router = _router(moe_aux_loss_coeff=[0.01], moe_z_loss_coeff=1e-3)
    tokens = make_tokens(12, torch.float32)

    def counts(forwards: int) -> tuple[torch.Tensor, torch.Tensor]:
        tracker = MoEMetricsTracker([0, 1], NUM_EXPERTS, 2, 2, "cpu")
        for microbatch in range(2):
            context = ForwardContext(moe_metrics=tracker, microbatch=microbatch)
            for _ in range(forwards):
                router(tokens, context)
        tracker.end_step()
        return tracker._count_sums, tracker._loss_sums

    once, twice = counts(1), counts(2)
    assert int(once[0].sum()) == 2 * 12 * 2
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    first, second = router(tokens, ForwardContext()), router(tokens, ForwardContext())
    assert torch.equal(first.probs, second.probs)


@pytest.mark.parametrize("balancing", ["aux_loss", "seq_aux_loss", "global_aux_loss", "none"])
@pytest.mark.parametrize("z_loss", [None, 1e-3])
def test_counts_are_always_recorded_and_the_losses_in_force_alone(balancing, z_loss):
    router = _router(
        moe_router_load_balancing_type=[balancing],
        moe_aux_loss_coeff=[0.01],
        moe_z_loss_coeff=z_loss,
    )
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    router(make_tokens(12, torch.float32), ForwardContext(moe_metrics=tracker))
    tracker.end_step()
    assert int(tracker._count_sums.sum()) == 24
    want = {"entropy"} | ({"z_loss"} if z_loss else set())
    if balancing != "none":
        want.add(balancing.replace("aux_loss", "load_balancing_loss"))
    assert {name for _, name in tracker._has} == want


BIASED: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.1,
}


def test_the_expert_bias_stays_fp32_to_the_bit_when_the_model_is_cast():
    router = _router(**BIASED)
    router.expert_bias.copy_(torch.linspace(0.1, 0.3, NUM_EXPERTS))
    before = router.expert_bias.clone()
    for cast in (router.bfloat16, router.half, router.double):
        cast()
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, before)
    assert "expert_bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert _router().expert_bias is None


def test_the_expert_bias_moves_to_experts_that_were_used_less():
    router = _router(**BIASED)
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 2, "cpu")
    for microbatch in range(2):
        tokens = make_tokens(9, torch.float32, microbatch)
        for _recompute in range(2):
            router(tokens, ForwardContext(moe_metrics=tracker, microbatch=microbatch))
    counts = tracker._counts.sum(dim=(0, 1))
    update_expert_biases(router, tracker, dist.ProcessGroup(0, 1))
    want = [0.1 * ((count < 36 / 8) - (count > 36 / 8)) for count in counts.tolist()]
    assert router.expert_bias.tolist() == pytest.approx(want)
    assert 0 < sum(w > 0 for w in want) < NUM_EXPERTS


def test_an_expert_bias_evens_out_a_skewed_router():
    router = _router(**BIASED)
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    loads = []
    for step in range(60):
        router(make_tokens(400, torch.float32, step), ForwardContext(moe_metrics=tracker))
        loads.append(tracker._counts.amax().item() / 100)
        update_expert_biases(router, tracker, dist.ProcessGroup(0, 1))
        tracker.end_step()
        router.bias_update_rate *= 0.95
    assert loads[0] > 1.4
    assert loads[-1] < 1.2


def test_jitter_changes_what_the_router_sees_in_training_and_nothing_else():
    router, plain = _router(moe_input_jitter_eps=0.3), _router()
    tokens = make_tokens(12, torch.float32).detach().view(6, 2, H).requires_grad_()
    rng = SampleRng(1, (5, 9))
    got, _ = router(tokens, ForwardContext(rng=rng))
    seen = rng.jitter(tokens, 0.3, layer=1, site="router", batch_dim=1)
    want, _ = plain(seen, ForwardContext())
    assert torch.equal(got, want)
    weight = torch.arange(float(NUM_EXPERTS))
    inputs = torch.autograd.grad((got * weight).sum(), (tokens, router.weight))
    expected = torch.autograd.grad((want * weight).sum(), (tokens, plain.weight))
    assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))
    without = plain(tokens, ForwardContext()).probs
    assert not torch.equal(got, without)
    assert torch.equal(router(tokens, ForwardContext()).probs, without), "no jitter in evaluation"


SCOPES = ["aux_loss", "seq_aux_loss", "global_aux_loss"]


def _plain_balance(logits: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i P_i: f of the experts in ``routed`` [any, topk], P of ``logits``."""
    total = logits.new_zeros(())
    for expert in range(NUM_EXPERTS):
        share = (routed == expert).sum() / routed.numel()
        total = total + share * logits.softmax(dim=1)[:, expert].mean()
    return NUM_EXPERTS * total


@pytest.mark.parametrize("forwards", [1, 2])
def test_several_balance_losses_each_keep_their_scope_and_coefficient(forwards):
    coeffs = [0.5, 0.25, 0.125]
    router = _router(fp64=True, moe_router_load_balancing_type=SCOPES, moe_aux_loss_coeff=coeffs)
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 3, "cpu")
    routed = []
    for microbatch in range(3):
        tokens = make_tokens(15, torch.float64, microbatch).detach()
        for _ in range(forwards):  # a recomputed forward counts once
            context = ForwardContext(microbatch=microbatch, moe_metrics=tracker)
            probs, _ = router(tokens.view(5, 3, H), context)
        (got,) = torch.autograd.grad(probs.sum() * 0.0, router.weight)
        logits = tokens @ router.weight.t()
        routed.append(logits.topk(2).indices)
        sequences = [
            _plain_balance(logits[sample::3], routed[-1][sample::3]) for sample in range(3)
        ]
        losses = (
            _plain_balance(logits, routed[-1]),
            torch.stack(sequences).mean(),
            _plain_balance(logits, torch.cat(routed)),
        )
        total = sum(c * loss for c, loss in zip(coeffs, losses, strict=True))
        torch.testing.assert_close(got, torch.autograd.grad(total, router.weight)[0])
        columns = tracker._losses[0, microbatch, [0, 3, 4]]
        torch.testing.assert_close(columns, torch.stack(losses).detach())


def test_a_router_in_evaluation_attaches_nothing():
    router = _router(moe_router_load_balancing_type=SCOPES, moe_aux_loss_coeff=[1.0] * 3).eval()
    assert not _gradient(router, 0.0, ForwardContext()).any()


def test_forced_balance_routes_at_random_in_training_and_passes_gradients_through():
    router = _router(fp64=True, moe_router_force_load_balancing=True)
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(0.0, 20.0, NUM_EXPERTS)  # all to the last experts
    tokens = make_tokens(600, torch.float64).detach().view(300, 2, H)
    rng = SampleRng(1, (5, 9))
    probs, routing_map = router(tokens, ForwardContext(rng=rng))
    counts = routing_map.sum(dim=0)
    assert counts.max() < 1.3 * 150
    drawn = rng.normal_like(
        torch.zeros(300, 2, NUM_EXPERTS, dtype=torch.float64), layer=1, site="router", batch_dim=1
    ).view(600, NUM_EXPERTS)
    leaf = drawn.requires_grad_()
    want = topk_routing(leaf, 2).probs
    torch.testing.assert_close(probs, want)
    weight = torch.arange(float(NUM_EXPERTS), dtype=torch.float64)
    (slope,) = torch.autograd.grad((want * weight).sum(), leaf)
    (got,) = torch.autograd.grad((probs * weight).sum(), router.weight)
    torch.testing.assert_close(got, slope.t() @ tokens.view(600, H))
    real = router.eval()(tokens, ForwardContext()).routing_map.sum(dim=0)
    assert real[: NUM_EXPERTS // 2].sum() == 0
