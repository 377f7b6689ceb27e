"""Calls of collectives are compared before they begin, and both call sites are named."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron.core.collectives import all_gather_single, start_reduce_scatter
from megatron.core.distributed.collective_log import (
    Call,
    CollectiveChecks,
    CollectiveError,
    checked_collectives,
    difference,
)
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from tests.helpers.ranks import run_ranks


def checks(seconds=30.0):
    return CollectiveChecks.of_world(timedelta(seconds=seconds))


def reduce_of(size):
    dist.all_reduce(torch.ones(size))


def gather_of(size):
    all_gather_single(torch.ones(2 * size), torch.ones(size), group=dist.group.WORLD)


def exchange(recv, send):
    group = dist.group.WORLD
    dist.all_to_all_single(
        torch.empty(sum(recv), 2), torch.ones(sum(send), 2), recv, send, group=group
    )


def _same():
    rank, world = dist.get_rank(), dist.group.WORLD
    alone = ProcessGroupCollection.create(ParallelLayout(world_size=2)).tp
    before = dist.all_reduce
    with checked_collectives(checks()):
        assert dist.all_reduce is not before
        x = torch.tensor([rank + 1.0])
        dist.all_reduce(x)
        assert x == 3
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=world)
        dist.all_reduce(torch.ones(rank + 1), group=alone)  # a group of one rank
        gather_of(3)
        own = torch.zeros(2)
        start_reduce_scatter(own, torch.ones(4), group=world).wait()
        assert own.tolist() == [2.0, 2.0]
        exchange(*(([1, 2], [1, 5]) if rank == 0 else ([5, 0], [2, 0])))
        objects = [None, None]
        dist.all_gather_object(objects, rank)
        assert objects == [0, 1]
        dist.barrier()
    assert dist.all_reduce is before


def test_equal_calls_go_through_and_compute_the_same():
    run_ranks(_same, 2)


PLANTED = {
    "size": (lambda: reduce_of(4), lambda: reduce_of(6), "all_reduce sum [4] f", "sum [6] f"),
    "kind": (lambda: reduce_of(4), lambda: gather_of(4), "all_reduce sum [4]", "all_gather [4] f"),
    "op": (
        lambda: reduce_of(4),
        lambda: dist.all_reduce(torch.ones(4), op=dist.ReduceOp.MAX),
        "all_reduce sum",
        "all_reduce max",
    ),
    "dtype": (
        lambda: reduce_of(4),
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.float64)),
        "float32",
        "float64",
    ),
    "rows": (
        lambda: exchange([1, 2], [1, 5]),
        lambda: exchange([4, 0], [2, 0]),
        "rank 0 sends 5 rows to rank 1, which takes 4",
        "rows to ranks [1, 5], from ranks [1, 2]",
    ),
}


def _planted(name):
    one, other, *wanted = PLANTED[name]
    with checked_collectives(checks()):
        reduce_of(3)
        with pytest.raises(CollectiveError) as error:
            (one if dist.get_rank() == 0 else other)()
    text = str(error.value)
    assert "collective 2 of ranks 0, 1" in text
    for words in (*wanted, "rank 0: ", "rank 1: "):
        assert words in text
    assert text.count("test_collective_log.py:") >= 4, "both call sites, and who called them"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_an_error_on_both_ranks_with_both_call_sites(name):
    run_ranks(_planted, 2, name)


def _missing():
    with checked_collectives(checks(0.5 if dist.get_rank() == 0 else 30)):
        gather_of(2)
        if dist.get_rank() == 0:
            with pytest.raises(CollectiveError) as error:
                reduce_of(5)
            text = str(error.value)
            assert "rank 0 waits: all_reduce sum [5] float32" in text
            assert "rank 1 is elsewhere: its last was all_gather [2] float32" in text


def test_a_rank_that_does_not_come_is_named_with_its_last_call():
    run_ranks(_missing, 2)


def test_only_what_must_be_equal_is_compared():
    calls = [
        Call("all_reduce", "sum [2, 3] float32", "sum 6 float32", [], [], ["a.py:1 in f"]),
        Call("all_reduce", "sum [6] float32", "sum 6 float32", [], [], ["b.py:2 in g"]),
    ]
    assert difference([4, 7], calls) is None
    text = difference([4, 7], [calls[0], calls[1]._replace(like="sum 7 float32")])
    assert text == (
        "calls differ:\n  rank 4: all_reduce sum [2, 3] float32 at a.py:1 in f\n"
        "  rank 7: all_reduce sum [6] float32 at b.py:2 in g"
    )
