"""The clock is right in cases one can do by hand, and a broken list is found and named."""

import pytest

from megatron.core.pipeline_parallel.schedule_plan import build_schedule, one_f_one_b
from megatron.core.pipeline_parallel.schedule_simulator import Costs, simulate
from megatron.core.pipeline_parallel.schedule_step import Schedule, Step
from megatron.core.pipeline_parallel.schedule_transfers import Transfer, with_transfers


def swapped(lists, rank, one, other):
    """Return the lists with two actions of a rank in each other's place."""
    broken = [list(actions) for actions in lists]
    own = broken[rank]
    own[one], own[other] = own[other], own[one]
    return broken


def place(actions, text):
    return [str(action) for action in actions].index(text)


def test_two_ranks_one_microbatch_by_hand():
    costs = Costs(forward=2, input_grad=1, weight_grad=3, comm=0.5)
    timeline = simulate(one_f_one_b(2, 1), costs)
    assert timeline.runs[0] == ((Step("F", 0), 0, 2), (Step("B", 0), 9, 13))
    assert timeline.runs[1] == ((Step("F", 0), 2.5, 4.5), (Step("B", 0), 4.5, 8.5))
    assert timeline.makespan == 13
    assert timeline.busy == (6, 6)
    assert timeline.bubble == pytest.approx(1 - 6 / 13)
    assert timeline.longest_span == 13


def test_a_chunk_takes_its_share_and_the_turn_of_the_v_costs_no_message():
    costs = Costs(comm=10)
    timeline = simulate(build_schedule("dualpipev", pp=2, num_microbatches=1), costs)
    ends = {
        (run.step.kind, rank, run.step.chunk): run.end
        for rank, runs in enumerate(timeline.runs)
        for run in runs
    }
    assert ends["F", 0, 0] == 0.5
    assert ends["F", 1, 0] == 11.0
    assert ends["F", 1, 1] == 11.5
    assert ends["F", 0, 1] == 22.0


def test_stages_of_unlike_cost_make_the_pipeline_as_slow_as_the_worst():
    schedule = one_f_one_b(4, 32)
    even = simulate(schedule)
    heavy = simulate(schedule, stage_shares=[1, 1, 1, 2])
    assert even.makespan == 3 * (32 + 3)
    assert heavy.makespan == 3 * (2 * 32 + 3)
    with pytest.raises(AssertionError, match="stages"):
        simulate(schedule, stage_shares=[1, 1])


def test_blocking_sends_are_never_faster():
    for name in ("1f1b", "interleaved", "zb-h1", "zb-h2", "dualpipev"):
        vpp = 2 if name == "interleaved" else None
        schedule = build_schedule(name, pp=4, num_microbatches=9, vpp=vpp)
        for costs in (Costs(), Costs(comm=0.3)):
            buffered = simulate(schedule, costs)
            blocking = simulate(schedule, costs, sends="blocking")
            assert blocking.makespan >= buffered.makespan
            assert blocking.busy == pytest.approx(buffered.busy)


def test_messages_cost_time_only_where_a_rank_waits_for_them():
    schedule = one_f_one_b(2, 1)
    assert simulate(schedule, Costs(comm=1)).makespan == 6 + 2
    assert simulate(one_f_one_b(1, 8), Costs(comm=100)).bubble == 0


def test_swapped_receives_are_found_with_both_ends_of_the_message():
    schedule = one_f_one_b(2, 4)
    lists = with_transfers(schedule)
    one = place(lists[1], "recv activation of microbatch 1, stage 0, from rank 0")
    other = place(lists[1], "recv activation of microbatch 2, stage 0, from rank 0")
    broken = swapped(lists, 1, one, other)
    for sends in ("buffered", "blocking"):
        deadlock = simulate(schedule, actions=broken, sends=sends).deadlock
        assert deadlock is not None
        assert {wait.rank for wait in deadlock.waits} == {0, 1}
        assert "send activation of microbatch 1, stage 0, to rank 1" in str(deadlock)
        assert "recv activation of microbatch 2, stage 0, from rank 0" in str(deadlock)


def test_a_swap_of_steps_on_one_rank_is_found_as_a_circle_of_two():
    schedule = one_f_one_b(2, 4)
    lists = with_transfers(schedule)
    first, late = place(lists[0], "F0.0"), place(lists[0], "B0.0")
    deadlock = simulate(schedule, actions=swapped(lists, 0, first, late)).deadlock
    assert "rank 0 stands at action 0, B0.0: needs activation" in str(deadlock)
    # Forwards of rank 0 in the place of its first backward: the ranks wait for each other.
    steps = (
        (Step("F", 0), Step("B", 0), Step("F", 1), Step("B", 1)),
        (Step("F", 0), Step("F", 1), Step("B", 0), Step("B", 1)),
    )
    broken = Schedule(name="broken", num_microbatches=2, steps=steps)
    ready = Schedule(name="ready", num_microbatches=2, steps=(steps[1], steps[1]))
    order = {0: list(with_transfers(ready)[0]), 1: list(with_transfers(ready)[1])}
    one, other = place(order[0], "F1.0"), place(order[0], "B0.0")
    order[0] = swapped(order.values(), 0, one, other)[0]
    deadlock = simulate(broken, actions=[order[0], order[1]]).deadlock
    assert [wait.rank for wait in deadlock.waits] == [0, 1]
    assert "rank 0 stands" in str(deadlock)
    assert "B0.0: needs gradient of microbatch 0, stage 1" in str(deadlock)
    assert "F1.0: needs activation of microbatch 1, stage 0" in str(deadlock)
    assert "closes the circle" in str(deadlock)


def test_a_missing_send_a_missing_receive_and_a_send_too_early_are_found():
    schedule = one_f_one_b(2, 2)
    lists = with_transfers(schedule)
    send = place(lists[0], "send activation of microbatch 1, stage 0, to rank 1")
    without = [[a for n, a in enumerate(lists[0]) if n != send], lists[1]]
    deadlock = simulate(schedule, actions=without).deadlock
    assert "F1.0: needs activation of microbatch 1, stage 0" in str(deadlock)
    recv = place(lists[1], "recv activation of microbatch 1, stage 0, from rank 0")
    without = [lists[0], [a for n, a in enumerate(lists[1]) if n != recv]]
    deadlock = simulate(schedule, actions=without).deadlock
    assert "rank 1 waits for itself: its list is in the wrong order" in str(deadlock)
    early = swapped(lists, 0, 0, 1)
    for sends in ("buffered", "blocking"):
        deadlock = simulate(schedule, actions=early, sends=sends).deadlock
        assert "it is not made yet" in str(deadlock)


def test_a_rank_that_waits_for_one_that_is_through_is_told_so():
    schedule = one_f_one_b(2, 1)
    lists = with_transfers(schedule)
    shortened = [lists[0], [a for a in lists[1] if not isinstance(a, Transfer) or a.peer != 0][:0]]
    deadlock = simulate(schedule, actions=shortened, sends="blocking").deadlock
    assert "rank 1 is through its list" in str(deadlock)
