"""What a report says: figures from counts, lines, warnings, scalars."""

import math

import pytest
import torch

from megatron.core.transformer.moe.moe_report import LayerUse, MoEReport


def _use(layer: int, counts: list[int], **options) -> LayerUse:
    options = {"topk": 2, "means": {"entropy": 0.5, "load_balancing_loss": 1.25}} | options
    return LayerUse(layer=layer, tokens_per_expert=torch.tensor(counts), **options)


def _report(*rows: list[int], **options) -> MoEReport:
    return MoEReport(tuple(_use(layer, counts, **options) for layer, counts in enumerate(rows)))


def test_figures_follow_from_the_counts():
    use = _use(3, [8, 4, 4, 0], ep_blocks=2)
    assert use.max_violation == 1.0
    assert use.min_violation == -1.0
    assert use.variation == pytest.approx(math.sqrt(8) / 4)
    assert use.dead_experts == 1
    assert use.ep_load_ratio == 1.5
    none = _use(3, [0, 0, 0, 0], ep_blocks=2)
    assert (none.max_violation, none.variation, none.ep_load_ratio) == (0.0, 0.0, 1.0)


def test_a_line_shows_every_figure_of_a_layer():
    use = _use(
        2, [3, 3, 2, 4], ep_blocks=2, expert_bias=(-0.01, 0.02), left_out=1,
        means={"entropy": 0.5, "dropped_fraction": 0.25},
    )  # fmt: skip
    assert use.line() == (
        "MoE layer 2: tokens/expert [3 3 2 4] | max violation +33.3% | min violation -33.3% | "
        "std/mean 0.236 | dead experts 0 | entropy 0.500 nats | busiest EP rank 1.00 x mean | "
        "bias -0.0100 to +0.0200 | dropped 25.00% | not finite and left out: 1 microbatches"
    )


def test_many_experts_are_shown_as_a_range():
    assert "min 1 median 32 max 64 of 64 experts" in _report(list(range(1, 65))).lines()[0]


def test_layers_of_different_sizes_and_topk_each_have_their_own_line():
    report = MoEReport((_use(0, [1, 1]), _use(4, [2, 2, 2], topk=3)))
    assert [line.split(" |")[0] for line in report.lines()] == [
        "MoE layer 0: tokens/expert [1 1]",
        "MoE layer 4: tokens/expert [2 2 2]",
        "all 2 MoE layers: max violation +0.0%",
    ]


def test_the_last_line_sums_up_all_layers():
    uses = [
        _use(0, [3, 3, 2, 4], ep_blocks=2, expert_bias=(-0.01, 0.0), left_out=1),
        _use(1, [8, 4, 4, 0], ep_blocks=2, expert_bias=(0.0, 0.03), left_out=2,
             means={"entropy": 1.5, "dropped_fraction": 0.25}),
    ]  # fmt: skip
    assert MoEReport(tuple(uses)).lines()[-1] == (
        "all 2 MoE layers: max violation +100.0% | min violation -100.0% | mean std/mean 0.471 | "
        "dead experts 1 | mean entropy 1.000 nats | busiest EP rank 1.50 x mean | "
        "bias -0.0100 to +0.0300 | mean dropped 25.00% | "
        "not finite and left out: 3 microbatches"
    )
    assert len(MoEReport((uses[0],)).lines()) == 1


def test_all_is_well_without_a_warning():
    assert _report([3, 3, 2, 4], [3, 3, 3, 3], ep_blocks=2).warnings() == []


def test_dead_experts_and_collapse_are_warned_of_by_layer():
    lines = _report([3, 3, 3, 3], [12, 0, 0, 0], topk=1).warnings()
    assert lines[0].startswith("experts without tokens in MoE layers 1 (3 of 4)")
    assert lines[1].startswith("routing collapses in MoE layers 1 (4.0 x the mean)")


@pytest.mark.parametrize(
    ("counts", "topk", "is_bad"),
    [
        ([100, 100, 0, 0], 2, True),  # the worst that top-2 of 4 can be: 2 x the mean
        ([97, 93, 5, 5], 2, True),
        ([85, 75, 20, 20], 2, False),
        ([95, 5], 1, True),
        ([80, 20], 1, False),
        ([50, 50, 50], 3, False),  # every token at every expert
        ([30] + [10] * 63, 8, False),
        ([31] + [10] * 63, 8, True),
    ],
)
def test_a_collapse_is_judged_by_how_uneven_topk_can_be(counts, topk, is_bad):
    assert _use(0, counts, topk=topk).is_collapsing == is_bad


@pytest.mark.parametrize(
    ("counts", "ep", "is_bad"),
    [
        ([30, 30, 10, 10, 0, 0, 0, 0], 2, True),  # all on one of two ranks
        ([30, 30, 10, 10, 5, 5, 5, 5], 2, True),
        ([20, 20, 10, 10, 10, 10, 10, 10], 2, False),
        ([25, 25, 10, 10, 5, 5, 5, 5], 4, True),
        ([15, 15, 10, 10, 5, 5, 10, 10], 4, False),
        ([30, 30, 10, 10, 0, 0, 0, 0], 1, False),
    ],
)
def test_a_rank_is_overloaded_from_half_of_the_worst_or_twice_the_mean(counts, ep, is_bad):
    report = _report(counts, ep_blocks=ep)
    assert any("ranks are unevenly loaded" in text for text in report.warnings()) == is_bad


def test_scalars_leave_out_what_is_off_and_name_each_layer():
    report = _report([3, 3, 2, 4], [3, 3, 3, 3])
    scalars = report.scalars()
    assert scalars["moe/load_balancing_loss"] == 1.25
    assert scalars["moe/layer_1/dead_experts"] == 0.0
    assert scalars["moe/variation_mean"] == pytest.approx(scalars["moe/layer_0/variation"] / 2)
    assert all(isinstance(value, float) for value in scalars.values())
    for name in ("z_loss", "seq_", "global_", "dropped", "bias", "_layer_0"):
        assert not any(name in key for key in scalars), name


def test_the_losses_of_each_layer_are_there_when_asked_for():
    report = MoEReport(tuple(_use(i, [1, 1], means={"z_loss": 0.5 * i}) for i in range(2)))
    extra = report.scalars(per_layer_losses=True).items() - report.scalars().items()
    assert extra == {("moe/z_loss_layer_0", 0.0), ("moe/z_loss_layer_1", 0.5)}


def test_negative_and_nan_averages_do_not_vanish():
    means = [{"z_loss": -0.5}, {"z_loss": math.nan}]
    report = MoEReport(tuple(_use(i, [1, 1], means=m) for i, m in enumerate(means)))
    assert report.losses() == {"z_loss": -0.5}
    assert math.isnan(report.scalars(per_layer_losses=True)["moe/z_loss_layer_1"])
    nothing = MoEReport((_use(0, [1, 1], means=means[1]),))
    assert math.isnan(nothing.losses()["z_loss"])


def test_biases_and_drops_are_summed_up_over_layers():
    report = MoEReport(
        tuple(
            _use(i, [1, 1], expert_bias=(-0.1 * i, 0.2), means={"dropped_fraction": 0.5 * i})
            for i in range(2)
        )
    )
    scalars = report.scalars()
    assert (scalars["moe/expert_bias_min"], scalars["moe/expert_bias_max"]) == (-0.1, 0.2)
    assert scalars["moe/dropped_fraction_mean"] == 0.25
    assert scalars["moe/layer_1/dropped_fraction"] == 0.5
