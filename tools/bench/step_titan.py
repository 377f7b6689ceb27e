"""torchtitan's own GPT with experts, where it is installed, with our weights.

Its decoder, attention, router, dispatcher and experts, assembled as its Qwen3 models are, without
norms of queries and keys, which bench-S has not, and with its SDPA module, since its other two
need a GPU. Its experts compute in bf16 whatever the model is, so in fp32 they are replaced by the
same three grouped products in fp32.
"""

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.step_ours import Size
from tools.bench.step_weights import MixtralWeights

_PARTS = "torchtitan.models.common"


@functools.cache
def why_no_titan() -> str | None:
    """Return why torchtitan cannot take part, None if it can."""
    try:
        for module in ("moe", "attention", "rope", "config_utils"):
            importlib.import_module(f"{_PARTS}.{module}")
        importlib.import_module("torchtitan.models.qwen3.model")
    except ImportError as error:
        return f"torchtitan cannot be imported ({error}; pip install torchtitan)"
    return None


def titan_model(weights: MixtralWeights, size: Size) -> nn.Module:
    """Return its model with our weights."""
    # its router asks for autocast to fp32, which a CPU has not: it then scores in the model's dtype
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")
    model = _config(weights, size).build()
    model._init_self_buffers()
    for param in model.parameters():
        param.data = param.data.to(weights.dtype)  # buffers stay fp32
    if weights.dtype == torch.float32:
        for module in model.modules():
            if type(module).__name__ == "GroupedExperts":
                module.forward = functools.partial(_experts_in_fp32, module)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in _tensors(weights).items():
            named.pop(name).copy_(value)
    assert not named, f"parameters without a weight: {list(named)}"
    return model


def _config(weights: MixtralWeights, size: Size) -> Any:
    parts = {
        name: importlib.import_module(f"{_PARTS}.{name}")
        for name in ("attention", "config_utils", "embedding", "linear", "nn_modules", "rope")
    }
    qwen = importlib.import_module("torchtitan.models.qwen3.model")
    hidden, vocabulary = weights.config["hidden_size"], weights.config["vocab_size"]
    norm = parts["nn_modules"].RMSNorm.Config(
        normalized_shape=hidden, eps=weights.config["rms_norm_eps"], param_init={}
    )
    attention, moe = _branches(parts, weights, size)
    layer = qwen.Qwen3TransformerBlock.Config(
        attention_norm=norm, ffn_norm=norm, attention=attention, moe=moe
    )
    linear, embedding = parts["linear"].Linear, parts["embedding"].Embedding
    return qwen.Qwen3Model.Config(
        dim=hidden,
        vocab_size=vocabulary,
        lm_head=linear.Config(in_features=hidden, out_features=vocabulary),
        tok_embeddings=embedding.Config(num_embeddings=vocabulary, embedding_dim=hidden),
        norm=norm,
        layers=[layer] * weights.num_layers,
    )


def _branches(parts: dict[str, Any], weights: MixtralWeights, size: Size) -> tuple[Any, Any]:
    """Return the configurations of attention and experts of a layer."""
    make, config = parts["config_utils"], weights.config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    experts, topk = config["num_local_experts"], config["num_experts_per_tok"]
    attention = make.make_gqa_config(
        dim=hidden,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=hidden // heads,
        wqkv_param_init={},
        wo_param_init={},
        inner_attention=parts["attention"].ScaledDotProductAttention.Config(),
        fuse_qkv=True,
        rope=parts["rope"].CosSinRoPE.Config(
            dim=hidden // heads, max_seq_len=size.sequence, theta=config["rope_theta"]
        ),
    )
    moe = make.make_moe_config(
        num_experts=experts,
        router=make.make_router_config(
            dim=hidden,
            num_experts=experts,
            gate_param_init={},
            top_k=topk,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=make.make_routed_experts_config(
            dim=hidden,
            hidden_dim=config["intermediate_size"],
            num_experts=experts,
            top_k=topk,
            param_init={},
            comm_backend="standard",
        ),
        load_balance_coeff=None,
    )
    return attention, moe


def _tensors(weights: MixtralWeights) -> dict[str, Tensor]:
    """Return our weights under the names of its parameters."""
    plain = weights.tensors
    found = {
        "tok_embeddings.weight": plain["model.embed_tokens.weight"],
        "norm.weight": plain["model.norm.weight"],
        "lm_head.weight": plain["lm_head.weight"],
    }
    for layer in range(weights.num_layers):
        theirs, ours = f"layers.{layer}.", f"model.layers.{layer}."
        found[f"{theirs}attention_norm.weight"] = plain[f"{ours}input_layernorm.weight"]
        found[f"{theirs}ffn_norm.weight"] = plain[f"{ours}post_attention_layernorm.weight"]
        found[f"{theirs}attention.wo.weight"] = plain[f"{ours}self_attn.o_proj.weight"]
        found[f"{theirs}attention.qkv_linear.wqkv.weight"] = _by_head(weights, ours)
        found[f"{theirs}moe.router.gate.weight"] = plain[weights.gate_name(layer)]
        experts = [weights.expert(layer, number) for number in range(weights.num_experts)]
        stacks = (torch.stack(matrices) for matrices in zip(*experts, strict=True))
        for name, stack in zip(("w1_EFD", "w3_EFD", "w2_EDF"), stacks, strict=True):
            found[f"{theirs}moe.routed_experts.inner_experts.{name}"] = stack
    return found


def _by_head(weights: MixtralWeights, prefix: str) -> Tensor:
    """Return one matrix for queries, keys and values, head after head, [3 h, h]."""
    heads = weights.config["num_attention_heads"]
    matrices = [weights.tensors[f"{prefix}self_attn.{kind}_proj.weight"] for kind in "qkv"]
    return torch.stack([m.unflatten(0, (heads, -1)) for m in matrices], dim=1).flatten(0, 2)


def _experts_in_fp32(module: Any, rows: Tensor, sizes: Tensor) -> Tensor:
    ends = sizes.cumsum(0, dtype=torch.int32)
    gate, up, down = (
        weight.transpose(-2, -1) for weight in (module.w1_EFD, module.w3_EFD, module.w2_EDF)
    )
    inner = nn.functional.silu(torch._grouped_mm(rows, gate, offs=ends))
    inner = inner * torch._grouped_mm(rows, up, offs=ends)
    return torch._grouped_mm(inner, down, offs=ends)
