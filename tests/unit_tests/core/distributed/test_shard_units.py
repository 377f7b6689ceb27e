from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron.core.distributed.shard_units import Unit, block_along, shard_units, split_dim
from tests.helpers.models import tiny_config, tiny_gpt

MOE = {"num_moe_experts": 4, "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 16}


def own_parameters(units: list[Unit]) -> list[list[nn.Parameter]]:
    """What each unit shares out: all in it that no unit before it did."""
    taken: set[nn.Parameter] = set()
    found = []
    for unit in units:
        own = [param for param in unit.module.parameters() if param not in taken]
        taken.update(own)
        found.append(own)
    return found


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
def test_experts_are_units_of_their_own_within_their_layer(kind):
    model = tiny_gpt(tiny_config(**MOE, moe_experts_type=kind))
    units = shard_units(model)
    layers = list(model.decoder.layers.values())
    assert [unit.module for unit in units] == [layers[0], layers[1].mlp.experts, layers[1], model]
    assert [unit.is_expert for unit in units] == [False, True, False, False]
    owned = own_parameters(units)
    assert sum(map(len, owned)) == len(list(model.parameters()))
    assert set(owned[1]) == set(layers[1].mlp.experts.parameters())
    assert set(layers[1].mlp.shared_experts.parameters()) <= set(owned[2])


def test_tied_embeddings_stay_with_the_model_that_reads_them_at_both_ends():
    model = tiny_gpt(tiny_config())
    owned = own_parameters(shard_units(model))
    rest = {*model.embedding.parameters(), *model.decoder.final_layernorm.parameters()}
    assert set(owned[-1]) == rest


def test_embedding_and_output_layer_are_units_if_each_has_a_weight():
    model = tiny_gpt(tiny_config(untie_embeddings_and_output_weights=True))
    units = shard_units(model)
    ends = {unit.module: unit.methods for unit in units[-3:-1]}
    assert ends == {model.embedding: (), model.output_layer: ("loss",)}
    assert set(own_parameters(units)[-1]) == set(model.decoder.final_layernorm.parameters())


@given(st.integers(0, 200), st.integers(1, 40))
def test_blocks_tile_a_dimension_in_rank_order(size, ranks):
    blocks = [block_along(size, rank, ranks) for rank in range(ranks)]
    assert [blocks[0][0], blocks[-1][1]] == [0, size]
    assert all(one[1] == other[0] for one, other in pairwise(blocks))
    assert all(start <= end <= start + -(-size // ranks) for start, end in blocks)


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [((8, 48, 16), 4, 0), ((2, 48, 16), 4, 1), ((2, 9, 16), 4, 2), ((2, 9, 3), 4, 0), ((7,), 1, 0)],
)
def test_experts_are_split_along_the_first_dimension_that_divides(shape, ranks, dim):
    assert split_dim(shape, ranks) == dim
