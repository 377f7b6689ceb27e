"""Ranks that say the same in one order pass; a swap, a skip and another size are found."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.parallel_layout import ParallelLayout
from megatron.training.dry_run.events import Event, Post, Wait
from megatron.training.dry_run.matcher import describe, find_problem
from megatron.training.dry_run.rank_groups import GroupTable

NAMES = ("tp", "dp", "tp_dp_cp", "ep")
TABLE = GroupTable(ParallelLayout(world_size=8, tp=2, ep=2, etp=1))


def _post(group: str, elements: int = 4, op: Any = "all_reduce", **more: Any) -> Post:
    ranks = len(TABLE.lists[group][0])
    return Post(op, group, ranks, "float32", elements, site=(f"here.py:{elements}",), **more)


def _world(calls: list[tuple[str, int, int]]) -> list[list[Event]]:
    """All ranks make the same calls; each is waited for some calls later (0: at once)."""
    events: list[Event] = []
    waits: list[tuple[int, int]] = []
    for number, (group, elements, delay) in enumerate(calls):
        events.append(_post(group, elements))
        waits.append((number + delay, number))
        due = sorted(wait for wait in waits if wait[0] <= number)
        events += [Wait(post) for _, post in due]
        waits = [wait for wait in waits if wait[0] > number]
    events += [Wait(post) for _, post in sorted(waits)]
    return [list(events) for _ in range(8)]


CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(1, 9), st.integers(0, 3)), min_size=2, max_size=30
)


@given(CALLS)
@settings(max_examples=60, deadline=None)
def test_ranks_that_do_the_same_in_one_order_come_to_their_end(calls: Any) -> None:
    assert find_problem(_world(calls), TABLE.lists) is None


def _posts(events: list[Event]) -> list[int]:
    return [place for place, event in enumerate(events) if isinstance(event, Post)]


@given(CALLS, st.data())
@settings(max_examples=60, deadline=None)
def test_a_skipped_call_is_found(calls: Any, data: st.DataObject) -> None:
    world = _world([(group, elements, 0) for group, elements, _ in calls])
    rank = data.draw(st.integers(0, 7))
    number = data.draw(st.integers(0, len(calls) - 1))
    kept = [call for place, call in enumerate(calls) if place != number]
    world[rank] = _world([(group, elements, 0) for group, elements, _ in kept])[rank]
    problem = find_problem(world, TABLE.lists)
    assert problem is not None
    assert any("DEADLOCK" in line for line in describe(problem))


@given(CALLS, st.data())
@settings(max_examples=60, deadline=None)
def test_another_size_on_one_rank_is_found_with_both_sites(calls: Any, data: Any) -> None:
    world = _world(calls)
    rank = data.draw(st.integers(0, 7))
    place = data.draw(st.sampled_from(_posts(world[rank])))
    post = world[rank][place]
    assert isinstance(post, Post)
    world[rank][place] = post._replace(elements=100, site=("there.py:1",))
    problem = find_problem(world, TABLE.lists)
    assert problem is not None
    assert problem.kind == "different"
    text = "\n".join(describe(problem))
    assert "there.py:1" in text
    assert f"here.py:{post.elements}" in text
    assert f"rank {rank}:" in text


def test_two_calls_swapped_on_one_rank_stand_still() -> None:
    calls = [("tp", 3, 0), ("tp_dp_cp", 5, 0)]
    world = _world(calls)
    world[2] = _world(calls[::-1])[2]
    problem = find_problem(world, TABLE.lists)
    assert problem is not None
    assert problem.kind == "standstill"
    text = "\n".join(describe(problem))
    assert "rank 2:" in text
    assert "here.py:3" in text
    assert "here.py:5" in text


def test_calls_of_two_groups_may_be_swapped_where_nobody_waits_between() -> None:
    calls = [("tp", 3, 2), ("dp", 5, 2)]
    world = _world(calls)
    world[2] = _world(calls[::-1])[2]
    assert find_problem(world, TABLE.lists) is None


def test_groups_of_the_same_ranks_are_one() -> None:
    world = _world([("tp_dp_cp", 3, 0), ("world", 3, 0)])
    world[5] = _world([("world", 3, 0), ("tp_dp_cp", 3, 0)])[5]
    assert find_problem(world, TABLE.lists) is None


def test_what_nobody_waits_for_and_not_all_join_is_left_over() -> None:
    world: list[list[Event]] = [[_post("dp")] for _ in range(8)]
    world[3] = []
    problem = find_problem(world, TABLE.lists)
    assert problem is not None
    assert problem.kind == "left over"


def _message(op: str, peer: int, elements: int = 4) -> Post:
    return _post("tp", elements, op, peer=peer)


def test_messages_arrive_in_order_and_a_crossed_pair_is_found() -> None:
    def pair(second: list[int]) -> list[list[Event]]:
        sends: list[Event] = [_message("send", 1, size) for size in (3, 5)]
        gets: list[Event] = [_message("recv", 0, size) for size in second]
        waits: list[Event] = [Wait(0), Wait(1)]
        return [sends + waits, gets + waits, *([] for _ in range(6))]

    assert find_problem(pair([3, 5]), TABLE.lists) is None
    problem = find_problem(pair([5, 3]), TABLE.lists)
    assert problem is not None
    assert problem.kind == "different"


def test_two_ranks_that_both_receive_first_stand_still() -> None:
    world: list[list[Event]] = [
        [_message("recv", 1), Wait(0), _message("send", 1), Wait(1)],
        [_message("recv", 0), Wait(0), _message("send", 0), Wait(1)],
        *([] for _ in range(6)),
    ]
    problem = find_problem(world, TABLE.lists)
    assert problem is not None
    assert problem.kind == "standstill"
    assert {standing.rank for standing in problem.standings} == {0, 1}


@pytest.mark.parametrize("is_nccl", [False, True])
@pytest.mark.parametrize("is_batched", [False, True])
def test_two_ranks_that_both_send_first_stand_still_over_nccl(
    is_nccl: bool, is_batched: bool
) -> None:
    def rank(peer: int) -> list[Event]:
        ways = [_message(way, peer)._replace(is_batched=is_batched) for way in ("send", "recv")]
        return [*ways, Wait(1), Wait(0)]

    world = [rank(1), rank(0), *([] for _ in range(6))]
    problem = find_problem(world, TABLE.lists, is_nccl=is_nccl)
    assert (problem is not None) == (is_nccl and not is_batched)


@pytest.mark.parametrize(("recv", "is_sound"), [((2, 6), True), ((3, 6), False)])
def test_an_all_to_all_expects_what_is_sent(recv: tuple[int, int], is_sound: bool) -> None:
    def rank(send: tuple[int, int], recv: tuple[int, int]) -> list[Event]:
        post = _post("tp", sum(send), "all_to_all", send=send, recv=recv)
        return [post, Wait(0)]

    world = [rank((1, 6), (1, 2)), rank((2, 4), (6, 4))]
    if not is_sound:
        world[0] = rank((1, 6), (1, recv[0]))
    problem = find_problem([*world, *([] for _ in range(6))], TABLE.lists)
    assert (problem is None) == is_sound
    if problem is not None:
        assert problem.kind == "splits"
