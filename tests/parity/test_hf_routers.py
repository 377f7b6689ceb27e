"""Routers and whole MoE blocks equal those of transformers, family by family.

Their biases of experts are drawn so wide that biased scores are negative: an expert of a group
that is left out must not come back.
"""

import pytest
import torch
from torch import Tensor, nn

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.param_role import logical_shards, logical_tensors, role_of
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.hf_moe import FAMILIES, FFN, E, H, InFp64, ours_of
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import make_groups, moe_config, relative_error

pytest.importorskip("transformers")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NUM_TOKENS = 64


def _config(name: str, topk: int, dtype: torch.dtype) -> TransformerConfig:
    return moe_config(
        moe_router_topk=topk,
        moe_ffn_hidden_size=FFN,
        fp64=dtype == torch.float64,
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
        moe_router_load_balancing_type=["none"],
        moe_aux_loss_coeff=None,
        **FAMILIES[name].ours,
    )


def _tokens(dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return (torch.randn(NUM_TOKENS, H, generator=rng) * 0.3).to(dtype).requires_grad_()


def _call(module: nn.Module, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if dtype == torch.float64:
        with InFp64():
            return module(tokens)
    return module(tokens)


def _router(name: str) -> None:
    for topk in FAMILIES[name].topks:
        for dtype in TOLERANCE:
            _router_agrees(name, topk, dtype)


def _router_agrees(name: str, topk: int, dtype: torch.dtype) -> None:
    theirs = FAMILIES[name].module("router", topk, dtype)
    config = _config(name, topk, dtype)
    config.check()
    ours = TopKRouter(config, layer_number=0, pg_collection=make_groups())
    weights = ours_of({f"gate.{k}": v for k, v in theirs.state_dict().items()})
    with torch.no_grad():
        for key, value in ours.state_dict().items():
            value.copy_(weights.pop(f"router.{key}"))
    assert not weights
    inputs, wanted_inputs = _tokens(dtype), _tokens(dtype)
    probs, routing_map = ours(inputs.unsqueeze(1), ForwardContext())
    _, chosen_weights, chosen = _call(theirs, wanted_inputs, dtype)
    want = torch.zeros(NUM_TOKENS, E, dtype=dtype).scatter(1, chosen, chosen_weights)
    assert (routing_map.sum(dim=1) == topk).all()
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, chosen, True))
    assert relative_error(probs, want) <= TOLERANCE[dtype]

    cotangent = torch.linspace(-1, 2, E, dtype=dtype)
    (probs * cotangent).sum().backward()
    (want * cotangent).sum().backward()
    assert relative_error(inputs.grad, wanted_inputs.grad) <= TOLERANCE[dtype]
    for key, param in theirs.named_parameters():
        assert relative_error(ours.get_parameter(key).grad, param.grad) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_router_chooses_and_weighs_as_theirs(name: str) -> None:
    FAMILIES[name].module("router", 2, torch.float32)  # imported before the fork
    run_ranks(_router, 1, name)


def _block(name: str) -> None:
    topk = FAMILIES[name].topks[1]
    for dtype in TOLERANCE:
        for bank in ("grouped", "sequential"):
            _block_agrees(name, topk, dtype, bank)


def _block_agrees(name: str, topk: int, dtype: torch.dtype, bank: str) -> None:
    theirs = FAMILIES[name].module("block", topk, dtype)
    config = _config(name, topk, dtype)
    config.moe_experts_type = bank
    layer = build_module(
        get_moe_module_spec(config), config, layer_number=0, pg_collection=make_groups()
    )
    weights = ours_of(theirs.state_dict())
    with torch.no_grad():
        for key, param in layer.named_parameters():
            for shard in logical_shards(key, param, role_of(param)):
                shard.tensor.copy_(_stacked(weights, shard.name)[shard.region])
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(weights["router.expert_bias"])
    inputs, wanted_inputs = _tokens(dtype), _tokens(dtype)
    output, bias = layer(inputs.unsqueeze(1), ForwardContext())  # [s, 1, h]
    assert bias is None
    want = _call(theirs, wanted_inputs.unsqueeze(0), dtype)
    want = want[0] if isinstance(want, tuple) else want
    assert relative_error(output[:, 0], want[0]) <= TOLERANCE[dtype]

    output.square().sum().backward()
    want.square().sum().backward()
    assert relative_error(inputs.grad, wanted_inputs.grad) <= TOLERANCE[dtype]
    wanted = ours_of({key: param.grad for key, param in theirs.named_parameters()})
    for key, param in layer.named_parameters():
        for part, grad in logical_tensors(key, param.grad, role_of(param)):
            assert relative_error(grad, _stacked(wanted, part)) <= TOLERANCE[dtype], part


def _stacked(weights: dict[str, Tensor], name: str) -> Tensor:
    """Return gate or up of a weight that holds both."""
    for number, part in enumerate(("gate", "up")):
        if f".linear_fc1.{part}." in name:
            return weights[name.replace(f".{part}.", ".")].chunk(2)[number]
    return weights[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_computes_and_learns_as_theirs(name: str) -> None:
    FAMILIES[name].module("block", 2, torch.float32)
    run_ranks(_block, 1, name)
