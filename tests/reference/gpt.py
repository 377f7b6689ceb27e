"""A GPT written out: one sample at a time, from a dictionary of named weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.activations import ReferenceActivation
from tests.reference.attention import self_attention
from tests.reference.rotary import rotation


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
    x = weights["embedding.word_embeddings.weight"][ids] * config.embedding_multiplier
    if config.position_embedding_type == "learned_absolute":
        x = x + weights["embedding.position_embeddings.weight"][positions]
    rotate = rotation(config, len(ids))
    for n in range(config.num_layers):
        layer = _below(weights, f"decoder.layers.{n}.")
        attended = self_attention(
            norm(x, _below(layer, "input_layernorm."), config),
            _below(layer, "self_attention."),
            heads=config.num_attention_heads,
            groups=config.query_groups,
            mask=mask,
            rotate=rotate,
            norm_qk=qk_norms(_below(layer, "self_attention."), config),
            window=config.attention_window_of(n),
            scale=config.softmax_scale,
            softcap=config.attn_logit_softcapping,
            sink=x.new_zeros(()) if config.softmax_type == "off-by-one" else None,
        )
        if config.sandwich_norm:
            attended = norm(attended, _below(layer, "post_self_attn_layernorm."), config)
        between = x if config.parallel_residual else x + config.residual_multiplier * attended
        before_mlp = (
            "input_layernorm." if config.parallel_residual_shared_norm else "pre_mlp_layernorm."
        )
        transformed = mlp(
            norm(between, _below(layer, before_mlp), config), _below(layer, "mlp."), config
        )
        if config.sandwich_norm:
            transformed = norm(transformed, _below(layer, "post_mlp_layernorm."), config)
        x = x + config.residual_multiplier * (attended + transformed)
    x = norm(x, _below(weights, "decoder.final_layernorm."), config)
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    logits = x @ head.T * config.logits_multiplier
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def norm(x: Tensor, weights: dict[str, Tensor], config) -> Tensor:
    """LayerNorm or RMSNorm of x [s, h]."""
    weight = weights["weight"] + (1.0 if config.layernorm_zero_centered_gamma else 0.0)
    if config.normalization == "RMSNorm":
        scale = (x.square().mean(dim=-1, keepdim=True) + config.layernorm_epsilon).sqrt()
        return x / scale * weight
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    return centred / scale * weight + weights["bias"]


def qk_norms(weights: dict[str, Tensor], config) -> Callable | None:
    """Norms of queries [s, heads, d] and keys [s, groups, d], of each head or of all at once."""
    if not config.qk_layernorm:
        return None
    q_norm, k_norm = _below(weights, "q_layernorm."), _below(weights, "k_layernorm.")

    def of_all(x: Tensor, norm_weights: dict[str, Tensor]) -> Tensor:
        rows = x if config.qk_layernorm_scope == "head" else x.flatten(1)
        return norm(rows, norm_weights, config).view(x.shape)

    return lambda query, key: (of_all(query, q_norm), of_all(key, k_norm))


def mlp(x: Tensor, weights: dict[str, Tensor], config) -> Tensor:
    """Dense MLP of x [s, h]."""
    inner = x @ weights["linear_fc1.weight"].T + weights.get("linear_fc1.bias", 0.0)
    inner = ReferenceActivation(*config.activation_kind)(inner)
    return inner @ weights["linear_fc2.weight"].T + weights.get("linear_fc2.bias", 0.0)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
