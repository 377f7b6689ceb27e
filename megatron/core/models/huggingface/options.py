"""From a config.json to options of a model, and back: every field read, ignored by name or refused.

Pure, and without torch: a run that takes its options from a config.json reads it at the start.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.config_kinds import kind_problems
from megatron.core.models.huggingface.config_rows import IGNORED
from megatron.core.models.huggingface.family import Family, family_named, family_of
from megatron.core.models.huggingface.model_facts import (
    ModelFacts,
    with_defaults,
)

_RESOLVED = {
    "position_embedding_type": "position_kind",
    "rope_scaling_type": "rope_scaling",
    "rope_scaling_factor": "rope_factor",
    "rope_scaling_original_max_position_embeddings": "rope_original_length",
}
"""Option -> property that says what it comes to."""
_TRAINING = frozenset({"moe_router_load_balancing_type"})
"""Options that families set and that change training alone."""
VERSION = "4.46.0"
"""``transformers_version`` of a config.json that is written here."""


def model_options(
    hf_config: Mapping[str, Any], *, ignore: Collection[str] = (), with_mtp: bool = False
) -> dict[str, Any]:
    """Return the options of a model, by field name, that a config.json means.

    Args:
        hf_config: Parsed config.json.
        ignore: Fields that are unknown here and that the user knows to change nothing.
        with_mtp: Take the modules of multi-token prediction too, which only training runs.

    Returns:
        Field of RunConfig -> value; ``padded_vocab_size`` is the number of rows on disk.

    Raises:
        ConfigError: Lists every field that cannot be built or is not known.
    """
    family = family_of(hf_config)
    hf_config = _renamed(family, hf_config)
    problems = list(_strangers(family, hf_config, ignore))
    defaults = family_defaults(family)
    if wrong := list(kind_problems(hf_config, defaults)):  # rows calculate with them
        ConfigError.raise_if_any([*problems, *wrong])
    found = dict(family.constants)
    fields = defaults | dict(hf_config)
    for row in family.rows:
        try:
            found |= row.read(fields)
        except ConfigError as error:
            problems.append(str(error))
    if not with_mtp:
        found.pop("mtp_num_layers", None)
    ConfigError.raise_if_any(problems)
    return found


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
    given = with_defaults(options) | resolved(options)
    problems = [
        f"{name} {given[name]!r} is not what {family.name} has: {value!r}"
        for name, value in family.constants.items()
        if given[name] != value and name not in _TRAINING
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


def _renamed(family: Family, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields under the names of the family's table."""
    found = dict(hf_config)
    for other, name in family.aliases.items():
        if other in found and name not in found:
            found[name] = found.pop(other)
    return found


def resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what options that leave a size open, or say it in another way, mean."""
    config = ModelFacts.of(options).config
    found: dict[str, Any] = {"ffn_hidden_size": config.ffn_size}
    if config.num_moe_experts is not None:
        found["moe_ffn_hidden_size"] = config.moe_ffn_size
        found["moe_layer_freq"] = [int(is_moe) for is_moe in config.moe_layer_pattern]
    for option, name in _RESOLVED.items():
        found[option] = getattr(config, name)
    return found


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
    known |= IGNORED | family.ignored_fields | family.aliases.keys() | set(ignore)
    found = sorted(name for name in hf_config if name not in known and not name.startswith("_"))
    if not found:
        return []
    return [
        f"config.json of {family.name}: unknown {', '.join(found)}; if they do not change what the "
        "model computes, name them with --ignore-config-fields"
    ]
