"""Another layout: exact where it must be, near elsewhere, and looser only after a tie."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit_tests.tools.resume.records_made_by_hand import BEGIN, END, Run
from tools.resume.other_layouts import AFTER_TIES, TOLERANCES, Errors, Outcome, Span, judge
from tools.resume.record_names import LOADED, after_step_folder

WEIGHT = "weight.decoder.layers.0.norm.weight"


def judged(tmp_path: Path, change: Callable[[Run], object], precision: str = "float32") -> Outcome:
    want, got = Run(begin=0), Run(begin=BEGIN)
    change(got)
    records = want.write(tmp_path / "want"), got.write(tmp_path / "got")
    return judge(*records, Span(BEGIN, END), precision, layout="another", seconds=1.0)


def scaled(name: str, iteration: int, factor: float) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for rank in range(2):
            run.step(rank, iteration)[name] *= factor

    return change


def test_the_same_values_pass_without_any_error(tmp_path: Path) -> None:
    outcome = judged(tmp_path, lambda run: None, "float64")
    assert outcome.passes
    assert outcome.errors == Errors(0.0, 0.0, 0.0, 0.0)
    assert outcome.tie is None


def test_samples_may_be_read_by_other_ranks_but_must_be_the_same(tmp_path: Path) -> None:
    def swapped(run: Run) -> None:
        lines = [run.step(rank, 4) for rank in range(2)]
        lines[0]["samples"], lines[1]["samples"] = lines[1]["samples"], lines[0]["samples"]

    assert judged(tmp_path / "a", swapped).passes
    other = judged(tmp_path / "b", lambda run: run.step(0, 4)["samples"].pop())
    assert not other.passes
    assert [one.item.name for one in other.exact.causes()] == ["sample ids"]


def test_slices_of_a_sequence_are_added_and_copies_left_out(tmp_path: Path) -> None:
    def sliced(run: Run) -> None:
        run.lines[1][0]["cp"] = 1
        for step in (3, 4):
            whole = Run(begin=0)
            both = [sample for rank in range(2) for sample in whole.step(rank, step)["samples"]]
            run.step(0, step)["samples"] = [[sample, print_ - 400] for sample, print_ in both]
            run.step(1, step)["samples"] = [[sample, 400] for sample, _ in both]

    assert judged(tmp_path / "a", sliced).passes

    def copied(run: Run) -> None:
        sliced(run)
        run.lines[1][0].update(cp=0, tp=1)

    assert not judged(tmp_path / "b", copied).passes


@pytest.mark.parametrize(("name", "place"), [("loss", "loss"), ("grad_norm", "norm")])
def test_an_error_beyond_rounding_fails_and_one_within_passes(
    tmp_path: Path, name: str, place: str
) -> None:
    most = getattr(TOLERANCES["float32"], place)
    near = judged(tmp_path / "a", scaled(name, 3, 1 + 0.5 * most))
    far = judged(tmp_path / "b", scaled(name, 3, 1 + 2 * most))
    assert near.passes
    assert not far.passes
    assert getattr(far.errors, place) == pytest.approx(2 * most, rel=1e-3)


def test_weights_are_held_to_their_norm_and_the_farthest_is_named(tmp_path: Path) -> None:
    def moved(run: Run) -> None:
        run.tensors[after_step_folder(END)][WEIGHT] *= 1.01

    outcome = judged(tmp_path, moved)
    assert not outcome.passes
    assert outcome.worst == WEIGHT


def test_what_is_loaded_must_be_the_same_to_the_bit(tmp_path: Path) -> None:
    def moved(run: Run) -> None:
        run.tensors[LOADED][WEIGHT] = run.tensors[LOADED][WEIGHT] * (1 + 1e-6)

    outcome = judged(tmp_path, moved)
    assert [one.item.name for one in outcome.exact.causes()] == ["weights"]
    assert not outcome.passes


def test_generators_and_scratch_of_another_layout_are_its_own(tmp_path: Path) -> None:
    def other(run: Run) -> None:
        run.lines[0][0]["generators"] = {}
        del run.tensors[LOADED]["scratch.rotary.cosines"]

    assert judged(tmp_path, other).passes


def test_errors_are_judged_more_loosely_only_from_a_tie_on(tmp_path: Path) -> None:
    error = 0.5 * AFTER_TIES["float32"].loss

    def tie_at_4(wrong_step: int) -> Callable[[Run], None]:
        def change(run: Run) -> None:
            scaled("loss", wrong_step, 1 + error)(run)
            run.tokens_per_expert[4] = [[30_001, 33_999]]

        return change

    after, before = judged(tmp_path / "a", tie_at_4(4)), judged(tmp_path / "b", tie_at_4(3))
    assert (after.tie, before.tie) == (4, 4)
    assert after.passes
    assert not before.passes


def test_too_many_tokens_with_other_experts_are_no_ties(tmp_path: Path) -> None:
    def many(run: Run) -> None:
        run.tokens_per_expert[3] = [[20_000, 44_000]]

    outcome = judged(tmp_path, many)
    assert not outcome.passes
    assert outcome.errors.moved == pytest.approx(10 / 64)


def test_a_step_that_is_not_finite_on_one_layout_only_fails(tmp_path: Path) -> None:
    def lost(run: Run) -> None:
        run.step(0, 3)["grad_norm"] = None

    outcome = judged(tmp_path, lost)
    assert outcome.errors.norm == math.inf
    assert not outcome.passes
