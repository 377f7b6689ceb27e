"""The GPT with experts that one writes by hand in plain torch, with care for speed."""

import torch
from torch import Tensor, nn

from tools.bench.moe_contenders import TextbookLoop
from tools.bench.step_weights import MixtralWeights


class TextbookGPT(nn.Module):
    """Embedding, layers, norm, output layer; dtype and weights are those of ``weights``."""

    def __init__(self, weights: MixtralWeights) -> None:
        """Copy the weights."""
        super().__init__()
        config, tensors = weights.config, weights.tensors
        self.embedding = nn.Embedding(
            *tensors["model.embed_tokens.weight"].shape,
            _weight=tensors["model.embed_tokens.weight"].clone(),
        )
        self.layers = nn.ModuleList(Layer(weights, number) for number in range(weights.num_layers))
        self.norm = norm_of(tensors["model.norm.weight"], config["rms_norm_eps"])
        self.head = linear_of(tensors["lm_head.weight"])
        width = config["hidden_size"] // config["num_attention_heads"]
        self.register_buffer(
            "angles", rotary_angles(width, config["max_position_embeddings"], config["rope_theta"])
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [b, s, v] of tokens [b, s]."""
        hidden = self.embedding(tokens)
        angles = self.angles[: tokens.shape[1]]
        cos, sin = (f.to(hidden.dtype) for f in (angles.cos(), angles.sin()))
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return self.head(self.norm(hidden))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss."""
        logits = self(tokens).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, labels.flatten())


class Layer(nn.Module):
    """Attention and experts, each behind a norm and around a residual."""

    def __init__(self, weights: MixtralWeights, number: int) -> None:
        """Copy the weights of layer ``number``."""
        super().__init__()
        config, prefix = weights.config, f"model.layers.{number}."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.tensors.items()
            if name.startswith(prefix)
        }
        self.heads = config["num_attention_heads"]
        eps = config["rms_norm_eps"]
        self.norm1 = norm_of(tensors["input_layernorm.weight"], eps)
        self.norm2 = norm_of(tensors["post_attention_layernorm.weight"], eps)
        self.qkv = linear_of(torch.cat([tensors[f"self_attn.{k}_proj.weight"] for k in "qkv"]))
        self.out = linear_of(tensors["self_attn.o_proj.weight"])
        gate = tensors["block_sparse_moe.gate.weight"].clone()
        self.experts = TextbookLoop(gate, *weights.experts(number), config["num_experts_per_tok"])

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply to [b, s, h]."""
        hidden = hidden + self.attention(self.norm1(hidden), cos, sin)
        normed = self.norm2(hidden).flatten(0, 1).unsqueeze(1)  # [b * s, 1, h]
        return hidden + self.experts(normed).view_as(hidden)

    def attention(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Let each position look at those before it."""
        batch, length, _ = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()  # [b, heads, s, d]
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotary_angles(width: int, length: int, base: float) -> Tensor:
    """Return the angles by which channels turn, [length, width] fp32."""
    speed = base ** (-torch.arange(0, width, 2) / width)
    return torch.outer(torch.arange(length), speed).repeat(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels, half a head apart, by their position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def linear_of(weight: Tensor) -> nn.Linear:
    """Return a product with a copy of ``weight``, without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


def norm_of(weight: Tensor, eps: float) -> nn.RMSNorm:
    """Return a norm with a copy of ``weight``."""
    norm = nn.RMSNorm(len(weight), eps=eps, device="meta")
    norm.weight = nn.Parameter(weight.clone())
    return norm
