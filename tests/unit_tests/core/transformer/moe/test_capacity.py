"""Capacity: who is kept, who is dropped, and that no factor or number of tokens breaks a run."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.capacity import (
    apply_router_token_dropping,
    dropped_fraction,
    get_capacity,
)
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.routing import Routing, topk_routing
from tests.helpers.ranks import run_ranks
from tests.reference.moe import kept_pairs
from tests.unit_tests.core.transformer.moe.layers import (
    EMPTY_EXPERT,
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

POLICIES = ("probs", "position")
FACTORS = (0.01, 1.0, 1e4)
AUX, Z, SCALE = 0.3, 0.02, 0.25


def _routing(num_tokens: int, topk: int = 2, dtype: torch.dtype = torch.float32) -> Routing:
    rng = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=rng).to(dtype)
    logits[:, 0] += 1.0
    return topk_routing(logits, topk)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "want"),
    [
        (8192, 8, 1.0, 1024),
        (8192, 8, 1.25, 1280),
        (80, 8, 1.1, 11),  # 10 * 1.1 is 11.000000000000002 in floating point
        (1, 8, 0.01, 1),
        (0, 8, 1e4, 0),
        (7, 8, 1e4, 8750),
    ],
)
def test_capacity_is_rounded_up_from_the_typed_decimal(tokens, experts, factor, want):
    assert get_capacity(tokens, experts, factor) == want
    assert get_capacity(tokens, experts, factor, min_capacity=want + 3) == want + 3


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 4096])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_keeps_what_a_loop_over_tokens_keeps(num_tokens, policy, dtype):
    probs, routing_map = _routing(num_tokens, dtype=dtype)
    for factor in (0.25, 1.0):
        got = apply_router_token_dropping(probs, routing_map, 2, factor, policy)
        weights, chosen = probs.topk(2, dim=1)
        kept = kept_pairs(weights, chosen, get_capacity(num_tokens * 2, 8, factor), policy)
        want = torch.zeros_like(routing_map).scatter_(1, chosen, kept)
        assert torch.equal(got.routing_map, want)
        assert torch.equal(got.probs, probs * want)
        assert num_tokens < 64 or want.sum() < routing_map.sum(), "nothing was dropped"


def test_position_keeps_the_first_tokens_of_each_of_4096():
    _, routing_map = _routing(4096)
    capacity = get_capacity(8192, NUM_EXPERTS, 0.5)
    got = apply_router_token_dropping(routing_map.float(), routing_map, 2, 0.5, "position")
    for wanted, kept in zip(routing_map.t(), got.routing_map.t(), strict=True):
        assert torch.equal(kept.nonzero(), wanted.nonzero()[:capacity])


def test_among_equal_probs_the_earlier_token_stays():
    routing_map = torch.ones(9, 1, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        probs = torch.ones(9, 1, dtype=dtype)
        got = apply_router_token_dropping(probs, routing_map, 1, 0.5, "probs")
        assert got.routing_map.flatten().tolist() == [True] * 5 + [False] * 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 3.7, 1e4])
def test_padding_gives_each_expert_exactly_its_capacity(policy, num_tokens, factor):
    probs, routing_map = _routing(num_tokens)
    plain = apply_router_token_dropping(probs, routing_map, 2, factor, policy)
    padded = apply_router_token_dropping(probs, routing_map, 2, factor, policy, True)
    capacity = min(get_capacity(num_tokens * 2, NUM_EXPERTS, factor), num_tokens)
    assert padded.routing_map.sum(dim=0).tolist() == [capacity] * NUM_EXPERTS
    assert torch.equal(padded.probs, plain.probs)
    assert not (plain.routing_map & ~padded.routing_map).any()
    assert int(plain.routing_map.sum(dim=0).max()) <= capacity


def test_a_large_factor_changes_nothing():
    routing = _routing(40)
    got = apply_router_token_dropping(*routing, 2, 1e4)
    assert got.probs is routing.probs
    assert got.routing_map is routing.routing_map
    just_enough = apply_router_token_dropping(*routing, 2, 3.9)
    assert torch.equal(just_enough.routing_map, routing.routing_map)


def test_the_dropped_fraction_counts_pairs():
    routing_map = torch.ones(4, 2, dtype=torch.bool)
    kept = routing_map.clone()
    kept[3, 0] = False
    assert dropped_fraction(routing_map, kept).item() == 0.125
    assert dropped_fraction(routing_map[:0], kept[:0]).item() == 0.0


def _check(config: Any, groups: Any, sizes: tuple[int, ...]) -> None:
    """Compare output and all gradients of a layer with the reference, which drops in a loop."""
    rank = dist.get_rank()
    reference = make_reference(config)
    layer = make_layer(config, groups, reference)
    tokens = make_tokens(sizes[rank], torch.float64, rank)
    output, _ = layer(tokens.view(sizes[rank], 1, H), ForwardContext(aux_loss_scale=SCALE))
    output.square().sum().backward()
    for other, size in enumerate(sizes):
        inputs = make_tokens(size, torch.float64, other)
        want = reference(inputs)  # its losses count what was routed, before dropping
        losses = AUX * want.balance_loss + Z * want.z_loss
        (want.output.square().sum() + SCALE * losses).backward()
        if other == rank:
            assert relative_error(output.view(-1, H), want.output) <= 1e-12
            assert relative_error(tokens.grad, inputs.grad) <= 1e-12
    expected = reference.logical(gradients=True)
    for name, gradient in logical_gradients(layer, groups).items():
        error = relative_error(gradient, expected[name])
        assert error <= 1e-12, f"{name}: {error}"


def _layers(ep: int) -> None:
    groups = make_groups(ep)
    world = dist.get_world_size()
    every = product(FACTORS, POLICIES, (False, True), TOKEN_DISPATCHERS, (13, 0))
    for factor, policy, pad, dispatcher, first in every:
        config = moe_config(
            fp64=True,
            add_bias_linear=True,
            moe_aux_loss_coeff=[AUX],
            moe_z_loss_coeff=Z,
            moe_expert_capacity_factor=factor,
            moe_token_drop_policy=policy,
            moe_pad_expert_input_to_capacity=pad,
            moe_token_dispatcher_type=dispatcher,
        )
        _check(config, groups, (first, 1, 7, 0)[:world])


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_a_layer_with_capacity_equals_the_reference_for_all_factors_and_sizes(world_size, ep):
    run_ranks(_layers, world_size, ep)


def _outputs(ep: int) -> None:
    groups = make_groups(ep)
    tokens = make_tokens(24, torch.float32, dist.get_rank())
    for dispatcher in TOKEN_DISPATCHERS:
        outputs, gradients = [], []
        for options in (
            {},
            {"moe_expert_capacity_factor": 1e4},
            {"moe_expert_capacity_factor": 3.9},  # C = T = 24
            {"moe_expert_capacity_factor": 0.5},
        ):
            config = moe_config(moe_token_dispatcher_type=dispatcher, **options)
            layer = make_layer(config, groups, make_reference(config))
            output, _ = layer(tokens.view(24, 1, H), ForwardContext())
            outputs.append(output)
            gradients.append(torch.autograd.grad(output.square().sum(), tokens)[0])
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[3])


@pytest.mark.parametrize("ep", [1, 2])
def test_a_factor_without_bound_equals_dropless_bit_for_bit(ep):
    run_ranks(_outputs, ep, ep)


def _seen() -> None:
    groups = make_groups(1)
    config = moe_config(moe_expert_capacity_factor=0.5)
    layer = make_layer(config, groups, make_reference(config))
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    tokens = make_tokens(24, torch.float32).view(24, 1, H)
    layer(tokens, ForwardContext(moe_metrics=tracker))
    tracker.end_step()
    report = tracker.report(groups)
    counts = report.tokens_per_expert[0]
    assert int(counts.sum()) == 48, "routed tokens are counted before dropping"
    assert counts[EMPTY_EXPERT] == 0
    over = (counts - 3).clamp(min=0).sum()  # C = 24 * 2 / 8 * 0.5
    assert report.mean("dropped_fraction") == pytest.approx(over.item() / 48)
    assert "| dropped " in report.lines()[0]
    cache: Any = object()  # nothing of it is read
    full, _ = layer(tokens, ForwardContext(kv_cache=cache))
    free = moe_config()
    want, _ = make_layer(free, groups, make_reference(free))(tokens, ForwardContext())
    assert torch.equal(full, want), "generation drops nothing"


def test_dropping_is_reported_and_generation_is_free_of_it():
    run_ranks(_seen, 1)
