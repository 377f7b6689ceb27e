"""Options of a model as flags, ready to paste. Imports no torch."""

import shlex
from collections.abc import Mapping
from typing import Any

from megatron.training.config.options import Option, options_of
from megatron.training.config.run_config import RunConfig


def flags_of(options: Mapping[str, Any]) -> str:
    """Return the flags that differ from their defaults."""
    table = options_of(RunConfig)
    shown = [
        _shown(table[name], value)
        for name, value in options.items()
        if name in table and value is not None and value != table[name].default
    ]
    return " ".join(shown)


def _shown(option: Option, value: Any) -> str:
    if isinstance(value, float):
        return f"{option.flag} {value!r}"  # every digit
    shown = option.show(value)
    return " ".join(shlex.quote(word) for word in shown.split(" "))
