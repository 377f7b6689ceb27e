"""Which blocks of which tensors each rank of a layout reads: models without memory or ranks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.mapping import MODEL, model_tensors
from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import LogicalShard, deferred_init
from megatron.core.pipeline_parallel.layer_homes import stages_of_rank
from megatron.training.config.checks import Check
from megatron.training.config.model_rules import MODEL_RULES
from megatron.training.config.options import options_of
from megatron.training.config.pipeline_rules import PIPELINE_RULES
from megatron.training.config.run_config import RunConfig
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.resume_rules import model_options
from tools.checkpoint.keys import parts_of


def config_at(config: RunConfig, sizes: Mapping[str, int], world_size: int) -> RunConfig:
    """Return ``config`` at another layout.

    Args:
        config: Of a checkpoint.
        sizes: Field of the model's configuration -> size, such as ``tensor_model_parallel_size``.
        world_size: Ranks.

    Raises:
        ConfigError: The model cannot be cut so.
    """
    tp = sizes.get("tensor_model_parallel_size", 1)
    rest = {
        "padded_vocab_size": config.tokenizer.padded_vocab_size,
        "seq_length": config.data.seq_length,
    }
    new = RunConfig.from_flat(
        model_options(config) | rest | dict(sizes) | {"sequence_parallel": tp > 1}
    )
    check = Check(config=new, options=options_of(RunConfig), world_size=world_size)
    rules = (*MODEL_RULES, *PIPELINE_RULES)
    ConfigError.raise_if_any(dict.fromkeys(problem for rule in rules for problem in rule(check)))
    return new


def tensors_of_ranks(
    config: RunConfig, vocab_size: int, layout: ParallelLayout
) -> Iterator[dict[str, Storable]]:
    """Yield for each rank key -> tensor of the model, or its blocks of one; without data.

    Args:
        config: At ``layout``.
        vocab_size: Rows of the embedding.
        layout: The ranks.
    """
    table = GroupTable(layout)
    for rank in range(layout.world_size):
        groups = table.collection(rank)
        with torch.device("meta"), deferred_init():
            model = GPTModel(
                config.model,
                get_gpt_decoder_block_spec(config.model),
                vocab_size=vocab_size,
                max_sequence_length=config.model.max_position_embeddings,
                stages=stages_of_rank(config.model, groups.pp.rank()),
                pg_collection=groups,
            )
        yield model_tensors(model)


def with_states(
    tensors: Mapping[str, Storable], facts: Mapping[str, TensorFacts]
) -> dict[str, Storable]:
    """Add to the tensors of a rank's model the states of its optimizer, and random states.

    Args:
        tensors: Of ``tensors_of_ranks``.
        facts: Every tensor of the checkpoint to write.

    Raises:
        CheckpointError: The checkpoint is not of this model.
    """
    found: dict[str, Storable] = {}
    for key, fact in facts.items():
        parts = parts_of(key)
        if parts.kind == "rng":
            found[key] = torch.empty(fact.shape, dtype=fact.dtype, device="meta")
            continue
        of_weight = tensors.get(MODEL + parts.name)
        if of_weight is None:
            continue  # on another rank
        if tuple(of_weight.shape) != fact.shape:
            raise CheckpointError(f"{key} is {fact}, and {list(of_weight.shape)} in the model")
        found[key] = _like(of_weight, key, fact)
    return found


def refuse_strangers(facts: Mapping[str, TensorFacts], ranks: Sequence[Mapping[str, Any]]) -> None:
    """Refuse tensors that no rank of the model wants.

    Raises:
        CheckpointError: Names them.
    """
    wanted = {key for rank in ranks for key in rank}
    if strangers := sorted(facts.keys() - wanted):
        raise CheckpointError(
            f"{len(strangers)} tensors belong to no weight of the model: {', '.join(strangers[:3])}"
        )


def _like(tensor: Storable, key: str, facts: TensorFacts) -> Storable:
    if not isinstance(tensor, TensorShards):
        return torch.empty(facts.shape, dtype=facts.dtype, device="meta")
    return TensorShards(
        LogicalShard(
            key,
            torch.empty(shard.tensor.shape, dtype=facts.dtype, device="meta"),
            facts.shape,
            shard.offset,
        )
        for shard in tensor.shards
    )
