"""Options of a model of Hugging Face's as a configuration of ours, and the tensors it then has."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.mapping import MODEL, model_tensors
from megatron.core.errors import ConfigError
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.huggingface.family import Family
from megatron.core.models.huggingface.options import hf_config_of, model_options
from megatron.core.param_role import deferred_init
from megatron.training.config.run_config import RunConfig
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.resume_rules import architecture

_FLAGS = {
    torch.float32: {},
    torch.bfloat16: {"bf16": True},
    torch.float16: {"fp16": True},
    torch.float64: {"fp64": True},
}
NUMBER_FORMAT = "number format (--bf16, --fp16, --fp64)"
"""Entry of ``architecture`` that an exchange may change."""


def dtype_flags(dtype: torch.dtype) -> dict[str, bool]:
    """Return the options that make a model's parameters of ``dtype``."""
    return dict(_FLAGS[dtype])


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


def model_facts(config: RunConfig, vocab_size: int) -> dict[str, TensorFacts]:
    """Return key, without ``model.``, -> shape and dtype of all tensors of a model.

    Nothing is allocated.
    """
    groups = GroupTable(config.model.layout(1)).collection(0)
    with torch.device("meta"), deferred_init():
        model = GPTModel(
            config.model,
            get_gpt_decoder_block_spec(config.model),
            vocab_size=vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            pg_collection=groups,
        )
    return {
        key.removeprefix(MODEL): TensorFacts(tuple(tensor.shape), tensor.dtype)
        for key, tensor in model_tensors(model).items()
    }


def same_function(config: RunConfig, options: Mapping[str, Any], family: Family) -> list[str]:
    """Say what would be lost if this model were written as one of ``family``.

    Raises:
        ConfigError: The family cannot say it at all.
    """
    again = config_of(model_options(hf_config_of(options, family)))
    ours, theirs = architecture(config.model), architecture(again.model)
    return [
        f"{flag} is {value}, and a {family.name} has {theirs[flag]}"
        for flag, value in ours.items()
        if value != theirs[flag] and flag != NUMBER_FORMAT
    ]
