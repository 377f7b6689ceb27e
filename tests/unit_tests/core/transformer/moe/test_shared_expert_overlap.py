"""--moe-shared-expert-overlap: the same bits, and shared experts under the all-to-all."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_layer import MoELayer
from tests.helpers.late_rows import late_rows
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    count_collectives,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

DISPATCHERS = ("alltoall", "alltoall_dedup", "alltoall_hierarchical")
SHAPES: list[dict[str, Any]] = [
    {"moe_shared_expert_gate": True},
    {"add_bias_linear": True, "moe_latent_size": 12},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"], "bf16": True},
]


def _layer(ep: int, node_size: int | None = None, **options: Any) -> MoELayer:
    config = moe_config(moe_shared_expert_intermediate_size=10, moe_aux_loss_coeff=[0.3], **options)
    # the reference has the weights in fp32
    plain = moe_config(
        moe_shared_expert_intermediate_size=10,
        **{k: v for k, v in options.items() if k != "bf16"},
    )
    return make_layer(config, make_groups(ep, node_size), make_reference(plain))


def _results(layer: MoELayer, num_tokens: int) -> list[Tensor]:
    dtype = next(layer.experts.parameters()).dtype
    tokens = make_tokens(num_tokens, dtype, dist.get_rank())
    output, _ = layer(tokens.view(num_tokens, 1, H), ForwardContext())
    output.square().sum().backward()
    return [output, tokens.grad, *(p.grad for p in layer.parameters())]


def _same_bits(ep: int) -> None:
    size = (13, 0, 21, 9)[dist.get_rank()]
    nodes = 2 if ep == 4 else None
    for dispatcher, shape in product(DISPATCHERS, SHAPES):
        options = {"moe_token_dispatcher_type": dispatcher, "node_size": nodes} | shape
        want = _results(_layer(ep, **options), size)
        got = _results(_layer(ep, moe_shared_expert_overlap=True, **options), size)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), options


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_overlap_gives_the_same_bits_in_output_and_every_gradient(world_size, ep):
    run_ranks(_same_bits, world_size, ep)


def _note_shared(layer: MoELayer, events: list[str]) -> None:
    """Note when each half of the shared experts is computed, and differentiated."""
    for part, name in ((layer.shared_experts.linear_fc1, "fc1"),
                       (layer.shared_experts.linear_fc2, "fc2")):  # fmt: skip

        def noted(_: Any, __: Any, output: Any, name: str = name) -> None:
            events.append(name)
            output[0].register_hook(lambda _: events.append(f"{name} backward"))

        part.register_forward_hook(noted)


# out go rows and their probs
FORWARD = ["launch", "launch", "fc1", "wait", "wait", "launch", "fc2", "wait"]
BACKWARD = ["launch", "fc2 backward", "wait"]
BACKWARD += ["launch", "launch", "fc1 backward", "wait", "wait"]


def _order(dispatcher: str) -> None:
    options = {"moe_token_dispatcher_type": dispatcher, "fp64": True, "bf16": False}
    want = _results(_layer(2, **options), 7)
    layer, events = _layer(2, moe_shared_expert_overlap=True, **options), []
    _note_shared(layer, events)
    with late_rows(events.append):
        got = _results(layer, 7)
    assert events == FORWARD + BACKWARD
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dispatcher", ["alltoall", "alltoall_dedup"])
def test_shared_experts_run_between_launch_and_wait_in_forward_and_backward(dispatcher):
    run_ranks(_order, 2, dispatcher)


def _not_asked() -> None:
    layer, events = _layer(2), []
    _note_shared(layer, events)
    with late_rows(events.append):
        _results(layer, 7)
    assert events == ["fc1", "fc2", "fc2 backward", "fc1 backward"]


def test_nothing_is_launched_ahead_without_the_flag():
    run_ranks(_not_asked, 2)


def _padded(dispatcher: str, same: list, asked: list) -> None:
    options = {
        "moe_expert_capacity_factor": 0.75,
        "moe_pad_expert_input_to_capacity": True,
        "moe_token_dispatcher_type": dispatcher,
        "fp64": True,
    }
    config = moe_config(**options)
    results = []
    for known, wanted in ((True, same), (False, asked)):
        layer = make_layer(config, make_groups(2), make_reference(config))
        tokens = make_tokens(12, torch.float64, dist.get_rank())
        context = ForwardContext(same_num_tokens=known)
        with count_collectives() as calls:
            output, _ = layer(tokens.view(12, 1, H), context)
        assert calls == wanted
        output.square().sum().backward()
        results.append([output, tokens.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


COUNTS, ROWS = ("all_to_all_single", 1), ("all_to_all_single", 2)
SIZES, GATHERED = ("all_gather_single", 1), ("all_gather_single", 2)
HOP = [ROWS], [COUNTS]


@pytest.mark.parametrize(
    ("dispatcher", "same", "asked"),
    [
        ("alltoall", [ROWS, COUNTS, ROWS], [COUNTS, ROWS, COUNTS, ROWS]),
        ("alltoall_hierarchical", [ROWS, COUNTS, ROWS], [COUNTS, ROWS, COUNTS, ROWS]),
        ("allgather", [GATHERED, ROWS, ROWS], [SIZES, GATHERED, ROWS, ROWS]),
    ],
)
def test_padded_experts_of_equal_ranks_exchange_no_counts(dispatcher, same, asked):
    run_ranks(_padded, 2, dispatcher, same, asked)
