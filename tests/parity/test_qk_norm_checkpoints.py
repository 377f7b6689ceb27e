"""R2: norms of queries and keys go from any number of tensor-parallel ranks to any other."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from tests.helpers.models import MAX_LENGTH, tiny_config
from tests.helpers.ranks import run_ranks


def _model(scope: str) -> GPTModel:
    config = tiny_config(
        qk_layernorm=True,
        qk_layernorm_scope=scope,
        normalization="RMSNorm",
        group_query_attention=True,
        num_query_groups=2,
        tensor_model_parallel_size=dist.get_world_size(),
    )
    groups = ProcessGroupCollection.create(config.layout(dist.get_world_size()))
    model = GPTModel(
        config, get_gpt_decoder_block_spec(config), 48, MAX_LENGTH, pg_collection=groups
    )
    init_weights(model, 7)
    return model


def _move(scope: str, source: str | None, target: str) -> None:
    """Load ``source``, or make every element of the norms another; save to ``target``."""
    model = _model(scope)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_() if source else param.mul_(3.0)
        for number, layer in enumerate(model.decoder.layers.values() if source is None else ()):
            for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
                norm.weight += torch.linspace(number, number + 1, len(norm.weight))
    if source is not None:
        read_tensors(Path(source), model_tensors(model), dist.group.WORLD, prefixes=("model.",))
    write_tensors(Path(target), model_tensors(model), dist.group.WORLD)
    ids = torch.arange(20).view(2, 10)
    logits = model(ids, torch.arange(10).expand(2, 10)).detach()
    if dist.get_rank() == 0:
        torch.save(logits, Path(target) / "logits.pt")


@pytest.mark.parametrize("scope", [pytest.param("head", marks=pytest.mark.slow), "all_heads"])
def test_a_norm_saved_on_one_rank_is_the_same_on_two_and_four(tmp_path, scope):
    previous, logits = None, []
    for ranks in (1, 4, 1, 2):
        folder = tmp_path / f"{len(logits)}"
        folder.mkdir()
        run_ranks(_move, ranks, scope, previous, str(folder))
        logits.append(torch.load(folder / "logits.pt"))
        previous = str(folder)
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() <= 1e-12 * logits[0].abs().max()
    assert torch.equal(logits[2], logits[0])
