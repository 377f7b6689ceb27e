"""The table of options is made from the fields alone."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from megatron.core.config_field import derived, flag
from megatron.training.config.options import close_words, options_of
from megatron.training.config.run_config import RunConfig


@dataclass(kw_only=True)
class Base:
    """Things of the base."""

    base_bool: bool = True
    """Is on."""

    base_list: list[float] | None = None
    """Numbers
    on two lines."""


@dataclass(kw_only=True)
class Model(Base):
    """Things of the model. More."""

    count: int = derived("--how-many")
    """Whole."""

    kind: Literal["a", "b"] = "a"
    """Kind."""

    hidden: object = field(default=None, metadata=flag(hidden=True))


@dataclass(kw_only=True)
class Whole:
    """A run."""

    model: Model
    sources: dict


OPTIONS = options_of(Whole)


def _texts(name, *words):
    return OPTIONS[name].from_texts(list(words))


def test_a_field_becomes_an_option_of_its_class():
    count = OPTIONS["count"]
    assert (count.flags, count.kind, count.default) == (("--how-many",), int, None)
    assert (count.section, count.group, count.help) == (
        "model",
        "Things of the model. More",
        "Whole.",
    )
    assert OPTIONS["base_list"].group == "Things of the base"
    assert OPTIONS["base_list"].help == "Numbers on two lines."
    assert list(OPTIONS) == ["count", "kind", "base_bool", "base_list"], "own fields come first"


def test_a_switch_that_is_on_is_turned_off():
    switch = OPTIONS["base_bool"]
    assert switch.flags == ("--no-base-bool", "--disable-base-bool")
    assert switch.inverse == ("--base-bool",)
    assert switch.from_texts([]) is False


def test_words_become_values():
    assert _texts("count", "3") == 3
    assert _texts("kind", "b") == "b"
    assert _texts("base_list", "1", "2e-3") == [1.0, 0.002]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("count", ["x"], "whole number"),
        ("count", ["1.5"], "whole number"),
        ("count", [], "needs a value"),
        ("count", ["1", "2"], "takes one value, not 2"),
        ("kind", ["c"], "one of a, b"),
        ("base_list", [], "at least one"),
        ("base_list", ["nan"], "finite"),
        ("base_bool", ["False"], "takes no value"),
    ],
)
def test_words_that_do_not_fit_are_refused(name, words, message):
    with pytest.raises(ValueError, match=message):
        _texts(name, *words)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", 3, 3),
        ("count", None, None),
        ("base_list", [1, 0.5], [1.0, 0.5]),
        ("base_list", 2, [2.0]),
        ("base_bool", True, True),
    ],
)
def test_data_becomes_values(name, value, wanted):
    assert OPTIONS[name].from_data(value) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.5),
        ("count", [1]),
        ("count", "many"),
        ("kind", 1),
        ("base_bool", "yes"),
        ("base_bool", None),
        ("base_list", {"a": 1}),
    ],
)
def test_data_of_another_type_is_refused(name, value):
    with pytest.raises(ValueError, match="must be"):
        OPTIONS[name].from_data(value)


def test_an_option_shows_as_typed():
    options = options_of(RunConfig)
    assert options["num_moe_experts"].show(8) == "--num-experts 8"
    assert options["lr"].show(3e-4) == "--lr 0.0003"
    assert options["moe_layer_freq"].show([0, 1]) == "--moe-layer-freq [0,1]"
    assert options["bf16"].show(True) == "--bf16"
    assert options["data_path"].show(["a", "b"]) == "--data-path a b"


def test_near_words_are_found_whatever_their_case():
    assert close_words("rmsnorm", ["LayerNorm", "RMSNorm"]) == ["RMSNorm"]
    assert close_words("xyz", ["LayerNorm"]) == []


@dataclass(kw_only=True)
class Twice:
    """Twice."""

    one: int = field(default=1, metadata=flag("--same"))
    """One."""
    two: int = field(default=1, metadata=flag("--same"))
    """Two."""


@dataclass(kw_only=True)
class WholeTwice:
    """A run."""

    twice: Twice


def test_one_flag_for_two_fields_is_a_bug():
    with pytest.raises(AssertionError, match="--same"):
        options_of(WholeTwice)
