"""--yaml-cfg FILE: the options of a run by field or flag name, flat or nested by section."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.training.config.flags import Given, note_foreign
from megatron.training.config.options import Option
from megatron.training.config.run_config import RunConfig


def read_yaml_file(path: Path, options: dict[str, Option]) -> Given:
    """Read a YAML file of options with the checks of the command line.

    Keys are field names (``num_layers``), flag names without dashes (``num-layers``) or names of
    sections (``model:``) that hold such keys. Values have the types of the options.

    Args:
        path: The file.
        options: All options, by field name.
    """
    import yaml  # only those who use it need it installed, and --help stays fast

    given = Given()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        given.problems.append(f"--yaml-cfg {path} cannot be read: {error.strerror}")
        return given
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        given.problems.append(f"--yaml-cfg {path} is no YAML: {' '.join(str(error).split())}")
        return given
    if not isinstance(data, dict | None):
        given.problems.append(f"--yaml-cfg {path} must hold lines of the form key: value")
        return given
    for key, value in _flatten(data or {}):
        _read_key(given, f"{path}: ", key, value, options)
    return given


def _flatten(data: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value), with the contents of sections in place of them."""
    sections = {entry.name for entry in fields(RunConfig)}
    for key, value in data.items():
        if key in sections and isinstance(value, dict):
            yield from ((str(inner), v) for inner, v in value.items())
        else:
            yield str(key), value


def _read_key(given: Given, where: str, key: str, value: Any, options: dict[str, Option]) -> None:
    flag = f"--{key.replace('_', '-')}"
    by_flag = {f.replace("_", "-"): option for option in options.values() for f in option.flags}
    option = options.get(key) or by_flag.get(flag)
    if option is None:
        _note_foreign_key(given, where, key, value, by_flag)
        return
    try:
        read = option.from_data(value)
        if option.kind is bool and key not in options and option.default is True:
            read = not read  # disable-bias-linear: true
    except ValueError as error:
        given.problems.append(f"{where}{key}: {value} {error}")
        given.doubtful.update(option.flags)
        return
    if read is not None:
        given.values[option.name] = read


def _note_foreign_key(
    given: Given, where: str, key: str, value: Any, known: dict[str, Option]
) -> None:
    """Answer as for the flag of that name, naming the file."""
    words = [] if value is True else [str(value)]
    reply = Given()
    note_foreign(reply, f"--{key.replace('_', '-')}", words, known)
    given.problems += [f"{where}{text}" for text in reply.problems]
    given.notices += [f"{where}{text}" for text in reply.notices]
    given.doubtful |= reply.doubtful
    given.without_effect |= reply.without_effect
