"""Recomputed forwards: metrics, trace and gradients are bit-equal to those without."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router_trace import RouterTracer, TraceLimits
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

OPTIONS: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.1, 0.1],
    "moe_z_loss_coeff": 0.1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_expert_capacity_factor": 1.0,
}


def _step(folder, ep: int, reentrant: bool | None) -> list[torch.Tensor]:
    config = moe_config(**OPTIONS)
    groups = make_groups(ep)
    layer = make_layer(config, groups, make_reference(config))
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, 2, "cpu")
    tracer = RouterTracer(
        folder, 0, moe_layers=[1], num_experts=[NUM_EXPERTS], topk=[2], limits=TraceLimits()
    )
    for microbatch in range(2):
        tokens = make_tokens(12, torch.float32, microbatch).detach().view(6, 2, H).requires_grad_()
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[1, 4:] = True
        context = ForwardContext(
            microbatch=microbatch, moe_metrics=tracker, router_tracer=tracer, padding_mask=mask
        )
        if reentrant is None:
            output, _ = layer(tokens, context)
        else:
            output, _ = checkpoint(layer, tokens, context, use_reentrant=reentrant)
        output.square().sum().backward()
    choices = [slot for choice in tracer._slots.values() for slot in choice]
    assert len(choices) == 4
    gradients = [p.grad for p in layer.parameters()]
    return [tracker._counts, tracker._losses, tracker._best_counts, *choices, *gradients]


def _compare(folder, ep: int) -> None:
    plain = _step(folder, ep, None)
    assert plain[1].count_nonzero() == 2 * 6, "every loss, entropy and dropped share"
    for reentrant in (True, False):
        again = _step(folder, ep, reentrant)
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("ep", [1, 2])
def test_recomputing_a_layer_changes_no_bit(ep, tmp_path):
    run_ranks(_compare, ep, tmp_path, ep)
