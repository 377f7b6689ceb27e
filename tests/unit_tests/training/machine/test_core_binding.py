import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.training.machine import core_binding
from megatron.training.machine.core_binding import Binding, bind, parse, plan, text, unbind
from tests.helpers.ranks import run_ranks


def bindings(cores, ranks, *, nodes=None, siblings=None, threads=1, parent=None) -> list[Binding]:
    available = frozenset(cores)
    return [
        plan(
            available,
            parent=available if parent is None else frozenset(parent),
            nodes=nodes or {},
            siblings=siblings or {},
            local_rank=rank,
            local_world_size=ranks,
            threads=threads,
        )
        for rank in range(ranks)
    ]


@given(
    cores=st.sets(st.integers(0, 63), min_size=1, max_size=40),
    ranks=st.integers(2, 8),
    num_nodes=st.integers(1, 4),
)
def test_ranks_have_disjoint_cores_enough_for_their_threads(cores, ranks, num_nodes):
    nodes = {core: core % num_nodes for core in cores}
    threads = max(1, len(cores) // ranks)
    found = bindings(cores, ranks, nodes=nodes, threads=threads)
    if len(cores) < ranks:
        assert all(not binding.cores and "cores not bound" in binding.why for binding in found)
        return
    taken = [core for binding in found for core in binding.cores]
    assert len(taken) == len(set(taken))
    assert set(taken) <= cores
    assert all(len(binding.cores) >= threads for binding in found)


def test_ranks_stay_within_a_node_where_they_fit():
    nodes = {core: core % 2 for core in range(8)}  # even cores on node 0
    found = [binding.cores for binding in bindings(range(8), 4, nodes=nodes, threads=2)]
    assert found == [(0, 2), (4, 6), (1, 3), (5, 7)]


def test_the_threads_of_a_physical_core_go_to_one_rank():
    siblings = {core: core % 4 for core in range(8)}  # 0 and 4 are one core
    found = [binding.cores for binding in bindings(range(8), 2, siblings=siblings, threads=4)]
    assert found == [(0, 4, 1, 5), (2, 6, 3, 7)]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"cores": range(2), "ranks": 2, "parent": range(8)}, "on cores 0-1, as launched"),
        ({"cores": range(2), "ranks": 4}, "cores not bound (2 for 4 ranks)"),
        (
            {"cores": range(8), "ranks": 2, "threads": 5},
            "cores not bound (5 threads a rank are more than its share)",
        ),
        ({"cores": range(8), "ranks": 1}, ""),
    ],
)
def test_ranks_are_left_alone_and_it_is_said_why(settings, why):
    assert set(bindings(**settings)) == {Binding((), why)}


@given(st.sets(st.integers(0, 200)))
def test_lists_of_cores_are_read_as_they_are_written(cores):
    assert parse(text(frozenset(cores))) == sorted(cores)


def test_text_is_that_of_the_kernel():
    assert text({9, 0, 1, 2, 3}) == "0-3,9"
    assert parse("0-3,9\n") == [0, 1, 2, 3, 9]


def _two_ranks() -> None:
    import torch.distributed as dist

    before = os.sched_getaffinity(0)
    why = bind(dist.get_rank(), 2, 1)
    mine = os.sched_getaffinity(0)
    found = [None, None]
    dist.all_gather_object(found, mine)
    if len(before) < 2:
        assert "cores not bound" in why
        return
    assert not found[0] & found[1]
    assert found[0] | found[1] == before
    unbind()
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds threads")
def test_two_ranks_of_this_machine_are_bound_apart_and_set_free():
    run_ranks(_two_ranks, 2)
    assert core_binding._given is None  # the parent was not touched
