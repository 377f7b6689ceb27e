"""Whichever flags say how positions are stretched, written out they say it in one way."""

from typing import Any

import pytest

from megatron.core.models.huggingface.options import hf_config_of, model_options
from megatron.core.transformer.config.rotary import RotaryConfig, written_out
from megatron.core.transformer.rotary_frequencies import rotary_frequencies

LENGTH = "rope_scaling_original_max_position_embeddings"
ROPE = {"position_embedding_type": "rope"}


@pytest.mark.parametrize(
    ("said", "kind", "factor", "length"),
    [
        (ROPE | {"use_rope_scaling": True}, "llama3", 8.0, 8192),
        (ROPE | {"rotary_seq_len_interpolation_factor": 3}, "linear", 3.0, None),
        ({"position_embedding_type": "yarn", "rope_scaling_factor": 2.0}, "yarn", 2.0, 4096),
        (ROPE | {"rope_type": "yarn", "rope_scaling_factor": 2.0, LENGTH: 99}, "yarn", 2.0, 99),
        (ROPE | {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.5}, "ntk", 2.5, None),
    ],
)
def test_other_ways_are_written_out(
    said: dict[str, Any], kind: str, factor: float, length: int | None
) -> None:
    plain = written_out(said)
    assert (plain["rope_scaling_type"], plain["rope_scaling_factor"]) == (kind, factor)
    assert (plain["position_embedding_type"], plain[LENGTH]) == ("rope", length)
    before, after = (rotary_frequencies(RotaryConfig(**o), 16) for o in (said, said | plain))
    assert after.magnitude == before.magnitude
    assert after.speeds.equal(before.speeds)
    assert list(RotaryConfig(**(said | plain)).rotary_problems(16)) == []


def test_positions_that_are_not_stretched_stay() -> None:
    for kind in ("learned_absolute", "none", "rope"):
        assert written_out({"position_embedding_type": kind, "hidden_size": 8}) == {
            "position_embedding_type": kind,
            "rotary_seq_len_interpolation_factor": None,
            "use_rope_scaling": False,
            "rope_type": None,
            "rope_scaling_type": "none",
        }


def test_a_llama_stretched_by_megatrons_flag_is_exported_stretched() -> None:
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    options = model_options(llama) | {"use_rope_scaling": True}
    options.pop("rope_scaling_type")
    exported = hf_config_of(options, "llama")["rope_parameters"]
    assert (exported["rope_type"], exported["factor"]) == ("llama3", 8.0)
    assert exported["original_max_position_embeddings"] == 8192
