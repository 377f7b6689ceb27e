"""Routing: which experts, with what weights, and what happens on ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.transformer.moe.routing import log_scores, topk_indices, topk_routing
from tests.reference.moe import ReferenceRule, full_scores, reference_routing


def _logits(num_tokens: int, num_experts: int, dtype=torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, num_experts, generator=rng).to(dtype).requires_grad_()


@pytest.mark.parametrize("num_experts", [4, 40])
def test_default_weights_are_the_softmax_over_the_chosen_logits(num_experts):
    logits = _logits(7, num_experts)
    probs, routing_map = topk_routing(logits, 3)
    chosen, indices = logits.topk(3)
    want = torch.zeros_like(logits).scatter(1, indices, chosen.softmax(dim=1))
    torch.testing.assert_close(probs, want)
    assert torch.equal(routing_map, want > 0)
    weight = torch.randn(7, num_experts, dtype=torch.float64)
    got = torch.autograd.grad((probs * weight).sum(), logits)
    torch.testing.assert_close(got, torch.autograd.grad((want * weight).sum(), logits))


def test_pre_softmax_weights_are_the_softmax_over_all_logits_and_have_a_gradient_for_top_1():
    logits = _logits(5, 6)
    probs, routing_map = topk_routing(logits, 1, pre_softmax=True)
    want = logits.softmax(dim=1)
    torch.testing.assert_close(probs.sum(dim=1), want.amax(dim=1))
    assert torch.equal(routing_map.int().argmax(dim=1), logits.argmax(dim=1))
    (gradient,) = torch.autograd.grad(probs.sum(), logits)
    assert gradient.abs().amin() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_logits_are_broken_by_the_lower_index(dtype):
    logits = torch.zeros(300, 70, dtype=dtype)
    logits[:, 60] = 1.0
    logits[1::2] *= -0.0  # minus zero is no other number than zero
    logits[1::2, 60] = 1.0
    _, routing_map = topk_routing(logits, 4)
    want = torch.zeros(70, dtype=torch.bool)
    want[[60, 0, 1, 2]] = True
    assert torch.equal(routing_map, want.expand(300, 70))


@given(
    st.lists(
        st.lists(st.sampled_from([-3.0, -0.5, -0.0, 0.0, 0.5, 1e30, -1e30]), min_size=5, max_size=5)
    ),
    st.integers(1, 5),
)
@settings(max_examples=50, deadline=None)
def test_fp32_chooses_as_a_stable_sort_does(rows, topk):
    logits = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    got = topk_indices(logits, topk).sort(dim=1).values
    want = topk_indices(logits.double(), topk).sort(dim=1).values
    assert torch.equal(got, want)


@given(st.integers(0, 9), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_token_has_topk_experts_and_no_weight_elsewhere(num_tokens, topk, pre_softmax):
    logits = _logits(num_tokens, 6)
    probs, routing_map = topk_routing(logits, topk, pre_softmax=pre_softmax)
    assert (routing_map.sum(dim=1) == topk).all()
    assert not probs[~routing_map].any()
    if not pre_softmax:
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(num_tokens).double())


def test_scores_are_fp32_for_bf16_logits_and_fp64_for_fp64():
    assert topk_routing(_logits(3, 4, torch.bfloat16), 2).probs.dtype == torch.float32
    assert topk_routing(_logits(3, 4, torch.float64), 2).probs.dtype == torch.float64


def test_a_token_with_nan_logits_still_has_topk_experts():
    logits = torch.full((2, 8), float("nan"))
    assert (topk_routing(logits, 2).routing_map.sum(dim=1) == 2).all()


RULES = [
    ReferenceRule(topk, score, pre, scaling)
    for score in ("softmax", "sigmoid", "sqrtsoftplus")
    for topk, pre, scaling in ((1, score == "softmax", 1.0), (3, False, 1.0), (3, False, 2.5))
]
RULES += [
    ReferenceRule(topk, score, pre, 1.0, num_groups, group_topk)
    for score, pre in (("softmax", False), ("softmax", True), ("sigmoid", False))
    for topk, num_groups, group_topk in ((2, 4, 1), (2, 4, 2), (4, 4, 2), (4, 2, 1), (4, 2, 2))
]
RULES += [
    ReferenceRule(topk, score, pre, 1.0, 4, 2, judges)
    for score, pre in (("softmax", False), ("softmax", True), ("sigmoid", False))
    for topk, judges in ((1, 1), (3, 1), (3, 2), (4, 1))
]
RULES += [
    ReferenceRule(topk, score, scaling_factor=2.5, norm_topk_prob=False)
    for score in ("sigmoid", "sqrtsoftplus")
    for topk in (1, 3)
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weights_and_gradients_are_those_of_the_plain_rule(rule):
    logits = _logits(11, 8)
    probs, routing_map = topk_routing(logits, **rule._asdict())
    weights, chosen = reference_routing(logits, rule)
    want = torch.zeros_like(logits).scatter(1, chosen, weights)
    torch.testing.assert_close(probs, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(routing_map, want > 0)
    weight = torch.linspace(-1, 2, 8, dtype=torch.float64)
    got = torch.autograd.grad((probs * weight).sum(), logits)
    expected = torch.autograd.grad((want * weight).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: topk_routing(x, **rule._asdict()).probs, logits)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("level", [-1000.0, -60.0, -20.0, 0.0, 60.0, 1000.0])
def test_weights_sum_to_1_and_have_finite_gradients_for_logits_of_any_size(score, level):
    logits = (_logits(5, 8, torch.float32).detach() * 0.5 + level).requires_grad_()
    probs, _ = topk_routing(logits, 3, score_function=score)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(5))
    (gradient,) = torch.autograd.grad((probs * torch.arange(8.0)).sum(), logits)
    assert gradient.isfinite().all()
    if level <= -60:  # where a sigmoid is exp, and the root of softplus the root of that
        power = 1.0 if score == "sigmoid" else 0.5
        torch.testing.assert_close(probs, topk_routing(logits * power, 3).probs)
    full = log_scores(logits, score).softmax(dim=1)
    torch.testing.assert_close(full.sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_full_scores_are_the_softmax_of_log_scores(score):
    logits = torch.linspace(-15.0, 25.0, 24, dtype=torch.float64).view(3, 8)
    want = full_scores(logits, ReferenceRule(1, score))
    torch.testing.assert_close(log_scores(logits, score).softmax(dim=1), want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("logit", [-700.0, -60.0, -20.1, -20.0, -19.9, 0.0, 5.0, 900.0])
def test_the_logarithm_of_sqrtsoftplus_is_exact_where_the_score_is_tiny(logit):
    got = log_scores(torch.tensor([[logit]], dtype=torch.float64), "sqrtsoftplus").item()
    softplus = logit if logit > 100 else math.log1p(math.exp(logit))
    assert got == pytest.approx(0.5 * math.log(softplus), rel=1e-13)


@given(st.sampled_from([(1, 2), (1, 4), (2, 4), (2, 2)]), st.integers(1, 2), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_a_token_uses_no_more_groups_than_allowed(groups, each, num_tokens):
    group_topk, num_groups = groups
    logits = _logits(num_tokens, 8, torch.float32).round()  # with ties
    topk = group_topk * each
    _, routing_map = topk_routing(logits, topk, num_groups=num_groups, group_topk=group_topk)
    assert (routing_map.sum(dim=1) == topk).all()
    used = routing_map.view(num_tokens, num_groups, 8 // num_groups).any(dim=2).sum(dim=1)
    assert (used <= group_topk).all()


def test_all_groups_allowed_is_no_groups():
    logits = _logits(30, 8)
    plain, grouped = topk_routing(logits, 4), topk_routing(logits, 4, num_groups=4, group_topk=4)
    assert torch.equal(plain.probs, grouped.probs)


@pytest.mark.parametrize("rule", [r for r in RULES if r.score_function != "softmax"], ids=str)
def test_an_expert_bias_chooses_experts_and_never_weights_them(rule):
    logits = _logits(40, 8)
    bias = torch.linspace(-0.4, 0.4, 8).roll(3)
    probs, routing_map = topk_routing(logits, **rule._asdict(), expert_bias=bias)
    weights, chosen = reference_routing(logits, rule, bias)
    want = torch.zeros_like(logits).scatter(1, chosen, weights)
    torch.testing.assert_close(probs, want, rtol=1e-12, atol=1e-14)
    assert not torch.equal(routing_map, topk_routing(logits, **rule._asdict()).routing_map)
    got = torch.autograd.grad((probs * bias).sum(), logits)
    torch.testing.assert_close(got, torch.autograd.grad((want * bias).sum(), logits))
