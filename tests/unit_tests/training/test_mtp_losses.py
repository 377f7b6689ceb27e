"""Multi-token prediction in training: its labels are counted, its weights are shares of a mean."""

from dataclasses import replace

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.training.mtp_losses import MTPLosses, labels_ahead, with_ahead
from megatron.training.upcycling.widths import fitting_problems
from tests.helpers.layouts import make_batch
from tests.helpers.models import tiny_config
from tools.checkpoint.expert_rules import experts_of


def test_slices_of_a_sequence_count_the_labels_of_the_whole() -> None:
    whole = [with_ahead(make_batch(range(n, n + 2)), 3) for n in (0, 2, 4)]
    counts = labels_ahead(whole, 3)
    masks = torch.cat([batch.loss_mask for batch in whole])
    assert counts == [masks[:, depth:].sum() for depth in (1, 2, 3)]
    shares = [[batch.of_positions(rank, 2) for batch in whole] for rank in (0, 1)]
    by_rank = [labels_ahead(share, 3) for share in shares]
    assert [sum(both) for both in zip(*by_rank, strict=True)] == counts
    assert by_rank[0] != by_rank[1]


def test_a_batch_without_depths_stays_as_it_is() -> None:
    batch = make_batch(range(2))
    assert with_ahead(batch, 0) is batch
    assert (batch.num_depths, labels_ahead([batch], 0)) == (0, [])
    losses = MTPLosses.of_step(tiny_config(), torch.zeros(0), num_microbatches=1, loss_scale=1.0)
    assert losses.of_microbatch(0, batch) is None


def test_depths_share_the_factor_evenly_and_each_by_its_own_labels() -> None:
    config = tiny_config(mtp_num_layers=2, mtp_loss_scaling_factor=0.3)
    counts = torch.tensor([10.0, 4.0], dtype=torch.float64)
    losses = MTPLosses.of_step(config, counts, num_microbatches=2, loss_scale=8.0)
    want = torch.tensor([8 * 0.15 / 10, 8 * 0.15 / 4], dtype=torch.float64)
    torch.testing.assert_close(losses.weights, want)


def test_tools_that_make_or_change_experts_name_multi_token_prediction() -> None:
    dense = tiny_config(mtp_num_layers=1, ffn_hidden_size=16)
    mixture = replace(dense, num_moe_experts=4)
    with pytest.raises(ConfigError, match="--mtp-num-layers 1"):
        experts_of(mixture)
    assert any("--mtp-num-layers 1" in problem for problem in fitting_problems(dense, mixture, 1))
    first = replace(mixture, moe_layer_freq=[1, 0])
    assert experts_of(first) == {0: 4}
    assert not any("--mtp" in problem for problem in fitting_problems(dense, first, 1))


def test_layers_of_multi_token_prediction_are_as_the_last_layer() -> None:
    config = tiny_config(
        num_moe_experts=8,
        moe_num_experts_per_layer=[4, 8],
        moe_router_topk_per_layer=[1, 2],
        mtp_num_layers=2,
        cp_comm_type=["p2p", "all_gather"],
        window_size=[3, 0],
        window_attn_skip_freq=[1, 0],
    )
    assert config.moe_layers == (0, 1, 2, 3)
    assert config.moe_experts_by_layer == (4, 8, 8, 8)
    assert config.moe_topk_by_layer == (1, 2, 2, 2)
    own = config.of_last_layer()
    assert (own.num_moe_experts, own.moe_router_topk) == (8, 2)
    assert (own.cp_comm_type_of(3), own.attention_window_of(3)) == ("all_gather", None)
    assert replace(
        config,
        moe_layer_freq=[1, 0],
        moe_num_experts_per_layer=None,
        moe_router_topk_per_layer=None,
    ).moe_layers == (0,)
