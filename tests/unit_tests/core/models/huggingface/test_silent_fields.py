"""What a config.json does not say, or says as null, means here what it means in transformers."""

from typing import Any

import pytest
import torch

from megatron.core.models.huggingface.family import FAMILIES, family_named
from megatron.core.models.huggingface.options import model_options
from megatron.core.transformer.rotary_frequencies import rotary_frequencies
from megatron.training.huggingface_family import config_of


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("grok", "smollm3")])
def test_an_empty_config_means_what_it_means_to_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = family_named(name).model_types[0]
    made = transformers.AutoConfig.for_model(kind).to_dict()
    needed = {"num_experts_per_tok": 2} if name == "deepseek_v2" else {}
    said, silent = model_options(made | needed), model_options({"model_type": kind} | needed)
    assert silent == said


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"mscale": 0.7},
        {"mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"attention_factor": None, "beta_fast": None, "beta_slow": None},
        {"truncate": None},
        {"truncate": False},
        {"factor": None},
    ],
)
def test_rotary_parameters_that_are_missing_or_null(said: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rope_scaling": YARN | said,
    }
    theirs = transformers.LlamaConfig(**config)
    speeds, magnitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = config_of(model_options({"model_type": "llama"} | config)).model
    found = rotary_frequencies(ours, 16)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)
    torch.testing.assert_close(found.speeds.float(), speeds, rtol=1e-6, atol=0)
