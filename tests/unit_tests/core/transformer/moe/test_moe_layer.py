"""The MoE layer equals the textbook layer: output and every gradient, in every layout."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from tests.helpers.ranks import run_ranks
from tests.reference.activations import OPTIONS
from tests.unit_tests.core.transformer.moe.layers import (
    EMPTY_EXPERT,
    H,
    count_collectives,
    logical_gradients,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
    relative_error,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}
SLOW = pytest.mark.slow
LAYOUTS = [
    (1, 1),
    pytest.param(2, 1, marks=SLOW),
    (2, 2),
    (4, 2),
    pytest.param(4, 4, marks=SLOW),
]
SHARED = [  # (ranks, ep, etp)
    (2, 1, 2),
    (4, 2, 2),
    pytest.param(4, 1, 4, marks=SLOW),
    pytest.param(4, 1, 2, marks=SLOW),
]
DISPATCHERS = tuple(TOKEN_DISPATCHERS)
ROUTERS: list[dict[str, Any]] = [
    {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    {"moe_router_topk": 2},
    {"moe_router_topk": 4},
    {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    {"moe_router_score_function": "sqrtsoftplus"},
    {"moe_router_score_function": "sigmoid", "moe_router_topk": 1},
    {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
    {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_score_function": "sigmoid",
    },
]
AUX, Z, SCALE = 0.3, 0.02, 0.25


def _check(config: Any, groups: ProcessGroupCollection, sizes: tuple[int, ...]) -> None:
    """Compare layer and reference, the ranks having ``sizes`` tokens each."""
    dtype = getattr(torch, config.params_dtype_name)
    tolerance, rank = TOLERANCE[dtype], dist.get_rank()
    reference = make_reference(config)
    layer = make_layer(config, groups, reference)
    tokens = make_tokens(sizes[rank], dtype, rank)
    output, bias = layer(tokens.view(sizes[rank], 1, H), ForwardContext(aux_loss_scale=SCALE))
    assert bias is None
    assert output.shape == (sizes[rank], 1, H)
    _weighted_sum(output.view(-1, H), rank).backward()

    for other, size in enumerate(sizes):  # the reference sees the tokens of all ranks
        inputs = make_tokens(size, dtype, other)
        want = reference(inputs)
        losses = AUX * want.balance_loss + Z * want.z_loss
        (_weighted_sum(want.output, other) + SCALE * losses).backward()
        if other == rank:
            assert relative_error(output.view(-1, H), want.output) <= tolerance
            assert relative_error(tokens.grad, inputs.grad) <= tolerance
    expected = reference.logical(gradients=True)
    gradients = logical_gradients(layer, groups)
    for name, gradient in gradients.items():
        error = relative_error(gradient, expected[name])
        assert error <= tolerance, f"{name}: {error}"
    empty = f"experts.local_experts.{EMPTY_EXPERT}.linear_fc1.weight"
    assert not expected[empty].any(), "the case was meant to have an expert without tokens"


def _weighted_sum(output: torch.Tensor, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (output * torch.randn(output.shape, generator=rng).to(output.dtype)).sum()


def _parity(
    ep: int,
    experts: str,
    shape: dict[str, Any],
    etp: int = 1,
    routers: Sequence[dict[str, Any]] = ROUTERS,
) -> None:
    groups = make_groups(ep, etp=etp)
    sizes = (13, 6, 21, 9)[: dist.get_world_size()]
    for router, dispatcher, fp64 in product(routers, DISPATCHERS, (False, True)):
        config = moe_config(
            **router,
            **shape,
            fp64=fp64,
            moe_token_dispatcher_type=dispatcher,
            moe_experts_type=experts,
            moe_aux_loss_coeff=[AUX],
            moe_z_loss_coeff=Z,
        )
        _check(config, groups, sizes)


@pytest.mark.parametrize(("world_size", "ep"), LAYOUTS)
@pytest.mark.parametrize(
    ("experts", "shape"),
    [
        ("grouped", {"swiglu": True}),
        ("grouped", {"swiglu": False, "add_bias_linear": True}),
        ("sequential", {"swiglu": True, "add_bias_linear": True}),
        ("grouped", {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_gate": True}),
        ("grouped", {"moe_latent_size": 12, "moe_shared_expert_intermediate_size": 10}),
        ("sequential", {"moe_latent_size": 12, "add_bias_linear": True}),
        ("grouped", {"moe_shared_expert_intermediate_size": 32, "add_bias_linear": True}),
    ],
)
def test_layer_equals_the_textbook_layer(world_size, ep, experts, shape):
    run_ranks(_parity, world_size, ep, experts, shape)


@pytest.mark.parametrize(
    ("world_size", "ep", "etp", "experts", "name"),
    [
        (4, 2, 2, "grouped", "gpt_oss"),
        *(
            pytest.param(*layout, experts, name, marks=SLOW)
            for layout in ((1, 1, 1), (2, 2, 1), (2, 1, 2))
            for experts in ("grouped", "sequential")
            for name in OPTIONS
        ),
    ],
)
def test_a_layer_of_any_activation_equals_the_textbook_layer(world_size, ep, etp, experts, name):
    shape = {
        "swiglu": False,
        "add_mlp_bias": True,
        "moe_shared_expert_intermediate_size": 16,
        **OPTIONS[name],
    }
    run_ranks(_parity, world_size, ep, experts, shape, etp, [{"moe_router_bias": True}])


@pytest.mark.parametrize(("world_size", "ep", "etp"), SHARED)
@pytest.mark.parametrize(
    ("experts", "shape"),
    [
        ("grouped", {"add_bias_linear": True}),
        ("sequential", {"add_bias_linear": True}),
        ("grouped", {"swiglu": False}),
        ("sequential", {"swiglu": False, "moe_latent_size": 10}),
        ("grouped", {"add_bias_linear": True, "moe_expert_capacity_factor": 0.75}),
    ],
)
def test_a_layer_of_shared_experts_equals_the_textbook_layer(world_size, ep, etp, experts, shape):
    run_ranks(_parity, world_size, ep, experts, shape, etp, ROUTERS[:3])


def _zero_tokens(ep: int, etp: int) -> None:
    groups = make_groups(ep, etp=etp)
    world = dist.get_world_size()
    for sizes, dispatcher, fp64 in product(
        ((0, 5, 0, 3), (4, 0, 0, 0), (0, 0, 0, 0)), DISPATCHERS, (False, True)
    ):
        config = moe_config(
            fp64=fp64,
            add_bias_linear=True,
            moe_token_dispatcher_type=dispatcher,
            moe_aux_loss_coeff=[AUX],
            moe_z_loss_coeff=Z,
        )
        _check(config, groups, sizes[:world])


@pytest.mark.parametrize(
    ("world_size", "ep", "etp"), [(1, 1, 1), (2, 2, 1), (4, 2, 1), (2, 1, 2), (4, 2, 2), (4, 1, 4)]
)
def test_ranks_without_tokens_get_zero_gradients_and_no_hang(world_size, ep, etp):
    run_ranks(_zero_tokens, world_size, ep, etp)


def _bf16(ep: int) -> None:
    groups = make_groups(ep)
    for topk, dispatcher in product((2, 4), DISPATCHERS):
        config = moe_config(bf16=True, moe_router_topk=topk, moe_token_dispatcher_type=dispatcher)
        reference = make_reference(moe_config(moe_router_topk=topk))
        layer = make_layer(config, groups, reference)
        tokens = make_tokens(9, torch.bfloat16, dist.get_rank())
        output, _ = layer(tokens.view(9, 1, H), ForwardContext())
        assert output.dtype == torch.bfloat16
        with torch.no_grad():
            for p in reference.parameters():
                p.copy_(p.bfloat16())
            want = reference(tokens.detach().float()).output
        assert relative_error(output.view(9, H).float(), want) <= TOLERANCE[torch.bfloat16]
        output.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_bf16_layer_is_near_the_fp32_reference_with_the_same_weights():
    run_ranks(_bf16, 2, 2)


def _collectives(dispatcher: str, forward: list, backward: list, ep: int = 2, etp: int = 1) -> None:
    config = moe_config(moe_token_dispatcher_type=dispatcher)
    layer = make_layer(config, make_groups(ep, etp=etp), make_reference(config))
    tokens = make_tokens(6, torch.float32)
    with count_collectives() as calls:
        output, _ = layer(tokens.view(3, 2, H), ForwardContext())
    assert calls == forward
    with count_collectives() as calls:
        output.sum().backward()
    assert sorted(calls) == sorted(backward)


@pytest.mark.parametrize(("dispatcher", "probs_dim"), [("alltoall", 1), ("alltoall_dedup", 2)])
def test_alltoall_makes_one_exchange_of_counts_one_dispatch_and_one_combine(dispatcher, probs_dim):
    counts, rows, probs = (("all_to_all_single", dim) for dim in (1, 2, probs_dim))
    run_ranks(_collectives, 2, dispatcher, [counts, rows, probs, rows], [rows, rows, probs])


def test_allgather_makes_one_exchange_of_sizes_one_gather_and_one_reduce_scatter():
    sizes, rows = ("all_gather_single", 1), ("all_gather_single", 2)
    probs = reduced = ("all_to_all_single", 2)
    run_ranks(_collectives, 2, "allgather", [sizes, rows, probs, reduced], [rows, reduced, probs])


def _shared(dispatcher: str, ep: int, probs_dim: int) -> None:
    config = moe_config(moe_token_dispatcher_type=dispatcher)
    layer = make_layer(config, make_groups(ep, etp=2), make_reference(config))
    tokens = make_tokens(6, torch.float32, dist.get_rank())
    with count_collectives() as forward:
        output, _ = layer(tokens.view(3, 2, H), ForwardContext())
    with count_collectives() as backward:
        output.sum().backward()
    # over ep and over expt_tp each; which collective gathers depends on the sizes under gloo
    assert sorted(dim for _, dim in forward) == sorted([1, 2, 2, probs_dim] * ep)
    assert sorted(dim for _, dim in backward) == sorted([2, 2, probs_dim] * ep)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(("dispatcher", "probs_dim"), [("alltoall", 1), ("alltoall_dedup", 2)])
def test_sharing_experts_costs_as_many_collectives_as_spreading_them(dispatcher, probs_dim, ep):
    run_ranks(_shared, 2 * ep, dispatcher, ep, probs_dim)


def test_an_allgather_over_shared_experts_has_the_collectives_of_one_over_ranks():
    sizes, rows = ("all_gather_single", 1), ("all_gather_single", 2)
    probs = reduced = ("all_to_all_single", 2)
    forward, backward = [sizes, rows, probs, reduced], [rows, reduced, probs]
    run_ranks(_collectives, 4, "allgather", forward, backward, 2, 2)


def _twice() -> None:
    for dispatcher in DISPATCHERS:
        config = moe_config(moe_token_dispatcher_type=dispatcher)
        layer = make_layer(config, make_groups(2), make_reference(config))
        first, second = make_tokens(5, torch.float32, 1), make_tokens(7, torch.float32, 2)
        alone, _ = layer(first.view(5, 1, H), ForwardContext())
        (want,) = torch.autograd.grad(alone.square().sum(), first)
        one, _ = layer(first.view(5, 1, H), ForwardContext())
        two, _ = layer(second.view(7, 1, H), ForwardContext())
        (got,) = torch.autograd.grad((one.square().sum() + two.square().sum()), first)
        assert torch.equal(one, alone)
        assert torch.equal(got, want)


def test_two_microbatches_in_flight_do_not_disturb_each_other():
    run_ranks(_twice, 2)


def _latent() -> None:
    config = moe_config(bf16=True, moe_latent_size=8, moe_shared_expert_intermediate_size=10)
    layer = make_layer(config, make_groups(2), make_reference(config))
    dispatcher, sent = layer.token_dispatcher, []
    original = dispatcher.token_permutation
    dispatcher.token_permutation = lambda x, *rest, **more: (
        sent.append(x) or original(x, *rest, **more)
    )
    output, _ = layer(make_tokens(6, torch.bfloat16).view(3, 2, H), ForwardContext())
    assert [x.shape for x in sent] == [(6, 8)]
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_latent_rows_are_what_is_sent():
    run_ranks(_latent, 2)
