"""The language of --pipeline-model-parallel-layout: documented examples and round trips."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.layout_string import format_layout, parse_layout


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        # The examples of Megatron-LM's documentation and help.
        ("Et*3|(tt|)*29,m|L", ["Ettt", *["tt"] * 29, "m", "L"]),
        ("E||t|L", ["E", "", "t", "L"]),
        ("E|(t|)*3,m|m||L", ["E", "t", "t", "t", "m", "m", "", "L"]),
        ("E|(t|)*3,m|L", ["E", "t", "t", "t", "m", "L"]),
        # Layouts seen in launch scripts.
        ("Ett|(tt|)*6L", ["Ett", *["tt"] * 6, "L"]),
        ("Et*16|t*16|t*16|t*12,m,L", ["E" + "t" * 16, "t" * 16, "t" * 16, "t" * 12 + "mL"]),
        ("E,t*4|t*4,L", ["Etttt", "ttttL"]),
        ("Et|(t|)*30tL", ["Et", *["t"] * 30, "tL"]),
        # Brackets in brackets, a repeated bar.
        ("E((t*2|)*2,t|)*2L", ["Ett", "tt", "t", "tt", "tt", "t", "L"]),
        ("Et|*3L", ["Et", "", "", "L"]),
        ("(EtL)*1", ["EtL"]),
    ],
)
def test_layouts_read_as_documented(text, stages):
    assert list(parse_layout(text)) == stages


@given(st.lists(st.text("tm", max_size=5), max_size=8))
def test_what_is_written_reads_back(middle):
    for stages in (
        ["E", *middle, "L"],
        ["Et", *middle, "tt", "tt", "ttL"],
        ["EtL"],
        middle or [""],
    ):
        text = format_layout(stages)
        assert list(parse_layout(text)) == stages, text


def test_repeats_are_written_short():
    assert format_layout(["Ettt", *["tt"] * 29, "m", "L"]) == "Et*3|(tt|)*29,m|L"
    assert format_layout(["E", "t", "t", "L"]) == "E|(t|)*2,L"


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("Et*3x|L", "'x' at character 5", "E (the embedding), t (a transformer layer)"),
        ("E t|L", "' ' at character 2", "known are"),
        ("Et*|L", "'*' at character 3", "a number must follow"),
        ("Et*-1|L", "'*' at character 3", "a number must follow"),
        ("(Et|L", "'(' at character 1", "not closed"),
        ("Et)*2|L", "')' at character 3", "no bracket is open"),
        ("Et*0|L", "'*' at character 3", "at least once"),
        ("*3", "'*' at character 1", "nothing before it"),
        ("E()*3L", "'*' at character 4", "nothing before it"),
        ("Et*2*3L", "'*' at character 5", "nothing before it"),
        ("(((t*999)*999)*999)", "'*' at character 10", "more than 100000 symbols"),
    ],
)
def test_what_cannot_be_read_is_shown_with_its_place(text, place, why):
    with pytest.raises(ConfigError) as error:
        parse_layout(text)
    assert f"--pipeline-model-parallel-layout {text!r}: {place}" in str(error.value)
    assert why in str(error.value)
