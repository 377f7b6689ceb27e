"""Collectives with a gradient: values, gradients, uneven and zero rows, a group of one."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.parallel_layout import ParallelLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    RowSplits,
    all_gather_rows,
    all_reduce_sum,
    all_to_all,
    exchange_counts,
    exchange_counts_in_hops,
    exchange_rows_and_pairs,
    gather_sizes,
    reduce_scatter_rows,
)
from tests.helpers.ranks import run_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _alltoall() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    table = [[1, 0, 3], [2, 2, 0], [0, 0, 1]]  # [from, to]
    splits = RowSplits(table[rank], [row[rank] for row in table])
    for dtype in DTYPES:
        x = torch.full((sum(splits.send), 2), float(rank), dtype=dtype).requires_grad_()
        out = all_to_all(group, x, splits)
        want = [float(source) for source in range(3) for _ in range(table[source][rank])]
        assert out[:, 0].tolist() == want
        (gradient,) = torch.autograd.grad((out * (rank + 1)).sum(), x)
        back = [dest + 1.0 for dest in range(3) for _ in range(table[rank][dest])]
        assert gradient[:, 1].tolist() == back


def test_all_to_all_sends_rows_and_brings_gradients_back():
    run_ranks(_alltoall, 3)


def _gather_scatter() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    for sizes in ([2, 2, 2], [3, 0, 1], [0, 0, 0]):
        x = (torch.arange(sizes[rank] * 2).double().view(-1, 2) + 10 * rank).requires_grad_()
        gathered = all_gather_rows(group, x, sizes)
        want = torch.cat(
            [torch.arange(n * 2).double().view(-1, 2) + 10 * r for r, n in enumerate(sizes)]
        )
        assert torch.equal(gathered, want)
        weight = torch.linspace(1, 2, want.numel(), dtype=torch.float64).view_as(want)
        (gradient,) = torch.autograd.grad((gathered * weight).sum(), x)
        torch.testing.assert_close(gradient, 3 * weight.split(sizes)[rank])

        y = (weight * (rank + 1)).requires_grad_()
        scattered = reduce_scatter_rows(group, y, sizes)
        torch.testing.assert_close(scattered, 6 * weight.split(sizes)[rank])
        (gradient,) = torch.autograd.grad((scattered * (rank + 1)).sum(), y)
        owner = torch.arange(1.0, 4.0).repeat_interleave(torch.tensor(sizes)).double()
        assert torch.equal(gradient, owner.unsqueeze(1).expand_as(y))


def test_gather_and_scatter_are_each_others_gradient():
    run_ranks(_gather_scatter, 3)


def _narrow() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.full((3, 1), 256.0 if rank == 0 else 1.0).bfloat16()
    want = torch.tensor(258.0).bfloat16()  # 256 + 1 alone rounds to 256
    assert torch.equal(reduce_scatter_rows(group, x, [1, 1, 1]), want.view(1, 1))


def test_bf16_parts_are_summed_in_fp32():
    run_ranks(_narrow, 3)


def _sizes() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    alone = ProcessGroupCollection.create(ParallelLayout(world_size=2)).expt_tp
    counts = torch.tensor([1, 2, 3, 4]) * (rank + 1)
    received, splits, sizes = exchange_counts(group, alone, counts)
    mine = torch.tensor([1, 2, 3, 4]).view(2, 2)[rank]
    assert torch.equal(received, torch.stack([mine, 2 * mine]).unsqueeze(0))
    assert sizes == [sum(splits.recv)]
    assert splits.send == [3 * (rank + 1), 7 * (rank + 1)]
    assert splits.recv == [int(mine.sum()), 2 * int(mine.sum())]
    rows, pairs = torch.tensor([1, 4]) + rank, torch.tensor([2, 8]) + rank
    exchanged = exchange_rows_and_pairs(group, alone, rows, pairs)
    assert exchanged.splits == RowSplits(rows.tolist(), [[1, 2], [4, 5]][rank])
    assert exchanged.pairs == [2 + 3, 8 + 9][rank]
    gathered = gather_sizes(group, 5 + rank, counts.view(2, 2).sum(1))
    assert gathered.sizes == [5, 6]
    assert gathered.wanted == 3 * int(mine.sum())
    assert torch.equal(all_reduce_sum(group, counts), torch.tensor([3, 6, 9, 12]))
    assert counts[0] == rank + 1, "the argument is left alone"


def test_ranks_learn_what_the_others_send():
    run_ranks(_sizes, 2)


def _mates() -> None:
    rank = dist.get_rank()
    groups = ProcessGroupCollection.create(ParallelLayout(world_size=4, ep=2, etp=2))
    table = torch.arange(16).view(4, 4) ** 2  # [from][expert]: expert e lives on ranks 2 * (e // 2)
    received, splits, sizes = exchange_counts(groups.ep, groups.expt_tp, table[rank])
    block = rank // 2
    mine = table[:, 2 * block : 2 * block + 2]  # [from, num_local]
    assert torch.equal(received, mine.view(2, 2, 2).transpose(0, 1))  # [slice, source, expert]
    assert splits.send == table[rank].view(2, 2).sum(1).tolist()
    assert splits.recv == mine[[rank % 2, rank % 2 + 2]].sum(1).tolist()
    assert sizes == received.sum((1, 2)).tolist()
    hops = exchange_counts_in_hops(groups.ep_node, groups.ep_across, groups.expt_tp, table[rank])
    assert torch.equal(hops.received, received)
    assert hops.sizes == sizes
    rows = exchange_rows_and_pairs(
        groups.ep, groups.expt_tp, table[rank, ::2].clone(), table[rank].view(2, 2).sum(1)
    )
    assert torch.equal(rows.received, received[:, :, 0])
    assert (sum(rows.splits.recv), rows.sizes) == (
        int(rows.received[rank % 2].sum()),
        rows.received.sum(1).tolist(),
    )
    assert rows.pairs == sum(sizes)
    gathered = gather_sizes(groups.tp_ep, 5 + rank, table[rank].view(2, 2).sum(1))
    assert gathered == ([5, 6, 7, 8], int(mine.sum()))


def test_ranks_that_share_experts_learn_what_all_of_them_get():
    run_ranks(_mates, 4)


def _hops(places: int) -> None:
    rank, nodes = dist.get_rank(), 4 // places
    layout = ParallelLayout(world_size=4, ep=4, node_size=places)
    groups = ProcessGroupCollection.create(layout)
    counts = [torch.arange(8) * 10 + source for source in range(4)]  # [from][expert]
    hops = exchange_counts_in_hops(groups.ep_node, groups.ep_across, groups.expt_tp, counts[rank])
    plain = exchange_counts(groups.ep, groups.expt_tp, counts[rank])
    assert torch.equal(hops.received, plain.received)
    assert hops.sent.flatten().tolist() == plain.splits.send
    assert sum(hops.across.recv) == sum(plain.splits.recv)
    node, place = divmod(rank, places)
    for source in range(places):
        ranks = [to * places + place for to in range(nodes)]
        want = [int(counts[node * places + source].view(4, 2)[to].sum()) for to in ranks]
        assert hops.passed[source].tolist() == want
    assert hops.within == RowSplits(hops.sent.sum(0).tolist(), hops.passed.sum(1).tolist())
    assert hops.across.send == hops.passed.sum(0).tolist()


@pytest.mark.parametrize("places", [1, 2, 4])
def test_counts_in_two_hops_are_those_of_one(places):
    run_ranks(_hops, 4, places)


def _alone() -> None:
    group = dist.group.WORLD
    x = torch.randn(3, 2, requires_grad=True)
    splits = RowSplits([], [])
    assert all_to_all(group, x, splits) is x
    assert all_gather_rows(group, x, [3]) is x
    assert reduce_scatter_rows(group, x, [3]) is x
    counts = torch.tensor([1, 2])
    assert torch.equal(exchange_counts(group, group, counts).received, counts.view(1, 1, 2))
    rows = exchange_rows_and_pairs(group, group, counts[:1], counts[1:])
    assert rows[1:] == (splits, [], None)
    hops = exchange_counts_in_hops(group, group, group, counts)
    assert (hops.within, hops.across, hops.sizes) == (splits, splits, [])
    assert torch.equal(hops.received, counts.view(1, 1, 2))
    assert gather_sizes(group, 3, counts) == ([3], None)
    with pytest.raises(AttributeError):
        exchange_counts(group, group, counts).splits = splits  # type: ignore[misc]


def test_a_group_of_one_is_an_identity():
    run_ranks(_alone, 1)
