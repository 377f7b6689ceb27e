"""Small GPT models for tests, in a world of one rank, and random batches for them."""

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.param_role import deferred_init
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB = 37
MAX_LENGTH = 24


def world_of_one() -> ProcessGroupCollection:
    """Groups of a single rank, without a default group: a test may fork ranks later.

    They cannot communicate, and nothing may ask them to.
    """
    return ProcessGroupCollection(
        **{f.name: dist.ProcessGroup(0, 1) for f in fields(ProcessGroupCollection)}
    )


def tiny_config(**options: object) -> TransformerConfig:
    """A two-layer model without dropout, in fp64 unless said otherwise."""
    defaults: dict = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "fp64": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**(defaults | options))


def tiny_gpt(
    config: TransformerConfig,
    seed: int = 1,
    spread: float = 8.0,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """A model, in a world of one unless groups are given, with weights to compare by.

    They are ``spread`` times larger than at the start of training.

    Small weights would hide mistakes in attention behind the residual stream; biases and norms
    are moved off their 0 and 1 for the same reason.
    """
    with deferred_init():
        model = GPTModel(
            config,
            get_gpt_decoder_block_spec(config),
            VOCAB,
            MAX_LENGTH,
            pg_collection=pg_collection or world_of_one(),
        )
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param += 0.1 * torch.randn(param.shape, generator=generator).to(param.dtype)
            else:
                param *= spread
    return model


def tiny_batch(samples: int = 2, length: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, position ids and labels, [samples, length] each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (samples, length + 1), generator=generator)
    positions = torch.arange(length).expand(samples, -1)
    return ids[:, :-1].contiguous(), positions, ids[:, 1:].contiguous()
