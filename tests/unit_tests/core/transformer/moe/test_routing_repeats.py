"""R19: routing is the same to the bit in forward, recompute and after a reload from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router import TopKRouter
from tests.helpers.models import world_of_one
from tests.unit_tests.core.transformer.moe.layers import NUM_EXPERTS, H, make_tokens, moe_config

RULES: list[dict[str, Any]] = [
    *(
        {"moe_router_score_function": score} | more
        for score in ("softmax", "sigmoid", "sqrtsoftplus")
        for more in (
            {"moe_router_topk": 3},
            {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
            {"moe_router_load_balancing_type": ["quantile_balancing"], "moe_aux_loss_coeff": None},
        )
    ),
    {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_input_jitter_eps": 0.1},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_router_load_balancing_type": ["sinkhorn"], "moe_aux_loss_coeff": None},
    {"moe_router_force_load_balancing": True},
    {"moe_router_force_biased": 1.0},
]


def _router(options: dict[str, Any], dtype: torch.dtype, seed: int) -> TopKRouter:
    config = moe_config(**({"moe_aux_loss_coeff": [0.1]} | options))
    config.bf16 = dtype == torch.bfloat16
    router = TopKRouter(config, layer_number=1, pg_collection=world_of_one())
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * 0.3)
    return router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", RULES, ids=lambda o: "-".join(map(str, o.values())))
def test_routing_repeats_to_the_bit(options, dtype, tmp_path: Path):
    router, seen = _router(options, dtype, seed=1), []
    router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    tokens = make_tokens(24, dtype).detach().view(12, 2, H).requires_grad_()
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, router.topk, 1, "cpu")
    context = ForwardContext(rng=SampleRng(3, (7, 8)), moe_metrics=tracker)
    weight = torch.linspace(0.5, 2.0, NUM_EXPERTS)

    def gradient(recompute: bool) -> torch.Tensor:
        if recompute:
            probs = checkpoint(lambda x: router(x, context).probs, tokens, use_reentrant=False)
        else:
            probs = router(tokens, context).probs
        return torch.autograd.grad((probs * weight).sum(), router.weight)[0]

    with set_checkpoint_early_stop(False):  # the hook shall see the recomputed forward
        plain, recomputed = gradient(recompute=False), gradient(recompute=True)
    assert torch.equal(plain, recomputed)
    write_tensors(tmp_path, model_tensors(router), None)
    other = _router(options, dtype, seed=2)
    other.register_forward_hook(lambda module, args, routing: seen.append(routing))
    other(tokens, context)
    read_tensors(tmp_path, model_tensors(other), None, prefixes=("model.",))
    other(tokens, context)
    first, forward, backward, unlike, reloaded = seen
    for again in (forward, backward, reloaded):
        assert torch.equal(first.routing_map, again.routing_map)
        assert torch.equal(first.probs, again.probs)
    if not (router.is_forced or router.forced_std):
        assert not torch.equal(first.routing_map, unlike.routing_map), "the weights decide"
