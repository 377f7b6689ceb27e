"""The search for legal layouts against the plain one: judge every tiling, sort, take the first."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.parallel_layout import ParallelLayout
from megatron.training.config.legal_layouts import (
    MOST_SHOWN,
    OPTION_OF_AXIS,
    Layout,
    advice,
    find_neighbours,
)

AXES = tuple(OPTION_OF_AXIS)
SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])


def far(layout, asked):
    """Return (axes that differ, product of the factors); an absent ETP is TP's size."""
    pairs = [(getattr(layout, axis), getattr(asked, axis)) for axis in AXES]
    changed = sum(one != other for one, other in pairs)
    if layout.etp is None:
        pairs.pop()
    else:
        pairs[-1] = (layout.etp, asked.tp if asked.etp is None else asked.etp)
    return changed, math.prod(max(pair) / min(pair) for pair in pairs)


def all_tilings(world, asked):
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    for tp, cp, pp, ep, etp in itertools.product(*[sizes] * 4, [None, *sizes]):
        if (etp is None and asked.etp is not None) or (asked.etp is None and etp == tp):
            continue
        try:
            ParallelLayout(world_size=world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
        except ConfigError:
            continue
        yield Layout(world, tp, cp, pp, ep, etp)


@settings(max_examples=40)
@given(
    world=st.sampled_from([1, 2, 4, 6, 8]),
    sizes=st.tuples(SIZES, SIZES, SIZES, SIZES, st.none() | SIZES),
    heads=SIZES,
    experts=SIZES,
    pp=st.sampled_from([1, 2]),
)
def test_the_nearest_legal_tilings_are_found(world, sizes, heads, experts, pp):
    asked = Layout(world, *sizes)

    def judge(layout):
        wrong = [] if layout.is_tiling() else ["ranks"]
        wrong += ["heads"] if heads % layout.tp else []
        wrong += ["experts"] if experts % layout.ep else []
        wrong += ["stages"] if layout.pp > pp else []
        return [*wrong, f"always, {layout.cp}"]

    found = find_neighbours(asked, judge(asked), judge, has_experts=True)
    legal = [layout for layout in all_tilings(world, asked) if len(judge(layout)) == 1]
    if len(judge(asked)) == 1:
        assert found is None
        return
    near = sorted(far(layout, asked) for layout in legal)[:MOST_SHOWN]
    assert [far(layout, asked) for layout in found.layouts] == [
        (changed, pytest.approx(factor)) for changed, factor in near
    ]
    assert set(found.layouts) <= set(legal)
    assert found.remaining
    if found.other_world is not None:
        assert len(judge(asked._replace(world_size=found.other_world))) == 1


def test_what_every_layout_has_is_not_the_layouts():
    asked = Layout(4, 2, 1, 1, 1, None)
    assert advice(asked, ["--lr 0"], lambda _: ["--lr 0"], has_experts=False) is None
    assert advice(asked, [], lambda _: [], has_experts=False) is None


def test_numbers_of_ranks_are_offered_where_sizes_do_not_help():
    asked = Layout(3, 1, 1, 1, 1, None)

    def judge(layout):
        ranks = layout.world_size // layout.tp
        return [f"batch of 4 over {ranks}"] if layout.world_size == 3 else []

    text = advice(asked, judge(asked), judge, has_experts=False)
    assert text == (
        "no sizes on 3 ranks are legal with the other flags; legal: as asked on 4 ranks"
    )


def test_a_huge_world_is_searched_in_bounded_time():
    asked = Layout(2**13 * 9 * 5, 7, 11, 13, 17, 19)
    judged = []

    def judge(layout):
        judged.append(layout)
        return ["never", "more"]

    assert find_neighbours(asked, ["never", "other"], judge, has_experts=True) is None
    assert 300 < len(judged) < 500


def test_layers_are_balanced_where_that_mends_the_layout():
    asked = Layout(4, 1, 1, 4, 1, None)

    def judge(layout):
        return [] if layout.is_balanced else ["61 layers over 4 stages"]

    assert advice(asked, judge(asked), judge, has_experts=False) == (
        "no sizes on 4 ranks are legal with the other flags; "
        "legal: as asked with --pipeline-model-parallel-layout auto"
    )
