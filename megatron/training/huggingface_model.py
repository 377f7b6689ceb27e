"""Options of a model of Hugging Face's as a configuration of ours, and the tensors it then has."""

import torch

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.mapping import MODEL, model_tensors
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.param_role import deferred_init
from megatron.training.config.run_config import RunConfig
from megatron.training.dry_run.rank_groups import GroupTable

_FLAGS = {
    torch.float32: {},
    torch.bfloat16: {"bf16": True},
    torch.float16: {"fp16": True},
    torch.float64: {"fp64": True},
}


def dtype_flags(dtype: torch.dtype) -> dict[str, bool]:
    """Return the options that make a model's parameters of ``dtype``."""
    return dict(_FLAGS[dtype])


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
