"""Every option of a run as text: value and source, by group."""

from megatron.training.config.options import Option
from megatron.training.config.run_config import RunConfig


def config_page(config: RunConfig, options: dict[str, Option]) -> str:
    """Return one line for each option, ``--flag  value  source``, under headings."""
    values = config.flat()
    groups: dict[str, list[str]] = {}
    for option in options.values():
        line = f"  {_name(option):<42} {_value(option, values[option.name]):<28} "
        line += config.sources.get(option.name, "default")
        groups.setdefault(option.group, []).append(line)
    blocks = [f"{group}:\n" + "\n".join(lines) for group, lines in groups.items()]
    return "\n\n".join(blocks) + "\n"


def _name(option: Option) -> str:
    """Name a switch as it reads when on, whatever its flag turns it to."""
    return f"--{option.name.replace('_', '-')}" if option.default is True else option.flag


def _value(option: Option, value: object) -> str:
    if value is None:
        return "-"
    return str(value).lower() if option.kind is bool else option.text(value)
