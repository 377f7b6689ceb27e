"""Where the time of two ranks goes, on made-up steps; calls of real ranks, timed."""

import argparse

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tools.bench.comm_clock import Spent, by_op, timed_collectives, transfer_and_waiting
from tools.bench.two_ranks import Round, StepSeconds, bubble, parse, parts_of, rows_of
from tools.bench.two_ranks_page import write_page


def _step(wall: float, *calls: Spent) -> StepSeconds:
    return StepSeconds(wall, wall, wall + 0.1, 0.2, list(calls))


ONE = _step(8.0)
RANKS = [
    _step(6.0, Spent("all_reduce", 100, 0.5), Spent("isend", 8, 0.25)),
    _step(5.5, Spent("all_reduce", 100, 1.0), Spent("irecv", 8, 0.25)),
]


def test_the_last_rank_shows_the_transfer_and_the_first_one_waits() -> None:
    assert transfer_and_waiting([rank.calls for rank in RANKS]) == [(0.5, 0.25), (0.5, 0.75)]


def test_other_collectives_on_the_other_rank_are_refused() -> None:
    with pytest.raises(AssertionError, match="different collectives"):
        transfer_and_waiting([[Spent("all_reduce", 1, 1.0)], [Spent("broadcast", 1, 1.0)]])


def test_parts_are_shares_of_the_slower_rank() -> None:
    parts = parts_of(ONE, RANKS, 0.5)
    assert parts["efficiency"] == pytest.approx(4.0 / 6.0)
    own = ((6.0 - 0.75) + (5.5 - 1.25)) / 2
    assert parts["extra"] == pytest.approx((own - 4.0) / 6.0)
    assert parts["transfer"] == pytest.approx(0.5 / 6.0)
    assert parts["waiting"] == pytest.approx(0.5 / 6.0)
    whole = sum(parts[key] for key in ("efficiency", "extra", "transfer", "waiting"))
    assert whole == pytest.approx((6.0 + 5.5) / 2 / 6.0)
    assert parts["over_weights"] == pytest.approx(0.2 / 6.0)
    assert parts["gloo_threads"] == pytest.approx(0.1 / 6.0)


def test_strong_and_weak_scaling_have_a_row_each() -> None:
    slower = [rank._replace(wall=10.0) for rank in RANKS]
    strong, weak = rows_of("pp2", "fp32", [Round(ONE, RANKS, slower)])
    assert (strong["scaling"], weak["scaling"]) == ("strong", "weak")
    assert strong["efficiency"] == pytest.approx(4.0 / 6.0)
    assert weak["efficiency"] == pytest.approx(0.8)
    assert (strong["one_rank_ms"], strong["step_ms"]) == (8000, 6000)
    assert strong["calls"] == 2
    (alone,) = rows_of("alone", "fp32", [Round(ONE, [], [_step(9.0), _step(10.0)])])
    assert alone["efficiency"] == pytest.approx(0.8)
    assert alone["waiting"] == 0.0


def test_a_pipeline_is_idle_at_its_ends() -> None:
    assert bubble("pp2", 4) == pytest.approx(0.2)
    assert bubble("dp2", 4) is None
    assert bubble("alone", 4) is None


def test_the_page_names_layouts_and_calls(tmp_path) -> None:
    rows = rows_of("pp2", "fp32", [Round(ONE, RANKS, RANKS)])
    rows = [row | {"bubble": 0.2} for row in rows]
    write_page(tmp_path / "two.md", rows, argparse.Namespace(**vars(parse([]))))
    text = (tmp_path / "two.md").read_text()
    assert "| PP 2 | strong | 8000 | 6000 | 0.667 |" in text
    assert "| PP 2 | all_reduce | 1 |" in text


def _calls_are_timed() -> None:
    x = torch.ones(4, dtype=torch.float64)
    plain = dist.all_reduce
    with timed_collectives() as calls:
        dist.all_reduce(x)
        work = dist.all_reduce(x, async_op=True)
        begun = calls[1].seconds
        work.wait()
        assert work.is_completed()
        dist.broadcast(x, src=0)
    assert dist.all_reduce is plain
    assert x[0] == 4.0
    assert [one.op for one in calls] == ["all_reduce", "all_reduce", "broadcast"]
    assert [one.size_bytes for one in calls] == [32, 32, 32]
    assert calls[1].seconds > begun > 0
    assert by_op(calls)["all_reduce"][:2] == (2, 64)


def test_calls_and_waits_of_ranks_are_timed() -> None:
    run_ranks(_calls_are_timed, 2)
