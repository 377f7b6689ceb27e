"""A GPT written out: one sample at a time, from a dictionary of named weights."""

import math

import torch
from torch import Tensor

from tests.reference.attention import self_attention


def gpt_logits(
    weights: dict[str, Tensor],
    config,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits [b, s, v] of a dense GPT.

    Args:
        weights: By the parameter names of ``GPTModel``.
        config: TransformerConfig.
        input_ids: [b, s].
        position_ids: [b, s].
        attention_mask: bool [b, 1, s, s], True where a query may not look.
    """
    samples = []
    for i in range(len(input_ids)):
        mask = None if attention_mask is None else attention_mask[i, 0]
        samples.append(_sample(weights, config, input_ids[i], position_ids[i], mask))
    return torch.stack(samples)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token, [b, s]."""
    rows = [
        [
            logits[i, t].exp().sum().log() - logits[i, t, labels[i, t]]
            for t in range(labels.shape[1])
        ]
        for i in range(len(labels))
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _sample(
    weights: dict[str, Tensor], config, ids: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    x = weights["embedding.word_embeddings.weight"][ids]
    if config.position_embedding_type == "learned_absolute":
        x = x + weights["embedding.position_embeddings.weight"][positions]
    rotary = None
    if config.position_embedding_type == "rope":
        rotary = (config.rotary_percent, config.rotary_base)
    for n in range(config.num_layers):
        layer = _below(weights, f"decoder.layers.{n}.")
        x = x + self_attention(
            norm(x, _below(layer, "input_layernorm."), config),
            _below(layer, "self_attention."),
            heads=config.num_attention_heads,
            groups=config.query_groups,
            mask=mask,
            rotary=rotary,
            window=config.attention_window_of(n),
            scale=config.softmax_scale,
            softcap=config.attn_logit_softcapping,
            sink=x.new_zeros(()) if config.softmax_type == "off-by-one" else None,
        )
        x = x + mlp(
            norm(x, _below(layer, "pre_mlp_layernorm."), config), _below(layer, "mlp."), config
        )
    x = norm(x, _below(weights, "decoder.final_layernorm."), config)
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return x @ head.T


def norm(x: Tensor, weights: dict[str, Tensor], config) -> Tensor:
    """LayerNorm or RMSNorm of x [s, h]."""
    if config.normalization == "RMSNorm":
        scale = (x.square().mean(dim=-1, keepdim=True) + config.layernorm_epsilon).sqrt()
        return x / scale * weights["weight"]
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    return centred / scale * weights["weight"] + weights["bias"]


def mlp(x: Tensor, weights: dict[str, Tensor], config) -> Tensor:
    """Dense MLP of x [s, h]."""
    inner = x @ weights["linear_fc1.weight"].T + weights.get("linear_fc1.bias", 0.0)
    if config.swiglu:
        gate, up = inner[:, : config.ffn_size], inner[:, config.ffn_size :]
        inner = gate * torch.sigmoid(gate) * up
    else:
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ weights["linear_fc2.weight"].T + weights.get("linear_fc2.bias", 0.0)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
