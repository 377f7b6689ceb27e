"""Latent attention of one process against attention written out: outputs and every gradient."""

import math

import pytest
import torch
from torch import Tensor

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_mla_spec
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.rotary_frequencies import rotary_frequencies
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.models import tiny_config, world_of_one
from tests.reference.mla import latent_attention, plain_frequencies

LENGTH, SAMPLES = 7, 2
MLA = {
    "multi_latent_attention": True,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_head_dim": 5,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_interleaved": True,
    "add_bias_linear": False,
}
CASES = {
    "with a latent of queries": {},
    "queries from hidden states": {"q_lora_rank": None},
    "with biases": {"add_qkv_bias": True, "add_proj_bias": True},
    "narrow values": {"v_head_dim": 2},
    "a scale of one's own": {"softmax_scale": 0.7},
    "yarn": {
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_scaling_original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
}


def make_attention(**options: object) -> tuple[TransformerConfig, MLASelfAttention]:
    """A layer's attention with weights so large that every part matters."""
    config = tiny_config(**(MLA | options))
    torch.manual_seed(3)
    attention = build_module(
        get_mla_spec(config), config, layer_number=0, pg_collection=world_of_one()
    )
    with torch.no_grad():
        for param in attention.parameters():
            param.copy_(torch.randn_like(param) * (0.5 if param.dim() > 1 else 1.0))
    return config, attention


def attend(config: TransformerConfig, attention: MLASelfAttention, x: Tensor) -> Tensor:
    """Attend with ``x`` [s, b, h] as a layer does; the bias of the way out is added."""
    tables = RotaryEmbedding(config, channels=config.rotary_channels, rotary_dim=config.rotary_dim)
    rotary = tables((range(len(x)),), x, length=len(x))
    out, bias = attention(x, None, rotary, ForwardContext())
    return out if bias is None else out + bias


def reference(config: TransformerConfig, attention: MLASelfAttention, x: Tensor) -> Tensor:
    weights = dict(attention.named_parameters())
    frequencies = plain_frequencies(config.qk_pos_emb_head_dim, 10000.0)
    scale = (config.qk_head_dim + config.qk_pos_emb_head_dim) ** -0.5
    if config.rope_scaling == "yarn":
        frequencies = rotary_frequencies(config, config.qk_pos_emb_head_dim).speeds.tolist()
        scale *= (1 + 0.1 * 0.7 * math.log(4.0)) ** 2
    samples = [
        latent_attention(
            x[:, sample],
            weights,
            heads=config.num_attention_heads,
            widths=(config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim),
            frequencies=frequencies,
            scale=scale if config.softmax_scale is None else config.softmax_scale,
        )
        for sample in range(x.shape[1])
    ]
    return torch.stack(samples, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_attention_written_out(case):
    config, attention = make_attention(**CASES[case])
    x = torch.randn(LENGTH, SAMPLES, config.hidden_size, dtype=torch.float64, requires_grad=True)
    params = dict(attention.named_parameters())
    outputs, gradients = [], []
    for way in (attend, reference):
        out = way(config, attention, x)
        outputs.append(out)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients.append(torch.autograd.grad((out * weight).sum(), [x, *params.values()]))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for name, mine, theirs in zip(["x", *params], *gradients, strict=True):
        error = (mine - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-12, f"gradient of {name}: {error}"


def test_parameters_have_megatrons_names_and_shapes():
    _, attention = make_attention(add_qkv_bias=True, add_proj_bias=True)
    hidden, heads = 32, 3
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "linear_q_down_proj.weight": (10, hidden),
        "linear_q_down_proj.bias": (10,),
        "q_layernorm.weight": (10,),
        "linear_q_up_proj.weight": (heads * (5 + 4), 10),
        "linear_kv_down_proj.weight": (6 + 4, hidden),
        "linear_kv_down_proj.bias": (6 + 4,),
        "kv_layernorm.weight": (6,),
        "linear_kv_up_proj.weight": (heads * (5 + 7), 6),
        "linear_proj.weight": (hidden, heads * 7),
        "linear_proj.bias": (hidden,),
    }
    _, attention = make_attention(q_lora_rank=None)
    names = [name for name, _ in attention.named_parameters() if "_q_" in name]
    assert names == ["linear_q_proj.weight"]


@pytest.mark.parametrize("modules", [["mla_up_proj"], ["core_attn"], ["mla_up_proj", "core_attn"]])
def test_what_is_recomputed_gives_the_same_bits(modules):
    selective = {"recompute_granularity": "selective", "recompute_modules": modules}
    found = []
    for options in ({}, selective):
        config, attention = make_attention(**options)
        x = torch.randn(
            *(LENGTH, SAMPLES, config.hidden_size), dtype=torch.float64, requires_grad=True
        )
        out = attend(config, attention, x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, recomputed)


def test_recomputing_the_way_up_keeps_no_queries_keys_and_values():
    kept = {}
    for modules in (["core_attn"], ["mla_up_proj"]):
        config, attention = make_attention(
            recompute_granularity="selective", recompute_modules=modules
        )
        x = torch.randn(
            *(LENGTH, SAMPLES, config.hidden_size), dtype=torch.float64, requires_grad=True
        )
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attend(config, attention, x)
        kept[modules[0]] = sum(saved.values())
    per_token = 3 * (2 * (5 + 4) + 7) * 8  # queries, keys and values of all heads, fp64
    assert kept["core_attn"] - kept["mla_up_proj"] >= LENGTH * SAMPLES * per_token
