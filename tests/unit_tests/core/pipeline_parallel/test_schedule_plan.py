"""A schedule is right if it ends, does each thing once on its rank, and keeps what it says."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.schedule_plan import SCHEDULES, build_schedule
from megatron.core.pipeline_parallel.schedule_prediction import predicted_peak_activations
from megatron.core.pipeline_parallel.schedule_step import Schedule, Step, forward_only
from tests.reference.pipeline import does_everything_once, most_kept, play, stages_of_ranks

LARGEST = {"pp": 16, "num_microbatches": 64}


@st.composite
def plans(draw):
    """Draw the arguments of any schedule up to PP 16, VPP 4 and 64 microbatches."""
    name = draw(st.sampled_from(SCHEDULES))
    pp = draw(st.integers(1, 16))
    plan = {"name": name, "pp": pp, "num_microbatches": draw(st.integers(1, 64))}
    if name == "interleaved":
        plan["vpp"] = draw(st.integers(2, 4))
        plan["group_size"] = draw(st.none() | st.integers(pp, 2 * pp + 2))
    return plan


def every_small_plan():
    """List all plans of few ranks and microbatches."""
    for pp in range(1, 6):
        for m in range(1, 14):
            for name in SCHEDULES:
                if name != "interleaved":
                    yield {"name": name, "pp": pp, "num_microbatches": m}
            for vpp in (2, 3, 4):
                for group in (pp, pp + 1, 2 * pp):
                    plan = {"name": "interleaved", "pp": pp, "num_microbatches": m}
                    yield plan | {"vpp": vpp, "group_size": group}


def check(plan):
    """Hold one schedule to the reference; return it."""
    schedule = build_schedule(**plan)
    stages = stages_of_ranks(schedule.pp, schedule.chunks, schedule.v_shape)
    done = play(schedule.steps, stages, schedule.num_microbatches)
    assert len(done) == sum(map(len, schedule.steps)), f"deadlock: {plan}"
    assert does_everything_once(done, schedule.num_stages, schedule.num_microbatches), plan
    for (_, _, stage), (_, rank) in done.items():
        assert schedule.home(stage).rank == rank
    peaks = tuple(most_kept(own) for own in schedule.steps)
    assert schedule.peak_activations() == peaks
    predicted = predicted_peak_activations(**plan)
    if peak_is_exact(plan):
        assert peaks == predicted, plan
    else:
        assert all(p <= q for p, q in zip(peaks, predicted, strict=True)), plan
    return schedule


def peak_is_exact(plan) -> bool:
    pp, m = plan["pp"], plan["num_microbatches"]
    if plan["name"] == "dualpipev":
        return m >= 2 * pp
    rest = m % (plan.get("group_size") or pp)
    return plan["name"] != "interleaved" or rest == 0 or rest >= pp


@given(plan=plans())
@example(plan={"name": "1f1b", **LARGEST})
@example(plan={"name": "interleaved", **LARGEST, "vpp": 4})
@example(plan={"name": "interleaved", **LARGEST, "vpp": 4, "group_size": 23})
@example(plan={"name": "zb-h1", **LARGEST})
@example(plan={"name": "zb-h2", **LARGEST})
@example(plan={"name": "dualpipev", **LARGEST})
@settings(deadline=None, max_examples=60)
def test_every_step_runs_once_on_its_rank_and_keeps_what_is_predicted(plan):
    check(plan)


def test_all_small_schedules_are_right_whatever_the_number_of_microbatches():
    plans_checked = [check(plan) for plan in every_small_plan()]
    assert len(plans_checked) == 5 * 13 * (4 + 9)


@pytest.mark.parametrize("pp", [6, 7, 8, 12, 16])
def test_dual_pipe_v_takes_fewer_microbatches_than_fill_it(pp):
    for m in range(1, 2 * pp + 1):
        check({"name": "dualpipev", "pp": pp, "num_microbatches": m})


def test_a_step_left_out_or_doubled_or_too_early_is_caught():
    schedule = build_schedule("zb-h1", pp=3, num_microbatches=4)
    stages = stages_of_ranks(3, 1, v_shape=False)
    total = sum(map(len, schedule.steps))

    def played(own):
        return play([own, *schedule.steps[1:]], stages, 4)

    own = schedule.steps[0]
    assert does_everything_once(played(own), 3, 4)
    assert not does_everything_once(played(own[:-1]), 3, 4)
    assert len(played(own[::-1])) < total
    with pytest.raises(AssertionError, match="twice"):
        played((*own, own[-1]))


def test_1f1b_of_four_ranks_as_drawn_in_the_paper():
    schedule = build_schedule("1f1b", pp=4, num_microbatches=8)
    words = [" ".join(f"{s.kind}{s.microbatch + 1}" for s in own) for own in schedule.steps]
    assert words[0] == "F1 F2 F3 F4 B1 F5 B2 F6 B3 F7 B4 F8 B5 B6 B7 B8"
    assert words[3] == "F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 F8 B8"


def test_interleaved_forwards_go_in_groups_through_one_chunk_after_the_other():
    forwards = forward_only(build_schedule("1f1b", pp=2, num_microbatches=5, vpp=2, group_size=3))
    order = [(step.microbatch, step.chunk) for step in forwards.steps[0]]
    assert order == [(m, c) for batches in ((0, 1, 2), (3, 4)) for c in (0, 1) for m in batches]
    assert forwards.steps[0] == forwards.steps[1]


def test_group_sizes_change_the_order_and_the_activations():
    small = build_schedule("interleaved", pp=2, num_microbatches=8, vpp=2)
    large = build_schedule("interleaved", pp=2, num_microbatches=8, vpp=2, group_size=4)
    assert small.peak_activations() == (5, 3)
    assert large.peak_activations() == (7, 5)


def test_dual_pipe_v_has_both_ends_on_rank_0_and_fills_the_middle_with_pairs():
    schedule = build_schedule("dualpipev", pp=4, num_microbatches=10)
    assert schedule.home(0) == (0, 0)
    assert schedule.home(7) == (0, 1)
    assert schedule.home(4) == (3, 1)
    kinds = "".join(step.kind for step in schedule.steps[3])
    assert "FBFBFBFB" in kinds
    assert {s.kind for s in schedule.steps[0]} == {"F", "B", "I", "W"}


def test_forward_only_is_the_same_order_without_backwards():
    schedule = build_schedule("zb-h1", pp=3, num_microbatches=5)
    for rank, own in enumerate(forward_only(schedule).steps):
        assert own == tuple(Step("F", m) for m in range(5))
        assert own == tuple(s for s in schedule.steps[rank] if s.kind == "F")


def test_1f1b_with_virtual_stages_is_interleaved():
    assert build_schedule("1f1b", pp=2, num_microbatches=4, vpp=2) == build_schedule(
        "interleaved", pp=2, num_microbatches=4, vpp=2
    )


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        ({"name": "gpipe"}, ["'gpipe'", "1f1b, interleaved, zb-h1, zb-h2, dualpipev"]),
        ({"name": "1f1b", "pp": 0}, ["pipeline ranks is 0", "at least 1"]),
        ({"name": "1f1b", "num_microbatches": 0}, ["microbatches is 0", "at least 1"]),
        ({"name": "1f1b", "vpp": 0}, ["virtual stages a rank is 0", "at least 1"]),
        ({"name": "zb-h1", "vpp": 2}, ["zb-h1 has 1 virtual stage(s) a rank, not 2"]),
        ({"name": "dualpipev", "vpp": 1}, ["dualpipev has 2 virtual stage(s) a rank, not 1"]),
        ({"name": "interleaved"}, ["at least 2 virtual stages"]),
        ({"name": "zb-h1", "group_size": 4}, ["group size 4", "at least 2 virtual stages"]),
        ({"name": "1f1b", "vpp": 2, "group_size": 3}, ["group size 3", "pipeline ranks, 4"]),
    ],
)
def test_numbers_that_make_no_schedule_are_named(plan, wanted):
    with pytest.raises(ConfigError) as error:
        build_schedule(**({"pp": 4, "num_microbatches": 8} | plan))
    assert len(error.value.problems) == 1
    assert all(text in str(error.value) for text in wanted)


def test_stage_and_home_are_inverse_in_both_shapes():
    for v_shape in (False, True):
        schedule = Schedule(
            name="none", num_microbatches=0, chunks=4, v_shape=v_shape, steps=((),) * 3
        )
        for stage in range(12):
            assert schedule.stage(*schedule.home(stage)) == stage
        assert [schedule.home(stage).rank for stage in range(6)] == (
            [0, 1, 2, 2, 1, 0] if v_shape else [0, 1, 2, 0, 1, 2]
        )
