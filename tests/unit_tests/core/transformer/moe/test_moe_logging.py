"""Expert use: slots, intervals, sums over ranks, and what is said about it."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, MoEReport
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import make_groups


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
    world = dist.get_world_size()
    forwards = 4 * world
    assert report.moe_layers == (1, 3)
    assert report.tokens_per_expert.dtype == torch.int64
    assert report.tokens_per_expert[0].tolist() == [4 * forwards, 2 * forwards, 2 * forwards, 0]
    assert report.tokens_per_expert[1].tolist()[:3] == [2 * forwards] * 3
    assert report.max_violation[0] == pytest.approx(1.0)
    assert report.min_violation[0] == pytest.approx(-1.0)
    assert report.dead_experts == (1, 0)
    assert report.load_balancing_loss == pytest.approx(3.0)  # mean of layers 1 and 3
    assert report.z_loss is None
    assert report.entropy == pytest.approx((0.5, 0.5))
    ratio = {(1, 1): 1.0, (2, 2): 1.5, (4, 2): 1.5, (2, 1): 1.0}[(world, ep)]
    assert report.ep_load_ratio == pytest.approx(ratio)
    assert int(tracker.report(groups).tokens_per_expert.sum()) == 0, "a new interval begins"


@pytest.mark.parametrize(
    ("world_size", "ep", "etp"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)]
)
def test_report_sums_over_microbatches_steps_and_ranks_and_counts_recompute_once(
    world_size, ep, etp
):
    run_ranks(_two_steps, world_size, ep, etp)


def _report(counts: list[list[int]], dropped: tuple[float, ...] | None = None) -> MoEReport:
    return MoEReport(
        moe_layers=tuple(range(len(counts))),
        tokens_per_expert=torch.tensor(counts),
        load_balancing_loss=1.25,
        z_loss=None,
        max_violation=tuple(max(c) / (sum(c) / len(c)) - 1 for c in counts),
        min_violation=tuple(min(c) / (sum(c) / len(c)) - 1 for c in counts),
        dead_experts=tuple(c.count(0) for c in counts),
        entropy=(0.5,) * len(counts),
        dropped_fraction=dropped,
        ep_load_ratio=1.0,
    )


def test_lines_show_every_layer_and_no_warning_when_all_is_well():
    lines = _report([[3, 3, 2, 4], [3, 3, 3, 3]]).lines()
    assert len(lines) == 2
    assert lines[0].startswith("MoE layer 0: tokens/expert [3 3 2 4] | max violation +33.3%")


def test_dead_experts_and_collapse_are_warned_of_by_layer():
    lines = _report([[3, 3, 3, 3], [12, 0, 0, 0]]).warnings()
    assert lines[0].startswith("experts without tokens in MoE layers 1 (3 of 4)")
    assert lines[1].startswith("routing collapses in MoE layers 1 (4.0 x the mean)")
    assert _report([[3, 3, 2, 4], [3, 3, 3, 3]]).warnings() == []


def test_many_experts_are_shown_as_a_range():
    assert "min 1 median 32 max 64 of 64 experts" in _report([list(range(1, 65))]).lines()[0]


def test_scalars_leave_out_what_is_off_and_name_each_layer():
    scalars = _report([[3, 3, 2, 4]]).scalars()
    assert scalars["moe/load_balancing_loss"] == 1.25
    assert scalars["moe/layer_0/dead_experts"] == 0.0
    assert "moe/z_loss" not in scalars
    assert all(isinstance(value, float) for value in scalars.values())
    assert not any("dropped" in name for name in scalars)


def test_the_dropped_share_is_in_the_lines_and_scalars():
    report = _report([[3, 3, 2, 4], [12, 0, 0, 0]], dropped=(0.0, 0.25))
    assert report.lines()[1].endswith("dropped 25.00%")
    assert report.scalars()["moe/layer_1/dropped_fraction"] == 0.25
    assert report.scalars()["moe/dropped_fraction_mean"] == 0.125


def _dropped() -> None:
    tracker = MoEMetricsTracker([1, 3], 4, 2, 2, "cpu")
    for microbatch in range(2):
        for _recompute in range(2):
            _record(tracker, 1, microbatch, [4, 2, 2, 0])
            _record(tracker, 3, microbatch, [4, 2, 2, 0])
            share = torch.tensor(0.25 * microbatch + 0.5 * dist.get_rank())
            tracker.record_dropped(3, microbatch, share)
    tracker.end_step()
    report = tracker.report(make_groups(1))
    assert report.dropped_fraction == pytest.approx((0.0, 0.375))
    assert report.entropy == pytest.approx((0.5, 0.5))


def test_the_dropped_share_is_a_mean_over_microbatches_and_ranks():
    run_ranks(_dropped, 2)
