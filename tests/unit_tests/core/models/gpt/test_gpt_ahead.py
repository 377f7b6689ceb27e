"""Multi-token prediction of a GPT against the written-out reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.tokens_ahead import AheadOfStep, look_ahead
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt
from tests.reference.gpt import gpt_logits, token_losses
from tests.reference.mtp import mtp_loss_sums

SHAPES: dict[str, dict[str, Any]] = {
    "tied, learned": {"mtp_num_layers": 2},
    "untied, rope": {
        "mtp_num_layers": 1,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
    },
    "factors, sandwich": {
        "mtp_num_layers": 2,
        "embedding_multiplier": 2.5,
        "logits_multiplier": 0.5,
        "residual_multiplier": 0.5,
        "sandwich_norm": True,
        "layernorm_zero_centered_gamma": True,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_every_gradient_equal_the_reference(shape: str) -> None:
    config = tiny_config(**SHAPES[shape], num_layers=1)
    model = tiny_gpt(config)
    ids, positions, labels = tiny_batch(samples=2, length=6)
    loss_mask = torch.ones(2, 6, dtype=torch.float64)
    loss_mask[0, 3] = loss_mask[1, 5] = 0
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    weigh = torch.tensor([0.3, 0.07], dtype=torch.float64)[: config.mtp_depths]
    ids_ahead, mask = look_ahead(ids, positions, labels, loss_mask, None, depths=config.mtp_depths)
    sums = torch.zeros(config.mtp_depths, dtype=torch.float64)
    ahead = AheadOfStep(ids=ids_ahead, mask=mask, weights=weigh, sums=sums)

    loss = model(ids, positions, labels=labels, context=ForwardContext(ahead=ahead))
    (loss * loss_mask).sum().backward()
    main = token_losses(gpt_logits(weights, config, ids, positions), labels)
    want, counts = mtp_loss_sums(
        weights, config, ids, positions, labels, loss_mask, torch.zeros_like(ids)
    )
    total = (main * loss_mask).sum()
    for one, weight in zip(want, weigh, strict=True):
        total = total + weight * one
    total.backward()

    torch.testing.assert_close(loss, main, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, torch.stack(want).detach(), rtol=1e-12, atol=1e-12)
    assert mask.sum(dim=(0, 1)).tolist() == counts
    for name, param in model.named_parameters():
        largest = weights[name].grad.abs().max().item()
        assert largest > 0, f"{name} does nothing"
        torch.testing.assert_close(
            param.grad, weights[name].grad, rtol=0, atol=1e-12 * largest, msg=name
        )


def test_without_tokens_ahead_a_model_computes_what_it_computes_without_depths() -> None:
    ids, positions, labels = tiny_batch()
    plain = tiny_gpt(tiny_config())
    model = tiny_gpt(tiny_config(mtp_num_layers=1))
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(ids, positions, labels=labels), plain(ids, positions, labels=labels))
    assert torch.equal(model(ids, positions), plain(ids, positions))


def test_parameter_names_are_the_documented_ones() -> None:
    config = tiny_config(
        mtp_num_layers=1, normalization="RMSNorm", add_bias_linear=False, num_moe_experts=2
    )
    config = replace(config, moe_router_topk=1, moe_router_pre_softmax=True)
    names = [name for name, _ in tiny_gpt(config).named_parameters() if name.startswith("mtp.")]
    assert [name.removeprefix("mtp.layers.0.") for name in names] == [
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "transformer_layer.input_layernorm.weight",
        "transformer_layer.self_attention.linear_qkv.weight",
        "transformer_layer.self_attention.linear_proj.weight",
        "transformer_layer.pre_mlp_layernorm.weight",
        "transformer_layer.mlp.router.weight",
        "transformer_layer.mlp.experts.weight1",
        "transformer_layer.mlp.experts.weight2",
        "final_layernorm.weight",
    ]
