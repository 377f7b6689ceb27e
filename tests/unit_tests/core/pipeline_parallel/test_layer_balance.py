"""The cut is the best there is, by trying all; costs add up to the operations of a model."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.pipeline_parallel.layer_balance import estimated_costs, minimax_partition
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.throughput import flops_per_token


def by_trying_all(costs, num_stages):
    """Return the least (largest stage, sum of squares) of all cuts."""
    best = None
    for inner in combinations(range(1, len(costs)), num_stages - 1):
        sums = [sum(costs[a:b]) for a, b in pairwise((0, *inner, len(costs)))]
        value = (max(sums), sum(s * s for s in sums))
        best = value if best is None else min(best, value)
    return best


@given(costs=st.lists(st.integers(0, 9), min_size=1, max_size=9), data=st.data())
@settings(deadline=None)
def test_no_cut_is_better(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    cuts = minimax_partition(costs, num_stages)
    assert cuts[0] == 0
    assert cuts[-1] == len(costs)
    assert all(begin < end for begin, end in pairwise(cuts))
    sums = [sum(costs[a:b]) for a, b in pairwise(cuts)]
    assert (max(sums), sum(s * s for s in sums)) == by_trying_all(costs, num_stages)


def test_equal_parts_that_do_not_divide_make_the_first_stages_longer():
    assert minimax_partition([1.0] * 7, 3) == (0, 3, 5, 7)
    assert minimax_partition([0.1] * 13, 4) == (0, 4, 7, 10, 13)


def test_stages_below_the_largest_are_even_too():
    assert minimax_partition([10, 1, 1, 1, 1], 3) == (0, 1, 3, 5)


def test_the_largest_stage_comes_before_the_sum_of_squares():
    # 3 | 2 5 | 1 has the least sum of squares, but 3 2 | 5 | 1 the least largest stage.
    assert minimax_partition([3, 2, 5, 1], 3) == (0, 2, 3, 4)


def test_more_stages_than_parts_are_refused():
    with pytest.raises(AssertionError, match="num_stages=3"):
        minimax_partition([1.0, 1.0], 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swiglu": True, "num_query_groups": 2, "group_query_attention": True},
        {"num_moe_experts": 8, "moe_router_topk": 3, "moe_layer_freq": [0, 1, 1]},
        {
            "num_moe_experts": 8,
            "moe_shared_expert_intermediate_size": 48,
            "moe_ffn_hidden_size": 24,
        },
        {"num_moe_experts": 8, "moe_latent_size": 16},
        {"window_size": [9, 0], "window_attn_skip_freq": [1, 1, 0]},
        {"num_moe_experts": 8, "moe_layer_freq": [0, 0, 1], "mtp_num_layers": 2},
    ],
)
def test_estimated_costs_are_the_operations_that_throughput_counts(options):
    config = TransformerConfig(
        num_layers=3, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, **options
    )
    costs = estimated_costs(config, seq_length=96, vocab_size=1000)
    counted = flops_per_token(config, seq_length=96, vocab_size=1000) / 6
    assert sum(costs.layers) + costs.head == pytest.approx(counted)
    assert costs.embedding == 64
