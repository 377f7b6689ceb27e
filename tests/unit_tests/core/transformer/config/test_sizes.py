"""Sizes that follow from others are properties of the config."""

import pytest

from megatron.core.transformer.transformer_config import TransformerConfig


def _config(**options):
    return TransformerConfig(
        **({"num_layers": 4, "hidden_size": 96, "num_attention_heads": 6} | options)
    )


@pytest.mark.parametrize(
    ("options", "ffn", "moe_ffn"),
    [
        ({}, 384, 384),
        ({"swiglu": True}, 256, 256),
        ({"swiglu": True, "hidden_size": 4096}, 10880, 10880),
        ({"ffn_hidden_size": 100}, 100, 100),
        ({"ffn_hidden_size": 100, "moe_ffn_hidden_size": 7}, 100, 7),
        ({"swiglu": True, "hidden_size": 12}, 64, 64),
    ],
)
def test_mlp_widths(options, ffn, moe_ffn):
    config = _config(**options)
    assert (config.ffn_size, config.moe_ffn_size) == (ffn, moe_ffn)


def test_heads_and_groups():
    assert (_config().head_dim, _config().query_groups) == (16, 6)
    grouped = _config(group_query_attention=True, num_query_groups=2, kv_channels=10)
    assert (grouped.head_dim, grouped.query_groups) == (10, 2)
    assert _config(num_query_groups=2).query_groups == 6


def test_moe_layers():
    assert _config().moe_layer_pattern == (False,) * 4
    assert _config(num_moe_experts=2).moe_layer_pattern == (True,) * 4
    every_other = _config(num_moe_experts=2, moe_layer_freq=2)
    assert every_other.moe_layer_pattern == (True, False, True, False)
    pattern = _config(num_moe_experts=2, moe_layer_freq=[0, 1, 1, 0])
    assert pattern.moe_layer_pattern == (False, True, True, False)
