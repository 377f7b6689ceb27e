"""The plan of layouts: each level alone, every pair, what is refused kept with its reason."""

from itertools import combinations

import pytest

from tools.layouts.axes import (
    Shape,
    axes_for,
    by_name,
    completed,
    sizes_of,
    words_of,
    world_size_of,
)
from tools.layouts.cases import DEFAULT_WORDS, read_base
from tools.layouts.matrix import alone, chosen, full_matrix, pairs, triples
from tools.layouts.quick import QUICK
from tools.layouts.verification import Verifier

SHAPE = Shape(4, 4, 2, 8)
AXES = axes_for(SHAPE)


def up_to_8_ranks(levels: tuple[str, ...]) -> list[str]:
    """A judge that minds the number of ranks, and one pair."""
    if {"tp4", "one-group"} <= set(levels):
        return ["one group is not split over four"]
    return ["too many ranks"] if world_size_of(levels, AXES) > 8 else []


ROWS = full_matrix(AXES, up_to_8_ranks)


@pytest.mark.parametrize("name", by_name(AXES))
def test_every_level_has_a_row_of_its_own(name):
    assert any(row.why == "alone" and row.levels == completed([name], AXES) for row in ROWS)


def test_every_pair_and_triple_was_run_or_is_refused():
    run = [set(row.levels) for row in ROWS if not row.reasons]
    refused = [row.asked for row in ROWS if row.reasons]
    for target in [*pairs(AXES), *triples(AXES)]:
        assert any(target <= levels for levels in run) or any(r <= target for r in refused), target


def test_rows_are_distinct_and_no_axis_is_there_twice():
    run = [row.levels for row in ROWS if not row.reasons]
    assert len(run) == len(set(run)) >= 60
    levels = by_name(AXES)
    for names in run:
        axes = [levels[name].axis for name in names]
        assert axes == sorted(set(axes), key=list(AXES).index)
        assert up_to_8_ranks(names) == []


def test_a_refused_pair_is_told_once_and_its_triples_are_not_tried():
    told = [row for row in ROWS if {"tp4", "one-group"} <= row.asked]
    assert len(told) == 1
    assert told[0].reasons == ("one group is not split over four",)


def test_nothing_is_run_when_all_is_refused():
    rows = full_matrix(AXES, lambda levels: ["no"])
    assert len(rows) == len(by_name(AXES))  # told alone, and nothing beyond
    assert all(row.reasons == ("no",) for row in rows)


def test_needs_are_added_unless_their_axis_is_taken():
    assert completed(["sp"], AXES) == ("tp2", "sp")
    assert completed(["sp", "tp4"], AXES) == ("tp4", "sp")
    assert completed(["two-hops"], AXES) == ("ep4", "two-hops")


@pytest.mark.parametrize(
    ("names", "ranks", "dp"),
    [
        ("tp2", 2, 1),
        ("ep4", 4, 4),
        ("tp2 ep2", 4, 2),
        ("tp2 ep2 etp1", 2, 1),
        ("tp2 cp2-a2a dp2", 8, 2),
        ("pp2 ep2", 4, 2),
        ("ep2 etp2", 4, 4),
    ],
)
def test_data_ranks_are_as_few_as_the_expert_grid_needs(names, ranks, dp):
    assert sizes_of(names.split(), AXES)["dp"] == dp
    assert world_size_of(names.split(), AXES) == ranks


def test_one_process_gets_the_options_that_change_the_model_and_no_other():
    names = ("tp2", "sp", "rope", "two-batches")
    both = ["--position-embedding-type", "rope", "--global-batch-size", "16"]
    assert words_of(names, AXES, of_model=True) == both
    first = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert words_of(names, AXES) == first + both


def test_the_rules_of_the_configuration_are_what_refuses():
    verifier = Verifier(read_base(DEFAULT_WORDS, "fp64").values, dtype="fp64")
    rows = {row.levels: row for row in alone(verifier.axes, verifier.judge)}
    assert rows["tp2",].reasons == ()
    (odd,) = chosen(["tp2 dp2 zero3"], verifier.axes, verifier.judge)
    assert "--use-torch-fsdp2 with --tensor-model-parallel-size 2" in odd.reasons[0]
    (large,) = chosen(["tp4 cp4-p2p"], verifier.axes, verifier.judge)
    assert large.reasons == ("needs 16 ranks, --max-ranks is 8",)


def test_the_quick_layouts_have_every_axis_and_are_small():
    rows = chosen(QUICK, AXES, lambda levels: [])
    levels = by_name(AXES)
    assert {levels[name].axis for row in rows for name in row.levels} == set(AXES)
    assert all(world_size_of(row.levels, AXES) <= 4 for row in rows)
    assert len({row.levels for row in rows}) == len(rows) >= 30


def test_every_two_axes_meet():
    run = [row.levels for row in ROWS if not row.reasons]
    levels = by_name(AXES)
    met = {
        frozenset((levels[a].axis, levels[b].axis)) for row in run for a, b in combinations(row, 2)
    }
    assert met >= {frozenset(two) for two in combinations(AXES, 2)}
