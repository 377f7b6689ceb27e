"""A config.json with values of a wrong kind ends in one error that names them, never elsewhere."""

import contextlib
from typing import Any

import pytest

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.family import families, family_of
from megatron.core.models.huggingface.options import family_defaults, model_options
from megatron.training.huggingface_family import config_of
from tests.helpers.hf_cases import CASES
from tests.helpers.hf_tiny import BUILT

VALUES: tuple[Any, ...] = (None, "x", 0, -1, [], {}, 1.5)


@pytest.mark.parametrize("name", BUILT)
def test_no_value_of_a_field_ends_in_anything_but_its_error(name: str) -> None:
    config = CASES[name].config
    for field in family_defaults(family_of(config)):
        for value in VALUES:
            with contextlib.suppress(ConfigError):
                config_of(model_options(config | {field: value}))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama2", {"hidden_size": "64"}, "hidden_size '64' must be a whole number"),
        ("llama2", {"tie_word_embeddings": "false"}, "'false' must be true or false"),
        ("llama2", {"num_attention_heads": 0}, "num_attention_heads 0 must be at least 1"),
        ("llama2", {"rms_norm_eps": None}, "rms_norm_eps None must be a number"),
        ("llama2", {"rope_scaling": "yarn"}, "rope_scaling 'yarn' must be an object"),
        ("deepseek-v2", {"num_experts_per_tok": None}, "num_experts_per_tok None must be a whole"),
    ],
)
def test_the_field_and_its_value_are_named(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        model_options(CASES[name].config | fields)
    assert words in str(raised.value)


def test_a_number_that_is_missing_and_has_no_default_is_named() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok is missing"):
        model_options({"model_type": "deepseek_v2"})


def test_kinds_are_known_of_all_numbers_that_rows_calculate_with() -> None:
    for family in families():
        for name, value in family_defaults(family).items():
            assert type(value) in (bool, int, float, str, type(None)), (family.name, name)
