"""Stretched rotary positions: the sentences of the papers, and what transformers computes."""

from typing import Any

import pytest
import torch

from megatron.core.transformer.rotary_frequencies import rotary_frequencies, yarn_mscale
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.models import tiny_config
from tests.reference import rotary as reference

GROWING = [1.0 + 0.1 * pair for pair in range(48)]
GROWN = [1.0 + 1.3 * pair for pair in range(48)]

# name -> (channels of a head, longest length, our options, their rope_parameters)
REAL: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "Llama 2, linear": (
        *(128, 16384),
        {"rotary_seq_len_interpolation_factor": 4},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "Llama 3.1": (
        *(128, 131072),
        {"rotary_base": 500000.0, "use_rope_scaling": True},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Llama 3.2": (
        *(64, 131072),
        {
            "rotary_base": 500000.0,
            "rope_scaling_type": "llama3",
            "rope_scaling_factor": 32.0,
            "rope_scaling_low_freq_factor": 1.5,
            "rope_scaling_high_freq_factor": 5.0,
            "rope_scaling_original_max_position_embeddings": 4096,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Qwen2.5": (
        *(128, 131072),
        {
            "position_embedding_type": "yarn",
            "rotary_base": 1000000.0,
            "rope_scaling_factor": 4.0,
            "rope_scaling_original_max_position_embeddings": 32768,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "DeepSeek-V2": (
        *(64, 163840),
        {
            "rope_type": "yarn",
            "rope_scaling_factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "DeepSeek-V3 with unlike weights": (
        *(64, 163840),
        {
            "rope_type": "yarn",
            "rope_scaling_factor": 40.0,
            "yarn_beta_fast": 24.0,
            "yarn_beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 24,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 4096,
        },
    ),
    "GPT-OSS": (
        *(64, 131072),
        {
            "position_embedding_type": "yarn",
            "rotary_base": 150000.0,
            "rope_scaling_factor": 32.0,
            "yarn_correction_range_round_to_int": False,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "YaRN with a factor of attention": (
        *(96, 8192),
        {
            "position_embedding_type": "yarn",
            "rotary_percent": 0.5,
            "rope_scaling_factor": 2.0,
            "rope_attention_factor": 1.25,
        },
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "attention_factor": 1.25,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Phi-3": (
        *(96, 131072),
        {
            "rope_scaling_type": "longrope",
            "rope_scaling_original_max_position_embeddings": 4096,
            "longrope_short_factor": GROWING,
            "longrope_long_factor": GROWN,
        },
        {
            "rope_type": "longrope",
            "short_factor": GROWING,
            "long_factor": GROWN,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Phi-4-mini": (
        *(128, 131072),
        {
            "rotary_percent": 0.75,
            "rope_scaling_type": "longrope",
            "rope_scaling_factor": 32.0,
            "rope_scaling_original_max_position_embeddings": 4096,
            "longrope_short_factor": GROWING,
            "longrope_long_factor": GROWN,
        },
        {
            "rope_type": "longrope",
            "short_factor": GROWING,
            "long_factor": GROWN,
            "factor": 32.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
        },
    ),
}


def _config(channels: int, longest: int, options: dict[str, Any]) -> TransformerConfig:
    defaults = {
        "hidden_size": 4 * channels,
        "position_embedding_type": "rope",
        "max_position_embeddings": longest,
    }
    config = tiny_config(**(defaults | options))
    config.check()
    return config


def _theirs(channels: int, longest: int, parameters: dict[str, Any], length: int | None) -> Any:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * channels,
        num_attention_heads=4,
        head_dim=channels,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": 10000.0} | parameters,
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)


@pytest.mark.parametrize("length", [4096, 5000])
@pytest.mark.parametrize("model", REAL)
def test_frequencies_are_those_of_transformers(model: str, length: int) -> None:
    channels, longest, options, parameters = REAL[model]
    speeds, magnitude = _theirs(channels, longest, parameters, length)
    config = _config(channels, longest, options)
    found = rotary_frequencies(config, config.rotary_dim, is_long=config.rope_is_long(length))
    assert found.magnitude == pytest.approx(magnitude, rel=1e-6)
    torch.testing.assert_close(found.speeds, speeds.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [4096, 5000])
@pytest.mark.parametrize("model", [*REAL, "ntk", "none"])
def test_frequencies_are_those_of_the_papers(model: str, length: int) -> None:
    others = {"ntk": {"rope_scaling_type": "ntk", "rope_scaling_factor": 3.5}, "none": {}}
    channels, longest, options = REAL[model][:3] if model in REAL else (32, 999, others[model])
    config = _config(channels, longest, options)
    dim = config.rotary_dim
    found = rotary_frequencies(config, dim, is_long=config.rope_is_long(length))
    wanted = [reference.speed(config, dim, pair, length) for pair in range(dim // 2)]
    assert found.speeds.tolist() == pytest.approx(wanted, rel=1e-13)
    assert found.magnitude == pytest.approx(reference.magnitude(config), rel=1e-15)


def test_ntk_is_the_dynamic_one_of_transformers_at_one_length() -> None:
    # at 3 times the longest length their factor 2 stretches by 2 * 3 - (2 - 1) = 5
    speeds, _ = _theirs(64, 1000, {"rope_type": "dynamic", "factor": 2.0}, 3000)
    config = _config(64, 1000, {"rope_scaling_type": "ntk", "rope_scaling_factor": 5.0})
    found = rotary_frequencies(config, config.rotary_dim)
    torch.testing.assert_close(found.speeds, speeds.double(), rtol=1e-6, atol=0)


def test_yarn_grows_with_the_logarithm_of_the_factor() -> None:
    assert yarn_mscale(40.0) == pytest.approx(1.3688879454113936)  # DeepSeek-V3's, squared 1.8739
    assert yarn_mscale(40.0, 0.0) == 1.0
    assert yarn_mscale(0.5, 2.0) == 1.0
