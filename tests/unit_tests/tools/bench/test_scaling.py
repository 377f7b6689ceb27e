"""Curves of ``tools/bench/scaling.py``: what a point should cost, and what the page says."""

import argparse

import pytest

from tools.bench.scaling import CURVES, VALUES, Measured, Point, parse, points, row_of
from tools.bench.scaling_page import experts_growth, write_page


def _measured(experts: int, fb: float, weights: float, flops: float, parameters: int) -> Measured:
    seconds = {"step": fb + weights, "fb": fb, "weights": weights}
    growth = {"step": (fb + weights) / 1.0, "fb": fb / 0.8, "weights": weights / 0.2}
    return Measured(Point(experts, 2, experts, 16, 4, 1), seconds, growth, flops, parameters)


FIRST = _measured(8, 0.8, 0.2, 1e9, 1_000_000)


def test_growth_as_expected_costs_one() -> None:
    row = row_of("layers", "fp32", FIRST, _measured(16, 1.6, 0.6, 2e9, 3_000_000))
    assert row["expected"] == pytest.approx(0.8 * 2 + 0.2 * 3)
    for key in ("cost", "cost_fb", "cost_over_weights"):
        assert row[key] == pytest.approx(1.0)


def test_slower_products_show_in_their_own_part_only() -> None:
    row = row_of("layers", "fp32", FIRST, _measured(16, 2.4, 0.6, 2e9, 3_000_000))
    assert row["cost_fb"] == pytest.approx(1.5)
    assert row["cost_over_weights"] == pytest.approx(1.0)
    assert row["cost"] == pytest.approx(3.0 / 2.2)


def test_rates_are_those_of_the_point() -> None:
    row = row_of("layers", "fp32", FIRST, _measured(16, 2.0, 0.5, 3e9, 1_000_000))
    assert row["gflops"] == pytest.approx(1.5)
    assert row["gb_per_s"] == pytest.approx(36e6 / 0.5 * 1e-9)
    assert row["weights_in_fb_ms"] == pytest.approx(1e3 * 16 / 36 * 0.5)


def test_sequences_have_equal_tokens_and_experts_equal_active_size() -> None:
    tokens = {p.sequence * p.samples for p in points("sequence", VALUES["sequence"], sequence=512)}
    assert tokens == {4096}
    for curve in CURVES[3:]:
        found = points(curve, VALUES["experts"], sequence=512)
        assert [p.experts for p in found] == [8, 16, 32, 64, 128, 256]
        assert {(p.layers, p.samples, p.sequence) for p in found} == {(2, 4, 512)}
    assert {p.microbatches for p in found} == {4}


def test_the_page_says_what_more_experts_cost(tmp_path) -> None:
    many = _measured(64, 0.88, 0.6, 1e9, 4_000_000)
    rows = [row_of("experts", "fp32", FIRST, one) for one in (FIRST, many)]
    (growth,) = experts_growth(rows)
    assert growth["one"] == pytest.approx(1.48)
    assert growth["fb"] == pytest.approx(1.1)
    assert growth["weights"] == pytest.approx(4.0)
    in_fb = 16 / 36 * (0.6 - 0.2)
    assert growth["memory"] == pytest.approx(1 + 0.4 + in_fb)
    write_page(tmp_path / "scaling.md", rows, argparse.Namespace(**vars(parse([]))))
    text = (tmp_path / "scaling.md").read_text()
    assert "| fp32 | 1.48 | - | 1.1 | 4 |" in text
    assert "| 64 | 4 |" in text
