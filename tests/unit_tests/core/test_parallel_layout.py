"""Nodes: which expert-parallel ranks share one, and which stand at the same place of others."""

import pytest

from megatron.core.errors import ConfigError
from megatron.core.parallel_layout import ParallelLayout, rank_groups


def test_nodes_cut_expert_groups_into_places_and_nodes():
    layout = ParallelLayout(world_size=8, ep=4, node_size=2)
    assert rank_groups(layout.node_grid(), ("ep_node",)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rank_groups(layout.node_grid(), ("ep_across",)) == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("node_size", [None, 4, 8])
def test_a_group_within_a_node_is_not_cut(node_size):
    whole = ParallelLayout(world_size=8, ep=4, node_size=node_size)
    assert rank_groups(whole.node_grid(), ("ep_node",)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rank_groups(whole.node_grid(), ("ep_across",)) == [[rank] for rank in range(8)]


def test_nodes_that_cut_groups_unevenly_are_refused():
    with pytest.raises(ConfigError, match="nodes of 3 ranks"):
        ParallelLayout(world_size=8, ep=4, node_size=3)
