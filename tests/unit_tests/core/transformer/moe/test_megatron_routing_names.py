"""Megatron's routing functions against plain loops, with gradients, ties and refusals."""

import inspect

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import (
    apply_biased_logits,
    apply_random_logits,
    group_limited_topk,
    qb_dual_update,
    router_gating_linear,
    sinkhorn,
    topk_routing_with_score_function,
)
from tests.reference import megatron_functions as plain
from tests.reference.moe import ReferenceRule, reference_routing


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype).requires_grad_()


SIGNATURES = {
    "switch_load_balancing_loss_func": "probs tokens_per_expert total_num_tokens topk num_experts "
    "moe_aux_loss_coeff fused=False padding_mask=None",
    "z_loss_func": "logits z_loss_coeff padding_mask=None",
    "sinkhorn": "cost tol=0.0001",
    "qb_dual_update": "scores k beta update_beta=True",
    "get_capacity": "num_tokens num_experts capacity_factor min_capacity=None",
    "get_tokens_per_expert_and_token_count": "routing_map reduce_group topk=None "
    "with_padding_mask=False",
    "permute": "tokens routing_map probs=None num_out_tokens=None fused=False drop_and_pad=False "
    "tokens_per_expert=None align_size=0",
    "unpermute": "permuted_tokens sorted_indices restore_shape probs=None routing_map=None "
    "fused=False drop_and_pad=False pad_offsets=None",
    "sort_chunks_by_idxs": "input split_sizes sorted_idxs probs=None fused=False",
    "group_limited_topk": "scores topk num_tokens num_experts num_groups group_topk",
    "pad_routing_map": "routing_map pad_multiple",
    "topk_routing_with_score_function": "logits topk use_pre_softmax=False num_groups=None "
    "group_topk=None scaling_factor=None score_function='softmax' expert_bias=None fused=False "
    "router_replay=None dense_output=False precomputed_indices=None",
    "compute_routing_scores_for_aux_loss": "logits topk score_function fused=False "
    "padding_mask=None",
    "apply_router_token_dropping": "routing_probs routing_map router_topk capacity_factor "
    "drop_policy='probs' pad_to_capacity=False",
    "get_updated_expert_bias": "tokens_per_expert expert_bias expert_bias_update_rate "
    "tp_dp_cp_group=None",
    "apply_random_logits": "logits",
    "apply_biased_logits": "logits std layer_number=None",
    "router_gating_linear": "inp weight bias router_dtype",
    "maybe_move_tensor_to_cpu": "tensor as_numpy=False record_stream=False",
    "get_default_pg_collection": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_megatrons(name):
    parameters = inspect.signature(getattr(moe_utils, name)).parameters.values()
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(shown) == SIGNATURES[name]


RULES = [
    ReferenceRule(topk, score, pre, scaling, num_groups, group_topk)
    for score, pre in (("softmax", False), ("softmax", True), ("sigmoid", False))
    for topk, scaling, num_groups, group_topk in ((1, 1.0, 1, 1), (2, 2.5, 4, 1), (4, 1.0, 4, 2))
    if not (topk == 1 and score == "softmax" and not pre)
]
RULES += [ReferenceRule(3, "sqrtsoftplus")]


def _theirs(rule: ReferenceRule) -> dict:
    grouped = rule.num_groups > 1
    return {
        "topk": rule.topk,
        "use_pre_softmax": rule.pre_softmax,
        "num_groups": rule.num_groups if grouped else None,
        "group_topk": rule.group_topk if grouped else None,
        "scaling_factor": None if rule.scaling_factor == 1.0 else rule.scaling_factor,
        "score_function": rule.score_function,
    }


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_routing_equals_the_plain_rule_sparse_and_dense(rule, biased):
    logits = _random(11, 8)
    bias = torch.linspace(-0.4, 0.4, 8).roll(3).double()
    if rule.score_function == "softmax":
        if biased:
            with pytest.raises(ConfigError, match="expert_bias needs score_function"):
                topk_routing_with_score_function(logits, **_theirs(rule), expert_bias=bias)
        bias = None
    bias = bias if biased else None
    weights, chosen = reference_routing(logits, rule, bias)
    want = torch.zeros_like(logits).scatter(1, chosen, weights)
    options = _theirs(rule) | {"expert_bias": bias}
    probs, routing_map = topk_routing_with_score_function(logits, **options, fused=True)
    torch.testing.assert_close(probs, want)
    assert torch.equal(routing_map, want > 0)
    dense, indices = topk_routing_with_score_function(logits, **options, dense_output=True)
    assert torch.equal(indices, chosen), "the best expert first"
    torch.testing.assert_close(dense, weights)
    slope = torch.linspace(-1, 2, 8, dtype=torch.float64)
    got = torch.autograd.grad((probs * slope).sum(), logits, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad((want * slope).sum(), logits))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_given_or_replayed_experts_are_taken_with_the_weights_of_the_rule(score):
    logits, rng = _random(6, 8), torch.Generator().manual_seed(9)
    chosen = torch.stack([torch.randperm(8, generator=rng)[:3] for _ in range(6)])
    options = {"score_function": score, "scaling_factor": 2.0}
    probs, routing_map = topk_routing_with_score_function(
        logits, 3, **options, precomputed_indices=chosen
    )
    for token in range(6):
        assert set(routing_map[token].nonzero().flatten().tolist()) == set(chosen[token].tolist())
        masked = logits[token].clone()
        raw = {
            "softmax": masked.exp(),
            "sigmoid": masked.sigmoid(),
            "sqrtsoftplus": masked.exp().log1p().sqrt(),
        }[score][chosen[token]]
        torch.testing.assert_close(probs[token, chosen[token]], 2.0 * raw / raw.sum())

    class Replay:
        def get_replay_topk(self, scores, topk, num_groups, group_topk, default_compute_topk):
            own, own_indices = default_compute_topk(scores, topk, num_groups, group_topk)
            torch.testing.assert_close(own, scores.gather(1, own_indices))
            return scores.gather(1, chosen), chosen

    again = topk_routing_with_score_function(logits, 3, **options, router_replay=Replay())
    assert torch.equal(again[0], probs)
    dense = topk_routing_with_score_function(
        logits, 3, **options, precomputed_indices=chosen, dense_output=True
    )
    assert torch.equal(dense[1], chosen)
    assert torch.equal(dense[0], probs.gather(1, chosen))
    assert torch.autograd.gradcheck(
        lambda x: topk_routing_with_score_function(x, 3, **options, precomputed_indices=chosen)[0],
        logits,
    )


def test_probs_have_the_dtype_of_the_logits_and_scores_are_fp32():
    logits = _random(40, 8, dtype=torch.bfloat16)
    probs, routing_map = topk_routing_with_score_function(logits, 2)
    wide = topk_routing_with_score_function(logits.float(), 2)
    assert probs.dtype == torch.bfloat16
    assert torch.equal(routing_map, wide[1])
    assert torch.equal(probs, wide[0].bfloat16())


@pytest.mark.parametrize("topk", [2, 4])
def test_group_limited_topk_equals_a_loop(topk):
    scores = _random(30, 8, dtype=torch.float32)
    scores = (scores.detach() * 2).round().requires_grad_()  # with ties
    probs, indices = group_limited_topk(scores, topk, 30, 8, 4, 2)
    want = [plain.best_in_groups(row, topk, 4, 2) for row in scores.tolist()]
    assert indices.tolist() == want
    assert torch.equal(probs, scores.gather(1, torch.tensor(want)))
    (gradient,) = torch.autograd.grad(probs.sum(), scores)
    assert torch.equal(gradient, torch.zeros(30, 8).scatter(1, indices, 1.0))


@pytest.mark.parametrize(
    ("topk", "num_groups", "group_topk", "message"),
    [
        (2, 4, 4, "topk 2 must be a multiple of group_topk 4"),  # Megatron: other experts
        (3, 4, 2, "topk 3 must be a multiple"),
        (6, 4, 2, "at most 2 experts of a group"),
        (2, 3, 1, "must divide the 8 experts"),
        (4, 2, 4, "at least group_topk 4"),
    ],
)
def test_groups_that_would_choose_wrong_experts_are_refused(topk, num_groups, group_topk, message):
    scores = _random(5, 8)
    with pytest.raises(ConfigError, match=message):
        group_limited_topk(scores, topk, 5, 8, num_groups, group_topk)
    with pytest.raises(ConfigError, match=message):
        topk_routing_with_score_function(scores, topk, False, num_groups, group_topk)


def test_half_an_option_or_another_shape_is_refused():
    with pytest.raises(ConfigError, match="need each other"):
        topk_routing_with_score_function(_random(5, 8), 2, num_groups=4)
    with pytest.raises(ConfigError, match=r"scores are \(5, 8\), not \(4, 8\)"):
        group_limited_topk(_random(5, 8), 2, 4, 8, 4, 2)


def test_sinkhorn_equals_plain_scaling_of_rows_and_columns():
    cost = _random(7, 4)
    got = sinkhorn(cost, tol=1e-14)
    want = torch.tensor(plain.sinkhorn(cost.detach(), 2000), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    rough = sinkhorn(cost)
    torch.testing.assert_close(rough, want, rtol=1e-2, atol=1e-4)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 1e-13), _random(3, 3))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sinkhorn_of_large_logits_is_finite_and_normalised(scale, dtype):
    cost = _random(64, 8, dtype=dtype).detach() * scale
    got = sinkhorn(cost)
    assert got.dtype == dtype
    assert got.isfinite().all()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    columns = got.double().sum(dim=0)
    torch.testing.assert_close(columns, torch.full((8,), 1 / 8).double(), rtol=tolerance, atol=0)
    if scale <= 100:  # rows meet slowly where each token wants one expert alone
        rows = got.double().sum(dim=1) * 64
        assert (rows - 1).abs().max() < 0.1


