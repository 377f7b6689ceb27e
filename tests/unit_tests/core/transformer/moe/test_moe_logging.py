"""Expert use: slots, intervals, sums over ranks, what is not finite."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

NAN = math.nan


def _record(tracker: MoEMetricsTracker, layer: int, microbatch: int, counts: list[int]) -> None:
    tracker.record(
        layer,
        microbatch,
        tokens_per_expert=torch.tensor(counts),
        load_balancing_loss=torch.tensor(1.0 + layer),
        z_loss=None,
        entropy=torch.tensor(0.5),
    )


def _two_steps(ep: int, etp: int) -> None:
    groups = make_groups(ep, etp=etp)
    tracker = MoEMetricsTracker([1, 3], 4, 2, 2, "cpu")
    for _ in range(2):
        for microbatch in range(2):
            for _recompute in range(2):
                _record(tracker, 1, microbatch, [4, 2, 2, 0])
                _record(tracker, 3, microbatch, [2, 2, 2, 2 + 4 * dist.get_rank()])
        tracker.end_step()
    report = tracker.report(groups)
    first, second = report.layers
    world = dist.get_world_size()
    forwards = 4 * world
    assert (first.layer, second.layer) == (1, 3)
    assert first.tokens_per_expert.dtype == torch.int64
    assert first.tokens_per_expert.tolist() == [4 * forwards, 2 * forwards, 2 * forwards, 0]
    assert second.tokens_per_expert.tolist()[:3] == [2 * forwards] * 3
    assert first.max_violation == pytest.approx(1.0)
    assert report.losses() == {"load_balancing_loss": pytest.approx(3.0)}  # layers 1 and 3
    assert first.means == {"load_balancing_loss": 2.0, "entropy": 0.5}
    assert report.ep_load_ratio == pytest.approx(1.0 if ep == 1 else 1.5)
    again = tracker.report(groups)
    assert sum(int(x.tokens_per_expert.sum()) for x in again.layers) == 0, "a new interval begins"


@pytest.mark.parametrize(
    ("world_size", "ep", "etp"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)]
)
def test_report_sums_over_microbatches_steps_and_ranks_and_counts_recompute_once(
    world_size, ep, etp
):
    run_ranks(_two_steps, world_size, ep, etp)


def _dropped() -> None:
    tracker = MoEMetricsTracker([1, 3], 4, 2, 2, "cpu")
    for microbatch in range(2):
        for _recompute in range(2):
            _record(tracker, 1, microbatch, [4, 2, 2, 0])
            _record(tracker, 3, microbatch, [4, 2, 2, 0])
            share = torch.tensor(0.25 * microbatch + 0.5 * dist.get_rank())
            tracker.record_dropped(3, microbatch, share)
    tracker.end_step()
    first, second = tracker.report(make_groups(1)).layers
    assert "dropped_fraction" not in first.means
    assert second.means["dropped_fraction"] == pytest.approx(0.375)


def test_the_dropped_share_is_a_mean_over_microbatches_and_ranks():
    run_ranks(_dropped, 2)


def _not_finite() -> None:
    rank, groups = dist.get_rank(), make_groups(1)
    tracker = MoEMetricsTracker([0, 5], 2, 1, 2, "cpu")
    for step in range(3):
        for microbatch in range(2):
            bad = step == 1 and microbatch == 1 and rank == 1
            tracker.record(
                0,
                microbatch,
                tokens_per_expert=torch.tensor([8, 0] if bad else [3, 5]),
                entropy=torch.tensor(NAN if bad else 0.25),
                z_loss=torch.tensor(NAN if bad else 2.0 + rank),
            )
            tracker.record(
                5,
                microbatch,
                tokens_per_expert=torch.tensor([4, 4]),
                entropy=torch.tensor(0.5),
                z_loss=torch.tensor(math.inf if bad else 4.0),
            )
        tracker.end_step()
    first, last = tracker.report(groups).layers
    assert first.tokens_per_expert.tolist() == [33, 55], (
        "11 of 12: counts of NaN logits say nothing"
    )
    assert first.means == {"entropy": 0.25, "z_loss": pytest.approx((6 * 2 + 5 * 3) / 11)}
    assert last.tokens_per_expert.tolist() == [48, 48], "only its z-loss overflowed"
    assert last.means == {"entropy": 0.5, "z_loss": 4.0}
    assert (first.left_out, last.left_out) == (1, 1)
    assert "left out: 1 microbatches" in first.line()


def test_one_bad_step_on_one_rank_is_counted_and_left_out_of_the_interval():
    run_ranks(_not_finite, 2)


def _all_bad() -> None:
    tracker = MoEMetricsTracker([0], 2, 1, 1, "cpu")
    tracker.record(0, 0, tokens_per_expert=torch.tensor([2, 0]), entropy=torch.tensor(NAN))
    tracker.end_step()
    (use,) = tracker.report(make_groups(1)).layers
    assert math.isnan(use.means["entropy"])
    assert use.left_out == 1
    assert "entropy nan nats" in use.line()


def test_an_interval_without_a_finite_value_says_nan():
    run_ranks(_all_bad, 1)


def _padding_only() -> None:
    tracker = MoEMetricsTracker([0], 2, 1, 2, "cpu")
    tracker.record(
        0, 0, tokens_per_expert=torch.tensor([3, 1]), entropy=torch.tensor(0.5),
        z_loss=torch.tensor(2.0), load_balancing_loss=torch.tensor(1.5),
    )  # fmt: skip
    tracker.record(
        0, 1, tokens_per_expert=torch.tensor([0, 0]), entropy=torch.tensor(0.0),
        z_loss=torch.tensor(0.0), load_balancing_loss=torch.tensor(0.0),
    )  # fmt: skip
    tracker.end_step()
    (use,) = tracker.report(make_groups(1)).layers
    # the z-loss is a sum over the tokens of the step over the mean number of a microbatch
    assert use.means == {"entropy": 0.5, "z_loss": 1.0, "load_balancing_loss": 1.5}
    assert use.left_out == 0


def _reported_z_loss(masks: list[list[bool]]) -> float:
    config = moe_config(moe_z_loss_coeff=0.1, fp64=True)
    groups = make_groups(1)
    layer = make_layer(config, groups, make_reference(config))
    tracker = MoEMetricsTracker([1], NUM_EXPERTS, 2, len(masks), "cpu")
    valid = len(masks[0]) * len(masks) - sum(map(sum, masks))
    tokens = make_tokens(len(masks[0]) * len(masks), torch.float64)
    for index, part in enumerate(tokens.view(len(masks), -1, 1, H)):
        context = ForwardContext(
            microbatch=index,
            moe_metrics=tracker,
            padding_mask=torch.tensor(masks[index]).unsqueeze(0),
            mean_valid_tokens=torch.tensor(valid / len(masks)),
        )
        layer(part, context)
    tracker.end_step()
    return tracker.report(groups).losses()["z_loss"]


def _mean_over_tokens() -> None:
    whole = _reported_z_loss([[False] * 3 + [True] * 9])
    for size in (3, 4):
        masks = torch.arange(12).ge(3).view(-1, size).tolist()
        assert _reported_z_loss(masks) == pytest.approx(whole, rel=1e-12)


def test_the_z_loss_told_is_the_mean_over_all_tokens_however_they_are_split():
    run_ranks(_mean_over_tokens, 1)


def test_a_microbatch_of_padding_is_in_no_mean():
    run_ranks(_padding_only, 1)


def _ragged(ep: int) -> None:
    groups, rank = make_groups(ep), dist.get_rank()
    tracker = MoEMetricsTracker([0, 2], [2, 6], [1, 3], 1, "cpu")
    for _recompute in range(2):
        tracker.record(
            0, 0, tokens_per_expert=torch.tensor([3, 1]), expert_bias=torch.tensor([-0.5, 0.25])
        )
        counts = torch.tensor([1, 2, 3, 2, 2, 2])
        tracker.record(2, 0, tokens_per_expert=counts, entropy=torch.tensor(1.0 + rank))
        best = tracker.counts_so_far(0, 0, torch.tensor([4, 0]))
    assert best.tolist() == [4, 0]
    world = dist.get_world_size()
    sums = tracker.step_counts(groups.dp_cp)
    assert sums[0].tolist() == [3 * world, world]
    assert sums[2].tolist() == [world * count for count in counts.tolist()]
    tracker.end_step()
    small, large = tracker.report(groups).layers
    assert small.tokens_per_expert.tolist() == [3 * world, world]
    assert (small.topk, large.topk) == (1, 3)
    assert small.dead_experts == large.dead_experts == 0, "padding is no expert"
    assert small.expert_bias == (-0.5, 0.25)
    assert large.expert_bias is None
    assert small.means == {}
    assert large.means == {"entropy": (1 + world) / 2}
    if ep == 2:
        assert small.ep_load_ratio == 1.5
        assert large.ep_load_ratio == 1.0


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2)])
def test_layers_may_differ_in_experts_topk_and_what_they_record(world_size, ep):
    run_ranks(_ragged, world_size, ep)
