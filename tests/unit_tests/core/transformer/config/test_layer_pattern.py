"""--moe-layer-freq is parsed by a small grammar."""

import pytest

from megatron.core.transformer.config.layer_pattern import parse_layer_pattern


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2", 2),
        ("[0,1]", [0, 1]),
        ("([0]*3+[1]*4)", [0, 0, 0, 1, 1, 1, 1]),
        ("2 * [0, 1] + [1]", [0, 1, 0, 1, 1]),
        ("[]", []),
    ],
)
def test_numbers_and_patterns_are_read_as_python_would(text, wanted):
    assert parse_layer_pattern(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "[0", "abs(1)", "__import__('os')", "[1]*[2]", "[True]", "1.5", "[0]-[1]", "'a'"],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"\(\[0\]\*3\+\[1\]\*9\)"):
        parse_layer_pattern(text)


@pytest.mark.parametrize("text", ["[0]*1000000", "[0]*999999999999", "1+1", "[[1]]", "[1]*10**9"])
def test_long_or_nested_patterns_are_refused_at_once(text):
    with pytest.raises(ValueError, match=r"may hold only|more than"):
        parse_layer_pattern(text)
