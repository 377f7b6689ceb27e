"""Factors, caps, norms and the order of branches in a GPT, against the written-out reference."""

import pytest
import torch

from megatron.core.inference.kv_cache import KVCache
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.torch_norm import LayerNorm, RMSNorm
from tests.helpers.models import MAX_LENGTH, tiny_batch, tiny_config, tiny_gpt
from tests.reference.gpt import gpt_logits, token_losses

FACTORS = {
    "embedding_multiplier": 3.5,
    "residual_multiplier": 0.22,
    "logits_multiplier": 0.3,
    "final_logit_softcapping": 1.5,
}
SHAPES = {
    **{name: {name: value} for name, value in FACTORS.items()},
    "all factors, untied, rope, RMSNorm": {
        **FACTORS,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
    },
    "parallel": {"parallel_residual": True},
    "parallel, one norm": {"parallel_residual": True, "parallel_residual_shared_norm": True},
    "sandwich": {"sandwich_norm": True, "normalization": "RMSNorm"},
    "sandwich, biases, parallel": {"sandwich_norm": True, "parallel_residual": True},
    "gamma about 1": {"layernorm_zero_centered_gamma": True},
    "gamma about 1, RMSNorm": {"layernorm_zero_centered_gamma": True, "normalization": "RMSNorm"},
    "all": {
        **FACTORS,
        "parallel_residual": True,
        "parallel_residual_shared_norm": True,
        "sandwich_norm": True,
        "layernorm_zero_centered_gamma": True,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_logits_and_every_gradient_equal_the_reference(shape: str) -> None:
    config = tiny_config(**SHAPES[shape])
    model = tiny_gpt(config)
    ids, positions, labels = tiny_batch(samples=2, length=6)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}

    loss = model(ids, positions, labels=labels)
    logits = gpt_logits(weights, config, ids, positions)
    expected = token_losses(logits, labels)
    scale = torch.linspace(0.5, 1.5, labels.numel(), dtype=torch.float64).view_as(labels)
    (loss * scale).mean().backward()
    (expected * scale).mean().backward()

    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(loss, expected, **exact)
    torch.testing.assert_close(model(ids, positions), logits, **exact)
    for name, param in model.named_parameters():
        largest = weights[name].grad.abs().max().item()
        assert largest > 0, f"{name} does nothing"
        torch.testing.assert_close(
            param.grad, weights[name].grad, rtol=0, atol=1e-12 * largest, msg=name
        )


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "gamma" not in shape])
def test_every_option_changes_the_loss(shape: str) -> None:
    ids, positions, labels = tiny_batch(samples=1, length=6)
    plain = tiny_gpt(tiny_config())(ids, positions, labels=labels)
    changed = tiny_gpt(tiny_config(**SHAPES[shape]))(ids, positions, labels=labels)
    assert not torch.allclose(plain, changed, rtol=1e-3)


def test_a_norm_about_one_begins_as_the_norm_it_replaces() -> None:
    x = torch.randn(3, 32, dtype=torch.float64)
    plain = RMSNorm(tiny_config(), 32)
    moved = RMSNorm(tiny_config(layernorm_zero_centered_gamma=True), 32)
    assert moved.weight.eq(0).all()
    torch.testing.assert_close(moved(x), plain(x), rtol=1e-14, atol=0)


def test_a_bf16_weight_near_one_keeps_digits_that_a_plain_weight_loses() -> None:
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    options = {"fp64": False, "bf16": True, "layernorm_zero_centered_gamma": True}
    for kind in (RMSNorm, LayerNorm):
        norm = kind(tiny_config(**options), 32)
        with torch.no_grad():
            norm.weight.fill_(0.0009765625)  # 2^-10: 1 + it is 1 in bf16
        x.requires_grad_()
        wide = x.detach().float()
        centred = wide - (wide.mean(-1, keepdim=True) if kind is LayerNorm else 0.0)
        exact = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * 1.0009765625
        out = norm(x)
        out.float().sum().backward()
        assert torch.equal(out, exact.bfloat16())
        assert {p.grad.dtype for p in norm.parameters()} == {torch.bfloat16}


def test_generation_reads_a_cache_with_every_option() -> None:
    config = tiny_config(**SHAPES["all"])
    model = tiny_gpt(config).eval()
    ids, positions, _ = tiny_batch(samples=2, length=6)
    cache = KVCache(
        config.num_layers, 2, MAX_LENGTH, config.query_groups, config.head_dim, torch.float64, "cpu"
    )
    context = ForwardContext(kv_cache=cache)
    with torch.no_grad():
        whole = model(ids, positions)
        pieces = [
            model(ids[:, s], positions[:, s], context=context)
            for s in (slice(0, 4), slice(4, 5), slice(5, 6))
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
