"""Shared experts: dense parameters, a gate for each token, nothing without the option."""

import torch
from torch import nn

from megatron.core.param_role import role_of
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.forward_context import ForwardContext
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    make_groups,
    make_layer,
    make_reference,
    moe_config,
)

SHARED = {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_gate": True}


def _layer(**options) -> nn.Module:
    config = moe_config(**options)
    return make_layer(config, make_groups(), make_reference(config))


def _parameters() -> None:
    shared = dict(_layer(**SHARED).shared_experts.named_parameters())
    assert {name: tuple(p.shape) for name, p in shared.items()} == {
        "linear_fc1.weight": (20, H),
        "linear_fc2.weight": (H, 10),
        "gate_weight": (1, H),
    }
    assert not any(role_of(p).is_expert for p in shared.values())
    plain = {name for name, _ in _layer().named_parameters()}
    assert not any("shared" in name for name in plain)


def test_parameters_are_dense_and_there_only_when_asked_for():
    run_ranks(_parameters, 1)


def _gate() -> None:
    layer = _layer(**SHARED, fp64=True).shared_experts
    init_weights(nn.ModuleDict({"mlp": layer}), seed=1)
    x = torch.randn(6, H, dtype=torch.float64)
    gated, bias = layer(x, ForwardContext())
    assert bias is None
    scores = torch.sigmoid(x @ layer.gate_weight[0])
    assert 0.1 < scores.min() < scores.max() < 0.9
    layer.gate_weight = None
    plain, _ = layer(x, ForwardContext())
    torch.testing.assert_close(gated, plain * scores[:, None])


def test_the_gate_multiplies_each_token():
    run_ranks(_gate, 1)


def _bf16() -> None:
    layer = _layer(**SHARED, bf16=True)
    x = torch.randn(5, 1, H, dtype=torch.bfloat16, requires_grad=True)
    output, _ = layer(x, ForwardContext())
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_bf16_stays_bf16():
    run_ranks(_bf16, 1)
