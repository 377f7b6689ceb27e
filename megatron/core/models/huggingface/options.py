"""From a config.json to options of a model, and back: every field read, ignored by name or refused.

Pure, and without torch: a run that takes its options from a config.json reads it at the start.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.config_rows import IGNORED
from megatron.core.models.huggingface.family import Family, family_named, family_of
from megatron.core.models.huggingface.model_facts import (
    ModelFacts,
    is_option,
    unknown_options,
    with_defaults,
)

VERSION = "4.46.0"
"""``transformers_version`` of a config.json that is written here."""


def model_options(hf_config: Mapping[str, Any], *, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Return the options of a model, by field name, that a config.json means.

    Args:
        hf_config: Parsed config.json.
        ignore: Fields that are unknown here and that the user knows to change nothing.

    Returns:
        Field of RunConfig -> value; ``padded_vocab_size`` is the number of rows on disk. Options
        that stay neutral and that this version lacks are left out.

    Raises:
        ConfigError: Lists every field that cannot be built or is not known.
    """
    family = family_of(hf_config)
    problems = list(_strangers(family, hf_config, ignore))
    found = dict(family.constants)
    fields = family_defaults(family) | dict(hf_config)
    for row in family.rows:
        try:
            found |= row.read(fields)
        except ConfigError as error:
            problems.append(str(error))
    lacking = unknown_options(found)
    problems += [
        f"config.json needs {name} {found[name]!r}, which this version does not have"
        for name in lacking
    ]
    ConfigError.raise_if_any(problems)
    return {name: value for name, value in found.items() if is_option(name)}


def hf_config_of(
    options: Mapping[str, Any], family: Family | str, *, dtype: str | None = None
) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        options: As ``model_options`` returns; others have their defaults. ``padded_vocab_size``
            becomes ``vocab_size``.
        family: How to say it.
        dtype: Of the tensors, such as ``bfloat16``.

    Raises:
        ConfigError: The family cannot say it; lists what.
    """
    family = family_named(family) if isinstance(family, str) else family
    given = with_defaults(options)
    given["ffn_hidden_size"] = ModelFacts.of(options).config.ffn_size
    problems = [
        f"{name} {given[name]!r} is not what {family.name} has: {value!r}"
        for name, value in family.constants.items()
        if given[name] != value
    ]
    fields: dict[str, Any] = {}
    for row in family.rows:
        try:
            fields |= row.write(given)
        except ConfigError as error:
            problems.append(str(error))
    ConfigError.raise_if_any(problems)
    head = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    kinds = {} if dtype is None else {"torch_dtype": dtype, "dtype": dtype}
    return head | fields | kinds | {"transformers_version": VERSION}


def family_defaults(family: Family) -> dict[str, Any]:
    """Return every field that the family reads, with its value where config.json is silent."""
    found: dict[str, Any] = {}
    for row in family.rows:
        for name, value in row.defaults.items():
            if value is not None or name not in found:  # None leaves it to another row
                found[name] = value
    return found


def _strangers(family: Family, hf_config: Mapping[str, Any], ignore: Collection[str]) -> list[str]:
    known = {name for row in family.rows for name in row.defaults}
    known |= IGNORED | family.ignored_fields | set(ignore)
    found = sorted(name for name in hf_config if name not in known and not name.startswith("_"))
    if not found:
        return []
    return [
        f"config.json of {family.name}: unknown {', '.join(found)}; if they do not change what the "
        "model computes, name them with --ignore-config-fields"
    ]
