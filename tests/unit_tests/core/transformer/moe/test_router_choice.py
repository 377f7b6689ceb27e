"""Routers that choose otherwise than by score: sinkhorn, quantile balancing, forced skew."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_updates import update_quantile_betas
from megatron.core.transformer.moe.routing import topk_routing
from tests.helpers.models import world_of_one
from tests.helpers.ranks import run_ranks
from tests.reference.balanced_choice import quantile_chosen, quantiles, sinkhorn_chosen
from tests.reference.moe import ReferenceMoE, full_scores, raw_scores
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    logical_gradients,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
    relative_error,
)

SINKHORN: dict[str, Any] = {
    "moe_router_load_balancing_type": ["sinkhorn"],
    "moe_aux_loss_coeff": None,
}
QUANTILE: dict[str, Any] = SINKHORN | {"moe_router_load_balancing_type": ["quantile_balancing"]}
BETA = torch.linspace(-1.0, 1.5, NUM_EXPERTS)


def _router(**options: Any) -> TopKRouter:
    config = moe_config(**({"fp64": True} | options))
    router = TopKRouter(config, layer_number=1, pg_collection=world_of_one())
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        router.weight.copy_(torch.randn(NUM_EXPERTS, H, generator=rng) * 0.3)
        router.weight[3, 0] += 2.0  # tokens have 1 there: a crowded expert
        if router.qb_beta is not None:
            router.qb_beta.copy_(BETA)
    return router


def _plain_weights(logits: Tensor, chosen: Tensor, options: dict[str, Any]) -> Tensor:
    """Weights [num_tokens, topk] of ``chosen``, by the documented formulas."""
    topk, kind = chosen.shape[1], options.get("moe_router_score_function", "softmax")
    if options["moe_router_load_balancing_type"] == ["sinkhorn"]:
        scores = torch.sigmoid(logits) if topk == 1 else logits.softmax(dim=1)
        return scores.gather(1, chosen)
    rule = make_reference(moe_config(**options)).rule
    if rule.pre_softmax:
        return full_scores(logits, rule).gather(1, chosen)
    if topk == 1 and kind != "softmax":
        return raw_scores(logits, rule).gather(1, chosen)
    weights = raw_scores(logits, rule).gather(1, chosen)
    return weights / weights.sum(dim=1, keepdim=True) * rule.scaling_factor


def _plain_choice(logits: Tensor, options: dict[str, Any]) -> Tensor:
    topk = options.get("moe_router_topk", 2)
    if options["moe_router_load_balancing_type"] == ["sinkhorn"]:
        rows = sinkhorn_chosen(logits, topk)
    else:
        rows = quantile_chosen(logits, topk, BETA.tolist())
    return torch.tensor(rows).view(len(logits), topk)


RULES = [
    SINKHORN,
    SINKHORN | {"moe_router_topk": 1},
    SINKHORN | {"moe_router_topk": 4},
    QUANTILE,
    QUANTILE | {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    QUANTILE | {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    QUANTILE | {"moe_router_score_function": "sqrtsoftplus", "moe_router_topk": 1},
]


@pytest.mark.parametrize("options", RULES)
def test_choice_weights_and_gradients_are_those_of_the_plain_rule(options):
    router, tokens = _router(**options), make_tokens(60, torch.float64)
    probs, routing_map = router(tokens, ForwardContext())
    logits = tokens @ router.weight.t()
    chosen = _plain_choice(logits.detach(), options)
    want = torch.zeros_like(logits).scatter(1, chosen, _plain_weights(logits, chosen, options))
    torch.testing.assert_close(probs, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(routing_map, want > 0)
    plain = logits.topk(chosen.shape[1]).indices.sort(dim=1).values
    assert not torch.equal(plain, chosen.sort(dim=1).values), "another choice than by score"
    weight = torch.arange(float(NUM_EXPERTS), dtype=torch.float64)
    got = torch.autograd.grad((probs * weight).sum(), (tokens, router.weight))
    expected = torch.autograd.grad((want * weight).sum(), (tokens, router.weight))
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_sinkhorn_spreads_in_training_and_takes_the_best_in_evaluation():
    router, tokens = _router(**SINKHORN), make_tokens(800, torch.float64)
    trained = router(tokens, ForwardContext()).routing_map
    probs, evaluated = router.eval()(tokens, ForwardContext())
    logits = tokens @ router.weight.t()
    assert torch.equal(evaluated, topk_routing(logits, 2).routing_map)
    torch.testing.assert_close(probs, logits.softmax(dim=1) * evaluated)
    assert trained.sum(dim=0).max() < 1.15 * 200
    assert evaluated.sum(dim=0).max() > 1.8 * 200


def test_prices_hold_in_evaluation_but_do_not_move():
    router, tokens = _router(**QUANTILE), make_tokens(50, torch.float64)
    trained = router(tokens, ForwardContext()).routing_map
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    evaluated = router.eval()(tokens, ForwardContext(moe_metrics=tracker)).routing_map
    assert torch.equal(trained, evaluated)
    assert tracker._quantiles is None


def test_prices_stay_fp32_to_the_bit_when_the_model_is_cast_and_are_saved():
    router = _router(**QUANTILE)
    for cast in (router.bfloat16, router.half, router.double):
        cast()
        assert router.qb_beta.dtype == torch.float32
        assert torch.equal(router.qb_beta, BETA)
    assert torch.equal(model_tensors(router)["model.qb_beta"], BETA)
    assert _router().qb_beta is None


def test_prices_move_to_the_mean_over_the_tokens_of_the_step():
    router = _router(**QUANTILE, moe_router_quantile_balancing_ema=0.25)
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 2, "cpu")
    total = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for microbatch, size in enumerate((9, 30)):
        tokens = make_tokens(size, torch.float64, microbatch)
        for _recompute in range(2):
            router(tokens, ForwardContext(moe_metrics=tracker, microbatch=microbatch))
        asked = quantiles((tokens @ router.weight.t()).detach(), 2, BETA.tolist())
        total += torch.tensor(asked, dtype=torch.float64) * size
    update_quantile_betas(router, tracker, dist.ProcessGroup(0, 1))
    want = 0.25 * BETA.double() + 0.75 * total / 39
    torch.testing.assert_close(router.qb_beta, (want - want.mean()).float())
    kept = router.qb_beta.clone()
    tracker.end_step()
    update_quantile_betas(router, tracker, dist.ProcessGroup(0, 1))
    assert torch.equal(router.qb_beta, kept), "a step without tokens leaves them"


class BalancedReference(ReferenceMoE):
    """The textbook layer with another choice of experts."""

    options: dict[str, Any]

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = _plain_choice(logits.detach(), self.options)
        return _plain_weights(logits, chosen, self.options), chosen


def _check_layer(options: dict[str, Any], ep: int, sizes: tuple[int, ...]) -> None:
    groups, rank = make_groups(ep), dist.get_rank()
    for dispatcher in TOKEN_DISPATCHERS:
        config = moe_config(fp64=True, moe_token_dispatcher_type=dispatcher, **options)
        reference = make_reference(config)
        reference.__class__, reference.options = BalancedReference, options
        layer = make_layer(config, groups, reference)
        if layer.router.qb_beta is not None:
            layer.router.qb_beta.copy_(BETA)
        for other, size in enumerate(sizes):
            inputs = make_tokens(size, torch.float64, other)
            want = reference(inputs).output
            want.square().sum().backward()
            if other == rank:
                tokens = make_tokens(size, torch.float64, other)
                output, _ = layer(tokens.view(size, 1, H), ForwardContext())
                output.square().sum().backward()
                assert relative_error(output.view(-1, H), want) <= 1e-12
                assert relative_error(tokens.grad, inputs.grad) <= 1e-12
        expected = reference.logical(gradients=True)
        for name, gradient in logical_gradients(layer, groups).items():
            assert relative_error(gradient, expected[name]) <= 1e-12, name


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("options", [SINKHORN, QUANTILE], ids=["sinkhorn", "quantile"])
def test_a_layer_of_this_choice_equals_the_textbook_layer(options, world_size, ep):
    run_ranks(_check_layer, world_size, options, ep, (13, 6, 21, 9)[:world_size])


def _skewed_counts(std: float, iteration: int, layer: int = 1, seed: int = 1) -> Tensor:
    router = _router(moe_router_force_biased=std)
    router.layer_number = layer
    tokens = make_tokens(4000, torch.float64).detach().view(2000, 2, H)
    context = ForwardContext(rng=SampleRng(seed, (5, 9)), iteration=iteration)
    return router(tokens, context).routing_map.sum(dim=0)


def test_forced_skew_crowds_some_experts_anew_in_each_step_or_for_the_whole_run():
    even = _skewed_counts(0.01, 0)
    assert even.max() < 1.1 * 1000
    first = _skewed_counts(2.0, 0)
    assert first.max() > 2 * 1000
    assert torch.equal(first, _skewed_counts(2.0, 0)), "a recomputed forward"
    assert not torch.equal(first.argsort(), _skewed_counts(2.0, 1).argsort())
    assert not torch.equal(first.argsort(), _skewed_counts(2.0, 0, layer=0).argsort())
    assert not torch.equal(first.argsort(), _skewed_counts(2.0, 0, seed=2).argsort())
    kept = _skewed_counts(-2.0, 0)
    assert kept.max() > 2 * 1000
    assert torch.equal(kept, _skewed_counts(-2.0, 7))


def test_forced_skew_is_random_logits_and_one_number_an_expert_with_gradients_as_they_come():
    router, rng = _router(moe_router_force_biased=-1.5), SampleRng(1, (5, 9))
    tokens = make_tokens(60, torch.float64).detach().view(30, 2, H)
    probs, _ = router(tokens, ForwardContext(rng=rng))
    like = torch.zeros(30, 2, NUM_EXPERTS, dtype=torch.float64)
    drawn = rng.normal_like(like, layer=1, site="router", batch_dim=1)
    skew = rng.shared_normal(NUM_EXPERTS, layer=1, site="router_skew", step=None, like=like)
    leaf = (drawn + 1.5 * skew).view(60, NUM_EXPERTS).requires_grad_()
    want = topk_routing(leaf, 2).probs
    torch.testing.assert_close(probs, want)
    weight = torch.arange(float(NUM_EXPERTS), dtype=torch.float64)
    (slope,) = torch.autograd.grad((want * weight).sum(), leaf)
    (got,) = torch.autograd.grad((probs * weight).sum(), router.weight)
    torch.testing.assert_close(got, slope.t() @ tokens.view(60, H))
    real = router.eval()(tokens, ForwardContext()).routing_map
    assert torch.equal(real, topk_routing(tokens.view(60, H) @ router.weight.t(), 2).routing_map)
