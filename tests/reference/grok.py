"""Grok-1 written out, from a dictionary of weights: transformers has no such model.

Names of weights are those of the checkpoint that was converted for PyTorch (hpcai-tech/grok-1);
what is computed is what the open weights' own code does (xai-org/grok-1, model.py): scores through
a soft cap, norms before and after each branch, the two best experts by a softmax over all that is
not renormalised, and the tanh form of GELU, which is what `jax.nn.gelu` means.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def grok_logits(weights: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Logits [b, s, v].

    Args:
        weights: By name on disk.
        config: As config.json.
        ids: [b, s].
    """
    x = weights["model.embed_tokens.weight"][ids] * config["embedding_multiplier_scale"]
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        layer = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        branch = _attention(_norm(x, layer["pre_attn_norm.scale"], config), layer, config)
        x = x + _norm(branch, layer["post_attn_norm.scale"], config)
        branch = _experts(_norm(x, layer["pre_moe_norm.scale"], config), layer, config)
        x = x + _norm(branch, layer["post_moe_norm.scale"], config)
    x = _norm(x, weights["model.norm.scale"], config)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return x @ head.T * config["output_multiplier_scale"]


def grok_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors on disk."""
    width, ffn = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.scale": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        norms = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
        shapes |= {f"{layer}{norm}.scale": (width,) for norm in norms}
        rows = {"q_proj": width, "k_proj": kv, "v_proj": kv, "o_proj": width}
        shapes |= {f"{layer}attn.{name}.weight": (size, width) for name, size in rows.items()}
        shapes[f"{layer}moe_block.gate.weight"] = (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            prefix = f"{layer}moe_block.experts.{expert}."
            shapes[f"{prefix}linear.weight"] = (ffn, width)
            shapes[f"{prefix}linear_v.weight"] = (ffn, width)
            shapes[f"{prefix}linear_1.weight"] = (width, ffn)
    return shapes


def _norm(x: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + config["rms_norm_eps"]) * scale


def _attention(x: Tensor, layer: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    length, width = x.shape[1:]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = width // heads
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64),
        10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size),
    )
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # [s, size / 2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    merged = []
    for head in range(heads):
        group = head // (heads // groups)
        query = _turned(x @ _rows(layer["attn.q_proj.weight"], head, size).T, cos, sin)
        key = _turned(x @ _rows(layer["attn.k_proj.weight"], group, size).T, cos, sin)
        value = x @ _rows(layer["attn.v_proj.weight"], group, size).T
        cap = config["max_attn_value"]
        scores = query @ key.transpose(1, 2) * config["attn_output_multiplier"]
        scores = cap * torch.tanh(scores / cap)
        merged.append(scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value)
    out = torch.cat(merged, dim=-1)  # [b, s, h]
    return out @ layer["attn.o_proj.weight"].T


def _rows(weight: Tensor, head: int, size: int) -> Tensor:
    return weight[head * size : (head + 1) * size]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [b, s, size]; a pair is a channel of the first half and its like of the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _experts(x: Tensor, layer: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    probs = (x @ layer["moe_block.gate.weight"].T).softmax(dim=-1)  # [b, s, E]
    best, chosen = probs.topk(config["num_experts_per_tok"], dim=-1)
    weight = torch.zeros_like(probs).scatter(-1, chosen, best)
    form = "none" if config.get("hidden_act") == "gelu" else "tanh"
    out = torch.zeros_like(x)
    for expert in range(config["num_experts"]):
        part = {
            name: layer[f"moe_block.experts.{expert}.{name}.weight"]
            for name in ("linear", "linear_v", "linear_1")
        }
        gate = functional.gelu(x @ part["linear"].T, approximate=form)
        inner = gate * (x @ part["linear_v"].T)
        out = out + weight[..., expert, None] * (inner @ part["linear_1"].T)
    return out
