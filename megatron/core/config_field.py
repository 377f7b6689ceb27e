"""Declare a config field once; the CLI, the YAML file and the checkpoint all read it from there.

A field's name, type and default are its declaration and the string under it is its help.
``flag`` adds only what those cannot say: a historical flag name or how to parse the text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
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
