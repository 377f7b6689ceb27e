"""Which family of Hugging Face's computes what a model of ours computes. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.family import FAMILIES, Family, family_named
from megatron.core.models.huggingface.options import hf_config_of, model_options
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import architecture

NUMBER_FORMAT = "number format (--bf16, --fp16, --fp64)"
"""Entry of ``architecture`` that an exchange may change."""


def fitting_family(
    config: RunConfig, options: Mapping[str, Any], names: Iterable[str] = tuple(FAMILIES)
) -> Family:
    """Return the first family that computes what a model computes.

    Args:
        config: Of the model.
        options: Its model section and the rows of its vocabulary, see ``options_of_checkpoint``.
        names: Families to choose from.

    Raises:
        ConfigError: None does; lists what keeps the nearest one from it.
    """
    problems: dict[str, list[str]] = {}
    for name in names:
        family = family_named(name)
        try:
            problems[name] = same_function(config, options, family)
        except ConfigError as error:
            problems[name] = list(error.problems) or [str(error)]
        if not problems[name]:
            return family
    nearest = min(problems, key=lambda name: len(problems[name]))
    ConfigError.raise_if_any(
        [f"as {nearest}: {problem}" for problem in problems[nearest]],
        f"this model is none of {', '.join(problems)}" if len(problems) > 1 else None,
    )
    raise AssertionError("no problems and no family")


def same_function(config: RunConfig, options: Mapping[str, Any], family: Family) -> list[str]:
    """Say what would be lost if this model were written as one of ``family``.

    Raises:
        ConfigError: The family cannot say it at all.
    """
    again = config_of(model_options(hf_config_of(options, family), with_mtp=True))
    ours, theirs = architecture(config.model), architecture(again.model)
    return [
        f"{flag} is {value}, and a {family.name} has {theirs[flag]}"
        for flag, value in ours.items()
        if value != theirs[flag] and flag not in _unread(config)
    ]


def _unread(config: RunConfig) -> set[str]:
    """Return entries of ``architecture`` that say nothing of this model."""
    has_dense = not all(config.model.moe_layer_pattern)
    return {NUMBER_FORMAT} if has_dense else {NUMBER_FORMAT, "--ffn-hidden-size"}


def config_of(options: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a model of these options, everything else at its default.

    Raises:
        ConfigError: No model can be built of them.
    """
    config = RunConfig.from_flat(options)
    config.model.check()
    return config


def options_of_checkpoint(config: RunConfig, padded_vocab_size: int | None) -> dict[str, Any]:
    """Return the options of the model of a checkpoint.

    Raises:
        ConfigError: It is no language model.
    """
    if padded_vocab_size is None:
        raise ConfigError("the checkpoint holds no GPTModel (it has no word embedding)")
    named = {entry.name: getattr(config.model, entry.name) for entry in fields(config.model)}
    return named | {"padded_vocab_size": padded_vocab_size}
