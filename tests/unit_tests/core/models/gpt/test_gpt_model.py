"""GPTModel against the written-out reference, and what users rely on."""

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.transformer.forward_context import ForwardContext
from tests.helpers.models import VOCAB, tiny_batch, tiny_config, tiny_gpt
from tests.helpers.tolerances import TOLERANCES
from tests.reference.gpt import gpt_logits, token_losses

SHAPES = {
    "learned, LayerNorm, gelu, biases": {},
    "rope, RMSNorm, swiglu, grouped, untied": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "group_query_attention": True,
        "num_query_groups": 2,
        "untie_embeddings_and_output_weights": True,
    },
    "half rope, one group, wide heads, qkv bias": {
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_base": 100,
        "group_query_attention": True,
        "num_query_groups": 1,
        "kv_channels": 12,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    },
    "no positions, RMSNorm, gelu": {"position_embedding_type": "none", "normalization": "RMSNorm"},
    "learned, swiglu, biases, untied": {
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_every_gradient_equal_the_reference(shape: str, dtype: torch.dtype) -> None:
    config = tiny_config(**SHAPES[shape], fp64=dtype == torch.float64)
    model = tiny_gpt(config, spread=8.0 if dtype == torch.float64 else 3.0)
    ids, positions, labels = tiny_batch(samples=2, length=6)
    weights = {k: v.detach().double().requires_grad_() for k, v in model.named_parameters()}

    loss = model(ids, positions, labels=labels)
    expected = token_losses(gpt_logits(weights, config, ids, positions), labels)
    scale = torch.linspace(0.5, 1.5, labels.numel(), dtype=torch.float64).view_as(labels)
    (loss * scale.to(loss.dtype)).mean().backward()
    (expected * scale).mean().backward()

    torch.testing.assert_close(loss, expected.to(dtype), **TOLERANCES[dtype])
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.grad,
            weights[name].grad.to(dtype),
            **TOLERANCES[dtype],
            msg=lambda m, n=name: f"{n}: {m}",
        )
