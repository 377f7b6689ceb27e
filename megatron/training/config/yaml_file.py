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
        text = path.read_text(encoding="utf-8")
        data, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        return _unreadable(f"--yaml-cfg {path} cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return _unreadable(f"--yaml-cfg {path} is no YAML: {_explain(error)}")
    if not isinstance(data, dict | None):
        return _unreadable(f"--yaml-cfg {path} must hold lines of the form key: value")
    given.problems += [f"{path}: {text}" for text in _given_twice(root, options)]
    for key, value in _flatten(data or {}):
        _read_key(given, f"{path}: ", key, value, options)
    return given


def _unreadable(problem: str) -> Given:
    return Given(problems=[problem], readable=False)


def _explain(error: Any) -> str:
    """Say what is wrong and where, without PyYAML's name for a text in memory."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(getattr(error, "reason", error))
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}"


def _given_twice(root: Any, options: dict[str, Option]) -> Iterator[str]:
    """Yield a sentence for each key or option given twice: YAML itself keeps the last one.

    Args:
        root: The node that yaml.compose returns.
        options: All options, by field name.
    """
    sections = {entry.name for entry in fields(RunConfig)}
    places: dict[str, list[str]] = {}
    for key, value in root.value if root is not None else ():
        _note_place(places, f"key {key.value}", key)
        is_section = key.value in sections and value.id == "mapping"
        for inner in [k for k, _ in value.value] if is_section else [key]:
            option = _find(str(inner.value), options)
            name = option.name if option else inner.value.replace("-", "_")
            _note_place(places, name, inner)
    repeated = [" and ".join(found) for found in places.values() if len(found) > 1]
    yield from (f"{keys} set the same; keep one" for keys in dict.fromkeys(repeated))


def _note_place(places: dict[str, list[str]], name: str, key: Any) -> None:
    places.setdefault(name, []).append(f"{key.value} (line {key.start_mark.line + 1})")


def _flatten(data: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value), with the contents of sections in place of them."""
    sections = {entry.name for entry in fields(RunConfig)}
    for key, value in data.items():
        if key in sections and isinstance(value, dict):
            yield from ((str(inner), v) for inner, v in value.items())
        else:
            yield str(key), value


def _read_key(given: Given, where: str, key: str, value: Any, options: dict[str, Option]) -> None:
    option = _find(key, options)
    if option is None:
        _note_foreign_key(given, where, key, value, _by_flag(options))
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


def _find(key: str, options: dict[str, Option]) -> Option | None:
    """Return the option that a key names, by field or by flag."""
    return options.get(key) or _by_flag(options).get(f"--{key.replace('_', '-')}")


def _by_flag(options: dict[str, Option]) -> dict[str, Option]:
    return {f.replace("_", "-"): option for option in options.values() for f in option.flags}


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
