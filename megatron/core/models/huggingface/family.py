"""Which families of models there are, and which one a config.json belongs to."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.tables import Family

__all__ = ["FAMILIES", "Family", "families", "family_named", "family_of"]

FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mixtral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "smollm3": "smollm3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen",
    "qwen3_moe": "qwen",
    "olmoe": "olmoe",
    "granitemoe": "granite",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "gpt_oss": "gpt_oss",
    "grok": "grok",
}
"""Name of a family -> module of ``families`` that holds it."""


def families() -> list[Family]:
    """Return all families."""
    return [family_named(name) for name in FAMILIES]


def family_named(name: str) -> Family:
    """Return the family of this name.

    Raises:
        ConfigError: There is none; all names are told.
    """
    if name not in FAMILIES:
        raise ConfigError(f"there is no family {name}; families: {', '.join(FAMILIES)}")
    module = import_module(f"megatron.core.models.huggingface.families.{FAMILIES[name]}")
    found: Family = module.FAMILIES[name]
    return found


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its ``model_type``.

    Raises:
        ConfigError: It has none, or one that is not known here; says which are.
    """
    kind = hf_config.get("model_type")
    known = {kind: family for family in families() for kind in family.model_types}
    if kind is None:
        raise ConfigError(
            f"config.json names no model_type; known here: {', '.join(sorted(known))}"
        )
    if kind not in known:
        raise ConfigError(
            f"config.json: model_type {kind} is not known here; known: {', '.join(sorted(known))}"
        )
    return known[kind]
