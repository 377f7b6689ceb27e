"""A model and its tokenizer from a checkpoint alone: no flags, one process, any layout's save."""

from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing.folders import Place, latest_iteration, local_copies
from megatron.core.dist_checkpointing.mapping import MODEL, model_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.store import OpenCheckpoint, open_checkpoint
from megatron.core.errors import CheckpointError, DataError
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.huggingface.config_file import is_hf_folder
from megatron.core.param_role import deferred_init
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings, build_tokenizer
from megatron.core.transformer.config.pipeline import PipelineConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.huggingface_start import facts_of_folder
from megatron.training.initialize import Launch, connect
from megatron.training.resume_rules import config_from_data
from megatron.training.starting_point import folder_and_iteration

_ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a checkpoint gives to whoever wants to use the model."""

    model: GPTModel
    """In evaluation mode, with all experts on this process."""
    config: RunConfig
    """Of the run that saved it, for one rank."""
    tokenizer: Tokenizer | None
    """None when the run had none (mock data)."""
    path: Place
    """The checkpoint."""


def load_trained_model(
    folder: Place, *, iteration: int | None = None, device: torch.device | str = "cpu"
) -> TrainedModel:
    """Build the model that a run saved, on one process.

    Args:
        folder: What the run had as --save; or one checkpoint in it, such as ``iter_0000010``; or a
            model of Hugging Face's.
        iteration: Which checkpoint; the latest when None.
        device: Where to put the model.

    Raises:
        CheckpointError: Nothing there, damaged, or not of a GPTModel.
        DataError: A file of the tokenizer is gone or has changed.
    """
    own = iteration is not None or folder_and_iteration(folder)[1] is not None
    if not own and latest_iteration(folder) is None and _is_theirs(folder):
        assert isinstance(folder, Path), "checked"
        return _from_huggingface(folder, device)
    if iteration is None:
        folder, iteration = folder_and_iteration(folder)
    opened = open_checkpoint(folder, None, iteration=iteration)
    if opened is None:
        raise CheckpointError(f"--load {folder} holds no checkpoint")
    config = config_from_data(opened.common["config"])
    for_one_process(config)
    tokenizer = saved_tokenizer(opened)
    model = empty_model(opened, config).to(device)
    read_tensors(opened.path, model_tensors(model), None, prefixes=(MODEL,))
    model.eval()
    return TrainedModel(model=model, config=config, tokenizer=tokenizer, path=opened.path)


def for_one_process(config: RunConfig) -> None:
    """Take from ``config``, in place, what only the ranks that trained with it have."""
    config.model.expert_model_parallel_size = config.model.expert_tensor_parallel_size = 1
    config.model.moe_grouped_mm_backend = "auto"  # its package need not be here
    config.model.moe_fused_activation = "auto"  # nor a compiler
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = 1, False
    config.model.context_parallel_size = 1
    for option in fields(PipelineConfig):
        setattr(config.model, option.name, option.default)
    config.model.pipeline_model_parallel_size = 1


def saved_tokenizer(opened: OpenCheckpoint) -> Tokenizer | None:
    """Build the tokenizer that a checkpoint was trained with, from the copies beside it.

    Raises:
        DataError: A file is gone, or the tokenizer gives other ids than in training.
    """
    facts: dict[str, Any] | None = opened.common["tokenizer"]
    if facts is None:
        return None
    with local_copies(opened.path, facts["copies"]) as copies:
        own = {role: str(path) for role, path in copies.items() if role in facts["files"]}
        files = facts["files"] | own
        settings = TokenizerSettings(tokenizer_type=facts["type"], **files, **facts["settings"])
        tokenizer = build_tokenizer(settings)
        fingerprint = tokenizer.fingerprint()
    if fingerprint != facts["fingerprint"]:
        raise DataError(
            f"the tokenizer of {opened.path} ({facts['type']}, {', '.join(files.values())}) is "
            "not the one that the model was trained with: its content has changed"
        )
    return tokenizer


def empty_model(opened: OpenCheckpoint, config: RunConfig) -> GPTModel:
    """Build the model of a checkpoint in this process, its weights not set.

    Args:
        opened: The checkpoint.
        config: Of the run that saved it, ``for_one_process``.

    Raises:
        CheckpointError: It is not of a GPTModel.
    """
    vocab_size = opened.common["padded_vocab_size"]
    if vocab_size is None:
        raise CheckpointError(f"{opened.path} holds no GPTModel (it has no word embedding)")
    return _model(config, vocab_size)


def _is_theirs(folder: Place) -> bool:
    return isinstance(folder, Path) and is_hf_folder(folder)


def _from_huggingface(folder: Path, device: torch.device | str) -> TrainedModel:
    """Build the model of a folder of Hugging Face's."""
    from megatron.training.huggingface_load import load_folder  # its packages need not be here

    facts = facts_of_folder(folder)
    config = config_from_data(facts["config"])
    config.model.check()
    rows = facts["config"]["tokenizer"]["padded_vocab_size"]
    model = _model(config, rows).to(device)
    load_folder(folder, model_tensors(model), config=config, rows=rows, group=None)
    model.eval()
    tokenizer = None
    if (kind := facts["tokenizer"]) is not None:
        settings = TokenizerSettings(tokenizer_type=kind["type"], **kind["files"])
        tokenizer = build_tokenizer(settings)
    return TrainedModel(model=model, config=config, tokenizer=tokenizer, path=folder)


def _model(config: RunConfig, vocab_size: int) -> GPTModel:
    connect(_ALONE, "gloo", torch.device("cpu"), timedelta(minutes=1))
    with deferred_init():
        return GPTModel(
            config.model,
            get_gpt_decoder_block_spec(config.model),
            vocab_size=vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            unpadded_vocab_size=config.tokenizer.unpadded_vocab_size,
            pg_collection=ProcessGroupCollection.create(config.model.layout(1)),
        )
