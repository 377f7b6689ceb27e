"""Our latent attention is that of transformers' DeepSeek models, with the same weights by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_mla_spec
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.models import world_of_one

pytest.importorskip("transformers")
from transformers.models.deepseek_v2 import configuration_deepseek_v2 as config_v2
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import configuration_deepseek_v3 as config_v3
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

HIDDEN, HEADS, LENGTH, SAMPLES = 24, 3, 40, 2
NAMES = {
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
    "o_proj": "linear_proj",
}
FAMILIES = {
    "v2": (config_v2.DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
    "v3": (config_v3.DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
}


def their_config(family: str, *, q_lora_rank: int | None, bias: bool, **rope: Any) -> Any:
    return FAMILIES[family][0](
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=8,
        v_head_dim=5,
        attention_bias=bias,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | rope,
        attn_implementation="eager",
    )


def our_config(*, q_lora_rank: int | None, bias: bool, **options: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        multi_latent_attention=True,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=10,
        qk_head_dim=6,
        qk_pos_emb_head_dim=8,
        v_head_dim=5,
        position_embedding_type="rope",
        rotary_interleaved=True,
        add_bias_linear=False,
        add_qkv_bias=bias,
        add_proj_bias=bias,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        **options,
    )


def theirs(family: str, config: Any, x: Tensor) -> tuple[Tensor, dict[str, torch.nn.Parameter]]:
    """Their output [b, s, h], and their parameters by our names."""
    _, attention_class, rotary_class = FAMILIES[family]
    torch.manual_seed(5)
    attention = attention_class(config, layer_idx=0).to(x.dtype)
    with torch.no_grad():
        for param in attention.parameters():
            param.copy_(torch.randn_like(param) * 0.5)
    places = torch.arange(LENGTH)[None].expand(SAMPLES, -1)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu_(1)
    mask = torch.zeros(LENGTH, LENGTH, dtype=x.dtype).masked_fill_(later, float("-inf"))
    out = attention(
        hidden_states=x,
        position_embeddings=rotary_class(config)(x, places),
        attention_mask=mask[None, None],
    )[0]
    params = {
        NAMES[name.rpartition(".")[0]] + "." + name.rpartition(".")[2]: param
        for name, param in attention.named_parameters()
    }
    return out, params


def ours(config: TransformerConfig, weights: dict[str, torch.nn.Parameter], x: Tensor) -> Any:
    """Our output [b, s, h], and our parameters."""
    attention = build_module(
        get_mla_spec(config), config, layer_number=0, pg_collection=world_of_one()
    ).to(x.dtype)
    params = dict(attention.named_parameters())
    assert params.keys() == weights.keys()
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
    out, bias = attention(x.transpose(0, 1), None, rotary_tables(config, x), ForwardContext())
    out = out if bias is None else out + bias
    return out.transpose(0, 1), params


def rotary_tables(config: TransformerConfig, x: Tensor) -> Any:
    embedding = RotaryEmbedding(
        config, channels=config.rotary_channels, rotary_dim=config.rotary_dim
    )
    return embedding((range(LENGTH),), x, length=LENGTH)


CASES = [
    (family, rank, bias)
    for family in FAMILIES
    for rank, bias in ((None, False), (12, False), (12, True))
]


def compare(family: str, our: TransformerConfig, their: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, LENGTH, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    want, their_params = theirs(family, their, x)
    got, our_params = ours(our, their_params, x)
    # their norms and rotations compute in fp32 whatever the dtype
    bound = 1e-5
    assert (got - want).abs().max() <= bound * want.abs().max()
    weight = torch.randn(want.shape, generator=generator, dtype=dtype)
    names = sorted(our_params)
    want_grads = torch.autograd.grad(
        (want * weight).sum(), [x, *(their_params[name] for name in names)]
    )
    got_grads = torch.autograd.grad(
        (got * weight).sum(), [x, *(our_params[name] for name in names)]
    )
    for name, mine, other in zip(["x", *names], got_grads, want_grads, strict=True):
        error = (mine - other).abs().max() / other.abs().max()
        assert error <= bound, f"gradient of {name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "rank", "bias"), CASES)
def test_outputs_and_gradients_are_theirs(family, rank, bias, dtype):
    their = their_config(family, q_lora_rank=rank, bias=bias)
    compare(family, our_config(q_lora_rank=rank, bias=bias), their, dtype)


@pytest.mark.parametrize("mscales", [(1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_stretched_positions_are_theirs(family, mscales):
    mscale, all_dim = mscales
    their = their_config(
        family,
        q_lora_rank=12,
        bias=False,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=32,
        beta_slow=1,
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    our = our_config(
        q_lora_rank=12,
        bias=False,
        rope_type="yarn",
        rope_scaling_factor=4.0,
        rope_scaling_original_max_position_embeddings=16,
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    compare(family, our, their, torch.float32)
