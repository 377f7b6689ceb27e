"""Experts choose tokens: exactly their capacity, the best ones, in training only."""

import logging
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe import permutation
from megatron.core.transformer.moe.expert_choice import (
    expert_capacity,
    expert_choice_routing,
    token_choice_routing,
)
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router import TopKRouter
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.ranks import run_ranks
from tests.reference.expert_choice import (
    expert_choice_weights,
    reference_capacity,
    token_choice_weights,
)
from tests.unit_tests.core.inference.test_generate import PROMPTS, VOCAB, plainly, run
from tests.unit_tests.core.transformer.moe.dense_reference import Z, check_layer
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

CHOICE: dict[str, Any] = {"moe_router_type": "expert_choice", "moe_aux_loss_coeff": None}
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]


def _logits(num_tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, NUM_EXPERTS, generator=generator, dtype=dtype) * 2


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 24, 101])
@pytest.mark.parametrize("factor", [None, 0.01, 1.1, 2.0, 50.0])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_experts_take_what_a_loop_over_experts_takes(num_tokens, factor, score_function):
    logits = _logits(num_tokens).requires_grad_()
    got = expert_choice_routing(
        logits, 2, capacity_factor=factor, score_function=score_function, scaling_factor=1.5
    )
    capacity = reference_capacity(num_tokens, NUM_EXPERTS, 2, str(factor or 1))
    assert expert_capacity(num_tokens, NUM_EXPERTS, 2, factor) == capacity
    assert got.routing_map.sum(dim=0).tolist() == [capacity] * NUM_EXPERTS
    inputs = logits.detach().clone().requires_grad_()
    want = expert_choice_weights(inputs, capacity, score_function, 1.5)
    torch.testing.assert_close(got.probs, want, rtol=1e-13, atol=1e-14)
    assert torch.equal(got.routing_map, want > 0)
    if num_tokens:
        slope = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
        (mine,) = torch.autograd.grad((got.probs * slope).sum(), logits)
        (theirs,) = torch.autograd.grad((want * slope).sum(), inputs)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_probs_have_the_gradient_of_finite_differences():
    def probs(logits: torch.Tensor) -> torch.Tensor:
        return expert_choice_routing(logits, 2).probs

    assert torch.autograd.gradcheck(probs, (_logits(9).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_among_equals_the_earlier_token_is_taken(dtype):
    routing_map = expert_choice_routing(torch.zeros(9, 4, dtype=dtype), 2).routing_map
    assert routing_map[:5].all()  # ceil(9 * 2 / 4)
    assert not routing_map[5:].any()


def test_scores_that_underflow_are_still_ordered():
    logits = torch.zeros(6, 2)
    logits[:, 1] = torch.tensor([-900.0, -950, -800, -1000, -700, -850])
    assert (logits.softmax(dim=1)[:, 1] == 0).all()
    taken = expert_choice_routing(logits, 1).routing_map[:, 1]
    assert taken.nonzero().flatten().tolist() == [2, 4, 5]


def test_a_token_may_have_no_expert_or_all():
    logits = _logits(64)
    logits[5] = 20.0
    with_all = expert_choice_routing(logits, 2, score_function="sigmoid").routing_map
    assert with_all[5].all()
    assert (with_all.sum(dim=1) == 0).any()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_token_choice_weighs_as_expert_choice_does(score_function):
    logits = _logits(12)
    by_token = token_choice_routing(logits, 3, score_function=score_function)
    assert by_token.routing_map.sum(dim=1).tolist() == [3] * 12
    by_expert = expert_choice_routing(
        logits, NUM_EXPERTS, capacity_factor=9.0, score_function=score_function
    )
    assert by_expert.routing_map.all()
    assert torch.equal(by_token.probs, by_expert.probs * by_token.routing_map)


def _layers(ep: int) -> None:
    groups = make_groups(ep)
    shapes = [
        ((13, 6, 21, 9), None, False),
        ((13, 6, 21, 9), 1.5, True),
        ((0, 5, 0, 3), None, True),
        ((0, 0, 0, 0), 1.5, True),
    ]
    for (size, factor, fp64), dispatcher in product(shapes, TOKEN_DISPATCHERS):
        config = moe_config(
            **CHOICE,
            fp64=fp64,
            add_bias_linear=True,
            moe_expert_capacity_factor=factor,
            moe_token_dispatcher_type=dispatcher,
            moe_z_loss_coeff=Z,
        )
        check_layer(config, groups, size[: dist.get_world_size()], partial(_weights, factor))


def _weights(factor: float | None, logits: torch.Tensor, _: list[int]) -> torch.Tensor:
    capacity = reference_capacity(len(logits), NUM_EXPERTS, 2, str(factor or 1))
    return expert_choice_weights(logits, capacity)


@pytest.mark.parametrize(("world_size", "ep"), LAYOUTS)
def test_a_layer_equals_all_experts_weighted_by_the_reference(world_size, ep):
    run_ranks(_layers, world_size, ep)


def _evaluation(ep: int) -> None:
    groups = make_groups(ep)
    for dispatcher, factor in product(TOKEN_DISPATCHERS, (None, 0.25)):
        config = moe_config(
            **CHOICE,
            fp64=True,
            moe_token_dispatcher_type=dispatcher,
            moe_expert_capacity_factor=factor,
        )
        sizes = (13, 6)[: dist.get_world_size()]
        check_layer(config, groups, sizes, lambda x, _: token_choice_weights(x, 2), training=False)


@pytest.mark.parametrize("ep", [1, 2])
def test_outside_of_training_tokens_choose_and_none_is_dropped(ep):
    run_ranks(_evaluation, ep, ep)


def _static_rows() -> None:
    asked: list[int | None] = []
    original = permutation.plan_rows
    tokens = make_tokens(12, torch.float32).view(12, 1, H)
    for dispatcher in ("allgather", "alltoall", "alltoall_hierarchical"):
        module = __import__(TOKEN_DISPATCHERS[dispatcher].__module__, fromlist=["plan_rows"])

        def seen(routing_map: torch.Tensor, *, num_rows: int | None, **rest: Any) -> Any:
            asked.append(num_rows)
            assert num_rows == int(routing_map.sum())
            return original(routing_map, num_rows=num_rows, **rest)

        module.plan_rows = seen
        config = moe_config(**CHOICE, moe_token_dispatcher_type=dispatcher)
        layer = make_layer(config, make_groups(), make_reference(config))
        layer(tokens, ForwardContext())
    assert len(asked) == 3


def test_the_host_knows_the_numbers_of_rows_in_training_without_asking_the_device():
    run_ranks(_static_rows, 1)


def _recorded() -> None:
    config = moe_config(**CHOICE, moe_z_loss_coeff=Z)
    layer = make_layer(config, make_groups(), make_reference(config))
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    context = ForwardContext(moe_metrics=tracker)
    tokens = make_tokens(24, torch.float32).view(24, 1, H)
    first, _ = layer(tokens, context)
    again, _ = layer(tokens, context)  # as a recomputed layer
    assert torch.equal(first, again)
    tracker.end_step()
    report = tracker.report(make_groups())
    assert report.layers[0].tokens_per_expert.tolist() == [6] * NUM_EXPERTS
    assert list(report.losses()) == ["z_loss"]
    assert report.layers[0].max_violation == 0.0


def test_counts_are_even_and_there_is_no_balance_loss():
    run_ranks(_recorded, 1)


def test_no_balance_loss_is_attached_by_default():
    assert moe_config(**CHOICE).aux_loss_coeffs == {}
    assert moe_config(moe_aux_loss_coeff=None).aux_loss_coeffs == {"aux_loss": 0.01}


def _model(**options: Any) -> Any:
    return tiny_gpt(tiny_config(num_moe_experts=4, **CHOICE, **options))


@torch.no_grad()
def test_training_looks_ahead_and_evaluation_does_not():
    model = _model()
    ids, positions, _ = tiny_batch()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    for training in (True, False):
        model.train(training)
        same = model(ids, positions)[:, :-1] == model(other, positions)[:, :-1]
        assert bool(same.all()) != training


def test_generation_is_what_evaluation_without_a_cache_says(caplog, monkeypatch):
    monkeypatch.setattr("megatron.core.log._seen", set())
    model = _model()
    with caplog.at_level(logging.WARNING):
        found = run(model, PROMPTS, eod=VOCAB)
    assert "expert_choice cannot generate" in caplog.text
    assert found == [plainly(model, prompt, VOCAB) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in found}) > 2


@torch.no_grad()
def test_a_cache_makes_tokens_choose_even_in_training_mode():
    config = moe_config(**CHOICE)
    router = TopKRouter(config, layer_number=1, pg_collection=world_of_one())
    tokens = make_tokens(24, torch.float32)
    cache: Any = object()  # nothing of it is read
    assert router.training
    by_token = router(tokens, ForwardContext(kv_cache=cache)).routing_map
    assert by_token.sum(dim=1).tolist() == [2] * 24
