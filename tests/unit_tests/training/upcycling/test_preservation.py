"""The algebra of upcycling against the routing itself: weights of each slice sum to 1 / factor."""

import pytest
import torch

from megatron.core.transformer.moe.routing import topk_routing
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.upcycling.preservation import (
    Recipe,
    equal_weight,
    factor_of_router,
    factors,
    folds,
    needed_factor,
    preservation_problems,
    router_std,
    tokens_crowd,
)

EXPERTS = 12
SCORES = {
    "softmax": {},
    "pre": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sqrtsoftplus": {"moe_router_score_function": "sqrtsoftplus"},
    "own": {"moe_router_score_function": "sigmoid", "moe_router_norm_topk_prob": False},
}


def model(**options: object) -> TransformerConfig:
    values = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    return TransformerConfig(**values | {"num_moe_experts": EXPERTS} | options)


@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize("copies", [1, 2, None])
@pytest.mark.parametrize("score", SCORES)
def test_weights_of_each_slice_sum_to_one_over_the_factor(score, copies, granularity) -> None:
    topk = EXPERTS if copies is None else copies * granularity
    config = model(moe_router_topk=topk, **SCORES[score])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(EXPERTS // granularity, 64, generator=generator, dtype=torch.float64)
    rows = (rows * router_std(config, 2.0**-23)).repeat_interleave(granularity, dim=0)
    tokens = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    probs, routing_map = topk_routing(
        (tokens @ rows.t()).float(),
        topk,
        score_function=config.moe_router_score_function,
        pre_softmax=config.moe_router_pre_softmax,
        norm_topk_prob=config.moe_router_norm_topk_prob,
        scaling_factor=needed_factor(config, granularity),
    )
    of_slices = probs.view(200, -1, granularity).sum(dim=1)  # [tokens, granularity]
    torch.testing.assert_close(of_slices, torch.ones(200, granularity), rtol=0, atol=5e-7)
    loads = routing_map.sum(dim=0)
    assert loads.min() > 0.3 * loads.float().mean(), "tokens must spread over the experts"


def test_only_weights_that_do_not_sum_to_one_must_be_equal() -> None:
    assert equal_weight(model(moe_router_topk=2)) is None
    assert equal_weight(model(moe_router_topk=2, **SCORES["pre"])) == 1 / EXPERTS
    assert equal_weight(model(moe_router_topk=EXPERTS, **SCORES["pre"])) is None
    assert equal_weight(model(moe_router_topk=2, **SCORES["sigmoid"])) is None
    assert equal_weight(model(moe_router_topk=1, **SCORES["sigmoid"])) == 0.5
    sinkhorn = {"moe_router_load_balancing_type": "sinkhorn"}
    assert equal_weight(model(moe_router_topk=1, **sinkhorn)) == 0.5
    assert equal_weight(model(moe_router_topk=2, **sinkhorn)) == 1 / EXPERTS


def test_layers_that_need_different_factors_get_them_in_their_second_matrices() -> None:
    config = model(
        moe_router_topk=2,
        moe_num_experts_per_layer=[4, 12],
        moe_router_pre_softmax=True,
    )
    assert factors(config, 1) == {0: 2.0, 1: 6.0}
    assert factor_of_router(config, 1) is None
    assert folds(config, 1) == {0: 2.0, 1: 6.0}
    config.moe_router_topk_scaling_factor = 2.0
    assert folds(config, 1) == {0: 1.0, 1: 3.0}
    assert factor_of_router(model(moe_router_topk=4), 2) == 2.0
    assert factor_of_router(model(moe_router_topk=4), 1) is None


@pytest.mark.parametrize(
    ("granularity", "options", "told"),
    [
        (5, {}, "--moe-upcycling-granularity 5 must divide --num-experts 12"),
        (2, {"moe_router_topk": 3}, "2 must divide --moe-router-topk 3"),
        (
            4,
            {"moe_router_topk": 4, "moe_router_num_groups": 6, "moe_router_group_topk": 2},
            "4 must divide the 2 experts of a group",
        ),
        (1, {"moe_router_type": "expert_choice"}, "--moe-router-type expert_choice"),
        (2, {"moe_router_type": "hash"}, "not --moe-router-type hash"),
        (2, {"moe_router_load_balancing_type": "sinkhorn"}, "excludes sinkhorn"),
        (1, {"moe_latent_size": 8}, "--moe-latent-size 8"),
        (
            1,
            {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True},
            "--moe-shared-expert-gate",
        ),
    ],
)
def test_what_cannot_keep_the_function_is_refused_once(granularity, options, told) -> None:
    problems = list(preservation_problems(model(**options), granularity))
    assert len(problems) == 1
    assert told in problems[0]


def test_tokens_crowd_only_where_equal_scores_choose() -> None:
    assert not tokens_crowd(model(moe_router_topk=1, **SCORES["pre"]))
    groups = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
    assert tokens_crowd(model(moe_router_topk=1, **SCORES["pre"], **groups))
    assert not tokens_crowd(model(moe_router_topk=1, **groups))
    bias = {"moe_router_enable_expert_bias": True}
    assert tokens_crowd(model(moe_router_topk=1, **SCORES["sigmoid"], **bias))
    assert not tokens_crowd(model(moe_router_topk=2, **SCORES["sigmoid"], **bias))


def test_a_recipe_says_what_it_changes() -> None:
    assert Recipe(granularity=2).keeps
    assert Recipe(granularity=2).changes() == ""
    assert Recipe(noise=0.01, drop=0.5).changes() == "--noise 0.01 and --drop 0.5"
    assert not Recipe(drop=0.5).keeps