def test_sinkhorn_of_nothing_is_nothing():
    assert sinkhorn(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(("num_tokens", "k"), [(16, 2), (15, 2), (8, 1), (9, 3)])
def test_quantile_update_equals_a_loop_and_evens_out_the_load(num_tokens, k):
    scores, beta = _random(num_tokens, 4).detach(), torch.zeros(4, dtype=torch.float64)
    scores[:, 0] += 1.0
    for _ in range(8):
        want_indices, want = plain.quantile_update(scores, k, beta.tolist())
        indices, new = qb_dual_update(scores, k, beta)
        assert indices.tolist() == want_indices
        torch.testing.assert_close(new, torch.tensor(want, dtype=torch.float64))
        same, kept = qb_dual_update(scores, k, beta, update_beta=False)
        assert kept is beta
        assert torch.equal(same, indices)
        beta = new
    first = torch.bincount(qb_dual_update(scores, k, beta * 0)[0].flatten(), minlength=4)
    last = torch.bincount(qb_dual_update(scores, k, beta)[0].flatten(), minlength=4)
    assert last.max() <= first.max()
    assert last.max() <= -(-num_tokens * k // 4) + 2


def test_quantile_update_without_a_choice_leaves_beta():
    beta = torch.ones(4)
    assert qb_dual_update(torch.zeros(0, 4), 2, beta)[1] is beta
    assert qb_dual_update(torch.zeros(3, 4), 4, beta)[1] is beta


def test_random_logits_are_even_and_pass_the_gradient():
    logits = _random(4000, 8, dtype=torch.float32)
    shown = apply_random_logits(logits * 100.0)
    assert 0.9 < shown.std().item() < 1.1
    weight = torch.arange(8.0)
    (gradient,) = torch.autograd.grad((shown * weight).sum(), logits)
    assert torch.equal(gradient, (weight * 100.0).expand(4000, 8))
    counts = topk_routing_with_score_function(shown, 2)[1].sum(dim=0)
    assert counts.max() < 1.15 * 1000


def test_biased_logits_share_a_bias_that_negative_std_keeps():
    logits = _random(20000, 4, dtype=torch.float32)

    def bias(std, layer=None):
        return apply_biased_logits(logits, std, layer).mean(dim=0).detach()

    first, second = bias(5.0), bias(5.0)
    assert (first - second).abs().max() > 0.5, "drawn anew in each call"
    kept = [bias(-5.0, layer) for layer in (7, 7, 8)]
    torch.testing.assert_close(kept[0], kept[1], rtol=0.0, atol=0.1)
    assert (kept[0] - kept[2]).abs().max() > 0.5
    (gradient,) = torch.autograd.grad(apply_biased_logits(logits, 5.0).sum(), logits)
    assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("biased", [False, True])
def test_the_gate_is_multiplied_in_the_routers_dtype(biased):
    inp, weight = _random(3, 2, 16, dtype=torch.bfloat16), _random(8, 16, dtype=torch.bfloat16)
    bias = _random(8, dtype=torch.bfloat16) if biased else None
    got = router_gating_linear(inp, weight, bias, torch.float32)
    want = torch.zeros(3, 2, 8, dtype=torch.float64)
    for s in range(3):
        for b in range(2):
            for e in range(8):
                want[s, b, e] = (inp[s, b].double() * weight[e].double()).sum()
                want[s, b, e] += 0.0 if bias is None else bias[e].double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert inp.grad is not None
    assert inp.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    expected = inp.detach().double().sum(dim=(0, 1)).expand(8, 16)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-2, atol=1e-2)
