"""Metrics look and do not touch: gradients keep every bit, and only losses in force are told."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)


def _both(ep: int) -> None:
    groups = make_groups(ep)
    config = moe_config(moe_aux_loss_coeff=[0.1], moe_z_loss_coeff=0.1)
    found = []
    for metrics in (None, MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")):
        layer = make_layer(config, groups, make_reference(config))
        tokens = make_tokens(9, torch.float32, dist.get_rank())
        output, _ = layer(tokens.view(9, 1, H), ForwardContext(moe_metrics=metrics))
        output.square().sum().backward()
        found.append([output, tokens.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_recording_changes_no_bit_of_an_output_or_gradient(world_size, ep):
    run_ranks(_both, world_size, ep)


def _told(options: dict[str, Any], want: set[str]) -> None:
    groups = make_groups(1)
    config = moe_config(**options)
    layer = make_layer(config, groups, make_reference(config))
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    layer(make_tokens(9, torch.float32).view(3, 3, H), ForwardContext(moe_metrics=tracker))
    tracker.end_step()
    scalars = tracker.report(groups).scalars()
    assert {name for name in scalars if name.endswith("loss")} == want


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"moe_router_load_balancing_type": ["none"]}, set()),
        ({"moe_z_loss_coeff": 0.1}, {"moe/z_loss"}),
        (
            {"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [0.1]},
            {"moe/seq_load_balancing_loss"},
        ),
        (
            {"moe_router_load_balancing_type": ["global_aux_loss"], "moe_aux_loss_coeff": [0.1]},
            {"moe/global_load_balancing_loss"},
        ),
    ],
)
def test_losses_that_are_off_are_not_reported(options, want):
    run_ranks(_told, 1, options, want)
