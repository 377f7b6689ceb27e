"""Declare a config field once; the CLI, the YAML file and the checkpoint all read it from there.

A field's name, type and default are its declaration and the string under it is its help.
``flag`` adds only what those cannot say: a historical flag name or how to parse the text.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

FLAG_KEY = "megatron_flag"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How one config field appears on the command line."""

    names: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    hidden: bool = False


def flag(
    *names: str, parse: Callable[[str], Any] | None = None, hidden: bool = False
) -> dict[str, Flag]:
    """Return dataclass ``metadata`` that renames, re-parses or hides a field's flag.

    Args:
        names: Flags to use instead of the derived ``--field-name``.
        parse: Turns the flag's text into the field's value.
        hidden: Keep the field off the command line (it is computed or is not plain data).
    """
    return {FLAG_KEY: Flag(names=names, parse=parse, hidden=hidden)}


def derived(*names: str) -> Any:
    """Declare a field that is None only until ``parse_args`` derives it from the other options.

    Its type is written without None: ``num_layers: int = derived()``. Code that builds a config by
    hand, as tests do, gives a value.

    Args:
        names: As in ``flag``.
    """
    return field(default=None, metadata=flag(*names))


def choice_problems(config: Any) -> Iterator[str]:
    """Yield one sentence for each value that the ``Literal`` of its dataclass field leaves out.

    The command line finds these as it reads; a config built in Python has only this.
    """
    for name, (is_list, choices) in _choices(config.__class__).items():
        value = getattr(config, name)
        values = [] if value is None else value if is_list else [value]
        wrong = [v for v in values if v not in choices]
        if wrong:
            flag_name = f"--{name.replace('_', '-')}"
            yield f"{flag_name} {' '.join(map(str, wrong))} must be one of {', '.join(choices)}"


@cache
def _choices(config_cls: type) -> dict[str, tuple[bool, tuple[str, ...]]]:
    """Map each field of ``Literal`` or ``list[Literal]`` type to (is a list, its choices)."""
    hints = typing.get_type_hints(config_cls)
    found = {}
    for entry in fields(config_cls):
        hint = _without_none(hints[entry.name])
        is_list = typing.get_origin(hint) is list
        inner = typing.get_args(hint)[0] if is_list else hint
        if typing.get_origin(inner) is typing.Literal:
            found[entry.name] = is_list, typing.get_args(inner)
    return found


def _without_none(hint: Any) -> Any:
    """Take ``X`` of ``X | None``: whether a field may be left out is not for this module."""
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    is_optional = len(inner) == 1 and type(None) in typing.get_args(hint)
    return inner[0] if is_optional else hint
