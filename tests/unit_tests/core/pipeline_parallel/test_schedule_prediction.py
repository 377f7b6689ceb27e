"""Known bubbles of known schedules, by formula and on the clock."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.pipeline_parallel.schedule_plan import build_schedule
from megatron.core.pipeline_parallel.schedule_prediction import (
    predicted_bubble,
    predicted_idle,
    predicted_peak_activations,
)
from megatron.core.pipeline_parallel.schedule_simulator import Costs, simulate

TENTHS = st.integers(1, 30).map(lambda n: n / 10)
SIZES = [(1, 4), (2, 8), (4, 8), (5, 23), (8, 32), (16, 64)]


def measured(name, pp, m, costs=None, **options):
    return simulate(build_schedule(name, pp=pp, num_microbatches=m, **options), costs)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b_waits_p_minus_1_of_m_plus_p_minus_1(p, m):
    assert measured("1f1b", p, m).bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 8), (4, 8), (8, 32), (16, 64)])
def test_interleaved_waits_v_times_less(p, m, v):
    bubble = measured("interleaved", p, m, vpp=v).bubble
    assert bubble == pytest.approx((p - 1) / (v * m + p - 1))
    assert bubble == pytest.approx(predicted_bubble("interleaved", pp=p, num_microbatches=m, vpp=v))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zero_bubble_waits_a_third_and_not_at_all(p, m):
    h1, h2, plain = (measured(name, p, m) for name in ("zb-h1", "zb-h2", "1f1b"))
    idle = {t: t.makespan - max(t.busy) for t in (h1, plain)}
    assert idle[h1] == pytest.approx(idle[plain] / 3)
    assert h1.bubble == pytest.approx((p - 1) / (3 * m + p - 1))
    if m >= 2 * p - 1:
        assert h2.bubble_unsynced == pytest.approx(0, abs=1e-12)
    assert h2.bubble == pytest.approx(h1.bubble) or m < 2 * p - 1


@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 8), (4, 10), (8, 32), (16, 64)])
def test_dual_pipe_v_waits_a_sixth_of_1f1b_step_by_step(p, m):
    v, plain = measured("dualpipev", p, m), measured("1f1b", p, m)
    assert v.makespan - v.busy[0] == pytest.approx((plain.makespan - plain.busy[0]) / 6)


@given(p=st.integers(1, 8), more=st.integers(0, 20), f=TENTHS, i=TENTHS, w=TENTHS)
@settings(deadline=None, max_examples=60)
def test_idle_time_is_as_predicted_for_unlike_costs(p, more, f, i, w):
    costs = Costs(forward=f, input_grad=i, weight_grad=w)
    cases = [("1f1b", 1 + more, {}), ("interleaved", p * (1 + more % 4), {"vpp": 2 + more % 3})]
    if f >= w:
        cases += [("zb-h1", p + more, {}), ("zb-h2", 2 * p + more, {})]
    for name, m, options in cases:
        timeline = measured(name, p, m, costs, **options)
        for busy in timeline.busy:
            assert timeline.makespan - busy == pytest.approx(
                predicted_idle(name, pp=p, costs=costs, **options), abs=1e-9
            ), name


def test_dual_pipe_v_is_ahead_of_1f1b_with_few_microbatches_too():
    for p in (2, 4, 8):
        for m in range(1, 2 * p):
            v, plain = measured("dualpipev", p, m), measured("1f1b", p, m)
            assert v.makespan < plain.makespan
    assert measured("dualpipev", 4, 4).makespan == 15


def pairs_as_one(schedule, costs):
    """Return the idle time if a forward and the backward after it run as one, as DualPipe has it.

    Nothing of a pair leaves before its end. The last rank's turn from chunk 0 to 1 is no pair.
    """
    units = []
    for rank, own in enumerate(schedule.steps):
        units.append([])
        for step in own:
            before = units[-1][-1] if units[-1] else []
            pair = step.kind == "B" and len(before) == 1 and before[0].kind == "F"
            turn = pair and rank == schedule.pp - 1 and before[0].microbatch == step.microbatch
            if pair and not turn:
                before.append(step)
            else:
                units[-1].append([step])
    made, free, at, moved = {}, [Fraction(0)] * schedule.pp, [0] * schedule.pp, True
    while moved:
        moved = False
        for rank, own in enumerate(units):
            if at[rank] == len(own):
                continue
            steps = own[at[rank]]
            makes = {schedule.makes(rank, step) for step in steps}
            needs = {n for step in steps for n in schedule.needs(rank, step)} - makes
            if needs <= made.keys():
                took = sum(Fraction(costs.of(s.kind)) / schedule.chunks for s in steps)
                free[rank] = max([free[rank], *(made[n] for n in needs)]) + took
                made |= dict.fromkeys(makes, free[rank])
                at[rank] += 1
                moved = True
    assert at == [len(own) for own in units]
    return max(free) - sum(Fraction(costs.of(s.kind)) / schedule.chunks for s in schedule.steps[0])


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 8), (4, 10), (8, 40)])
@pytest.mark.parametrize(("i", "w"), [(1, 1), (1.2, 0.8), (1.5, 0.5), (2, 1), (1, 0.4)])
def test_dual_pipe_v_with_pairs_run_as_one_has_the_published_bubble(p, m, i, w):
    costs = Costs(forward=1, input_grad=i, weight_grad=w)
    schedule = build_schedule("dualpipev", pp=p, num_microbatches=m)
    published = predicted_idle("dualpipev", pp=p, costs=costs)
    assert float(pairs_as_one(schedule, costs)) == pytest.approx(published)
    timeline = simulate(schedule, costs)
    assert timeline.makespan - timeline.busy[0] <= published + 1e-9


def test_activations_of_known_schedules():
    sizes = {"pp": 4, "num_microbatches": 32}
    assert predicted_peak_activations("1f1b", **sizes) == (4, 3, 2, 1)
    assert predicted_peak_activations("interleaved", **sizes, vpp=2) == (11, 9, 7, 5)
    assert predicted_peak_activations("zb-h1", **sizes) == (4,) * 4
    assert predicted_peak_activations("zb-h2", **sizes) == (7,) * 4
    assert predicted_peak_activations("dualpipev", **sizes) == (9,) * 4


def test_an_unknown_schedule_has_no_prediction():
    with pytest.raises(AssertionError, match="gpipe"):
        predicted_idle("gpipe", pp=2)
