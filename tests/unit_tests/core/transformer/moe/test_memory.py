"""The formula of what a MoE layer keeps is what it keeps; and that is less than usual."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.memory import SavedBytes, saved_bytes
from tests.helpers.live_bytes import kept_for_backward, kept_on_nodes
from tests.helpers.ranks import run_ranks
from tests.reference.activations import OPTIONS
from tests.reference.standard_moe import standard_experts
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

T = 40
SHARED: list[dict[str, Any]] = [
    {},
    {"moe_shared_expert_intermediate_size": 20},
    {"moe_shared_expert_intermediate_size": 20, "moe_shared_expert_gate": True},
]
ROUTERS: list[dict[str, Any]] = [
    {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    {"moe_router_topk": 2, "moe_aux_loss_coeff": [0.01]},
    {"moe_router_topk": 4},
]


def _measure(ep: int, options: dict[str, Any]) -> tuple[int, SavedBytes]:
    """Bytes that a layer of these options keeps, and what the formula says."""
    config = moe_config(**options)
    plain = moe_config(**{key: value for key, value in options.items() if key != "bf16"})
    layer = make_layer(config, make_groups(ep), make_reference(plain))
    leaf = make_tokens(T, getattr(torch, config.params_dtype_name), dist.get_rank())
    tokens = leaf.view(T, 1, H) * 1.0  # as after a norm
    sizes: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _, args: sizes.extend(args[1].tolist()))
    with kept_for_backward(layer) as found:
        output, _ = layer(tokens, ForwardContext())
    kept = sum((found | kept_on_nodes(output)).values())
    output.float().sum().backward()  # it must have been a forward that can be differentiated
    return kept, saved_bytes(config, T, sizes, ranks=ep, on_cpu=True)


def _formula(ep: int) -> None:
    for dtype, router, shared, backend, activation in product(
        ({}, {"bf16": True}, {"fp64": True}),
        ROUTERS,
        SHARED,
        ("auto", "torch_native"),
        ("swiglu", "gelu", "gpt_oss"),
    ):
        options = {**dtype, **router, **shared, "swiglu": False, **OPTIONS[activation]}
        measured, formula = _measure(ep, options | {"moe_grouped_mm_backend": backend})
        assert measured == formula.total, (options, backend, measured, formula)


@pytest.mark.parametrize("ep", [1, 2])
def test_the_formula_is_what_a_layer_keeps_to_the_byte(ep):
    run_ranks(_formula, ep, ep)


def _usual() -> None:
    for topk, bf16 in product((1, 2, 4), (False, True)):
        options = {"moe_router_topk": topk, "moe_router_pre_softmax": True, "bf16": bf16}
        dtype = torch.bfloat16 if bf16 else torch.float32
        for backend in ("auto", "torch_native"):
            config = moe_config(**options, moe_grouped_mm_backend=backend)
            reference = make_reference(
                moe_config(moe_router_topk=topk, moe_router_pre_softmax=True)
            )
            layer = make_layer(config, make_groups(1), reference)
            tokens = make_tokens(400, dtype) * 1.0
            probs, routing_map = layer.router(tokens, ForwardContext())
            bank = layer.experts
            with kept_for_backward(layer) as usual:
                want = standard_experts(tokens, probs, routing_map, bank.weight1, bank.weight2)
            with kept_for_backward(layer) as ours:
                got = layer._routed(tokens, probs, routing_map, (None, None))
            tolerance = 5e-2 if bf16 else 1e-5
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            share = sum((ours | kept_on_nodes(got)).values()) / sum(usual.values())
            assert share < 0.62, f"{options} {backend} {share=}"


def test_less_is_kept_than_with_weighted_expert_outputs():
    run_ranks(_usual, 1)
