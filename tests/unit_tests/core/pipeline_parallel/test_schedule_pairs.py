"""Pairs of a forward and a backward: independent, complete, and nobody waits for half of one."""

import pytest
from hypothesis import assume, example, given, settings

from megatron.core.pipeline_parallel import schedule_pairs
from megatron.core.pipeline_parallel.schedule_pairs import Pair, can_pair, paired, steps_of
from megatron.core.pipeline_parallel.schedule_plan import build_schedule
from megatron.core.pipeline_parallel.schedule_simulator import simulate
from megatron.core.pipeline_parallel.schedule_transfers import (
    Transfer,
    with_paired_transfers,
    with_transfers,
)
from tests.unit_tests.core.pipeline_parallel.test_schedule_plan import LARGEST, plans
from tests.unit_tests.core.pipeline_parallel.test_schedule_transfers import channels


def _flat(lists):
    """Return lists in which the steps of a pair stand one after the other."""
    parts = [[(x,) if isinstance(x, Transfer) else steps_of(x) for x in own] for own in lists]
    return [[step for part in own for step in part] for own in parts]


@given(plan=plans())
@example(plan={"name": "1f1b", "pp": 1, "num_microbatches": 64})
@example(plan={"name": "interleaved", **LARGEST, "vpp": 4})
@example(plan={"name": "interleaved", **LARGEST, "vpp": 4, "group_size": 23})
@example(plan={"name": "interleaved", "pp": 4, "num_microbatches": 6, "vpp": 2})
@example(plan={"name": "dualpipev", **LARGEST})
@settings(deadline=None, max_examples=20)
def test_paired_lists_run_to_the_end_and_do_what_the_schedule_does(plan):
    schedule = build_schedule(**plan)
    assume(can_pair(schedule))
    for own, plain in zip(paired(schedule), schedule.steps, strict=True):
        flat = [step for computation in own for step in steps_of(computation)]
        assert sorted(flat) == sorted(plain)
        for kinds in ("F", "BIW"):  # each in its order
            assert [s for s in flat if s.kind in kinds] == [s for s in plain if s.kind in kinds]
        for pair in own:
            if isinstance(pair, Pair):
                assert (pair.forward.kind, pair.backward.kind) == ("F", "B")
                assert pair.forward.microbatch != pair.backward.microbatch
    lists = with_paired_transfers(schedule)
    sent, received = channels(lists)
    assert sent == received
    assert {key: sorted(made) for key, made in sent.items()} == {
        key: sorted(made) for key, made in channels(with_transfers(schedule))[0].items()
    }
    for sends in ("buffered", "blocking"):
        timeline = simulate(schedule, sends=sends, actions=_flat(lists))
        assert timeline.deadlock is None, str(timeline.deadlock)
        assert [len(runs) for runs in timeline.runs] == [len(own) for own in schedule.steps]


def _times_of_pairs(plan):
    """Return the makespan of paired lists in units of that of the plain ones, and the pairs."""
    schedule = build_schedule(**plan)
    lists = with_paired_transfers(schedule)
    pairs = [sum(isinstance(action, Pair) for action in own) for own in lists]
    both = simulate(schedule, actions=_flat(lists)).makespan, simulate(schedule).makespan
    return both[0] / both[1], pairs


def test_on_one_rank_each_forward_runs_with_the_backward_before_it():
    schedule = build_schedule("1f1b", pp=1, num_microbatches=4)
    shown = [str(computation) for computation in paired(schedule)[0]]
    assert shown == ["F0.0", "F1.0 with B0.0", "F2.0 with B1.0", "F3.0 with B2.0", "B3.0"]


@pytest.mark.parametrize(
    "plan",
    [
        {"name": "1f1b", "pp": 1, "num_microbatches": 8},
        {"name": "interleaved", "pp": 4, "num_microbatches": 32, "vpp": 2},
        {"name": "interleaved", "pp": 8, "num_microbatches": 32, "vpp": 4},
        {"name": "dualpipev", "pp": 8, "num_microbatches": 32},
    ],
)
def test_pairs_are_most_steps_and_cost_no_waiting(plan):
    ratio, pairs = _times_of_pairs(plan)
    assert ratio < 1.05
    schedule = build_schedule(**plan)
    assert min(pairs) >= 0.6 * schedule.chunks * (schedule.num_microbatches - schedule.pp)


def test_one_chunk_on_several_ranks_would_wait_and_is_not_paired(monkeypatch):
    plan = {"name": "1f1b", "pp": 4, "num_microbatches": 32}
    assert not can_pair(build_schedule(**plan))
    with pytest.raises(AssertionError, match="1f1b on 4 ranks cannot run in pairs"):
        paired(build_schedule(**plan))
    monkeypatch.setattr(schedule_pairs, "can_pair", lambda _: True)
    assert _times_of_pairs(plan)[0] > 1.5


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2"])
def test_schedules_with_split_backwards_have_no_pairs(name):
    assert not can_pair(build_schedule(name, pp=4, num_microbatches=8))


def test_dual_pipe_v_has_pairs_from_as_many_microbatches_as_ranks():
    for pp in (1, 2, 3, 4, 7):
        for count in range(1, 2 * pp + 2):
            schedule = build_schedule("dualpipev", pp=pp, num_microbatches=count)
            assert can_pair(schedule) == (count >= pp)
            if count >= pp:
                with_paired_transfers(schedule)  # ends
