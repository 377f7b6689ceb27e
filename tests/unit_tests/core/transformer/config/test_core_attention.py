"""Which layers have a window, how one is written, and what is refused."""

import pytest

from megatron.core.errors import ConfigError
from megatron.core.transformer.config.core_attention import parse_window
from megatron.core.transformer.transformer_config import TransformerConfig


def _config(**options: object) -> TransformerConfig:
    shape = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
    return TransformerConfig(**shape | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["127,0", "(127, 0)", "[127,0]", " 127, 0 "])
def test_a_window_is_read_as_megatron_writes_it_and_as_it_is_shown(text: str) -> None:
    assert parse_window(text) == [127, 0]


@pytest.mark.parametrize(
    "text", ["", "127", "1,2,3", "1.5,0", "1,False", "a,b", "f(1),0", "(1,", "{1: 0, 2: 0}"]
)
def test_anything_else_is_no_window(text: str) -> None:
    with pytest.raises(ValueError, match="must be two whole numbers, such as 127,0"):
        parse_window(text)


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({}, None),
        ({"window_size": [-1, 0]}, None),
        ({"window_size": (5, 0)}, [5, 5, 5, 5]),
        ({"window_size": [0, 0]}, [0, 0, 0, 0]),
        # Megatron counts layers from 1; those that N divides see everything
        ({"window_size": [5, 0], "window_attn_skip_freq": 2}, [5, None, 5, None]),
        ({"window_size": [5, 0], "window_attn_skip_freq": 3}, [5, 5, None, 5]),
        ({"window_size": [5, 0], "window_attn_skip_freq": 1}, None),
        ({"window_size": [5, 0], "window_attn_skip_freq": [0, 1, 1, 0]}, [None, 5, 5, None]),
    ],
)
def test_layers_have_the_windows_that_megatron_gives_them(options: dict, windows: object) -> None:
    config = _config(**options)
    config.check()
    assert config.attention_windows == windows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": [5]}, "--window-size 5 must be two numbers"),
        ({"window_size": [5, 1]}, "the right side must be 0"),
        ({"window_size": [-2, 0]}, "must be at least 0, or -1"),
        ({"window_attn_skip_freq": 2}, "has no effect without --window-size"),
        ({"window_size": [5, 0], "window_attn_skip_freq": 0}, "must be at least 1"),
        ({"window_size": [5, 0], "window_attn_skip_freq": [1]}, "has 1 entries"),
        ({"window_size": [5, 0], "window_attn_skip_freq": [1, 2, 0, 0]}, "may hold 1 (a window)"),
        ({"softmax_type": "sink"}, "--softmax-type sink must be one of vanilla"),
    ],
)
def test_a_config_built_in_python_is_checked_too(options: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        _config(**options).check()
    assert words in str(error.value)
