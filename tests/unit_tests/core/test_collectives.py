"""Gathers and scattered sums over gloo: the same result whichever way they go."""

import pytest
import torch
import torch.distributed as dist

from megatron.core import collectives
from megatron.core.collectives import all_gather_single, start_all_gather, start_reduce_scatter
from tests.helpers.ranks import run_ranks

SIZES = (3, 5000, 1 << 16)
"""Below and above what goes the other way, in elements of a rank."""


def _of_rank(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    rng = torch.Generator().manual_seed(rank)
    return torch.randn(size, generator=rng).to(dtype)


def _gathers(dtype: torch.dtype) -> None:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for size in SIZES:
        expected = torch.cat([_of_rank(r, size, dtype) for r in range(ranks)])
        whole = torch.zeros(ranks * size, dtype=dtype)
        all_gather_single(whole, _of_rank(rank, size, dtype), group=group)
        assert torch.equal(whole, expected)
        flat = torch.zeros(ranks * size, dtype=dtype)
        own = flat[rank * size : (rank + 1) * size]
        own.copy_(_of_rank(rank, size, dtype))
        start_all_gather(flat, own, group=group).wait()
        assert torch.equal(flat, expected)


def _scattered_sums(dtype: torch.dtype) -> None:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for size in SIZES:
        whole = _of_rank(rank, ranks * size, dtype)
        expected = torch.zeros(size, dtype=dtype)
        collectives._torch_reduce_scatter(expected, whole.clone(), group=group)
        apart, kept = torch.zeros(size, dtype=dtype), whole.clone()
        start_reduce_scatter(apart, kept, group=group).wait()
        assert torch.equal(apart, expected)
        assert torch.equal(kept, whole)  # not a part of it: left alone
        own = whole[rank * size : (rank + 1) * size]
        start_reduce_scatter(own, whole, group=group).wait()
        assert torch.equal(own, expected)  # to the bit


@pytest.mark.parametrize("body", [_gathers, _scattered_sums])
@pytest.mark.parametrize("ranks", [2, 4])
def test_large_and_small_ones_give_what_torch_gives(body, ranks):
    for dtype in (torch.float32, torch.float64):
        run_ranks(body, ranks, dtype)


def test_weights_in_bf16_are_gathered():
    run_ranks(_gathers, 2, torch.bfloat16)


def _steps_seen(calls: list[str]) -> None:
    dist.broadcast = lambda *_, **__: calls.append("broadcast")
    dist.all_reduce = lambda *_, **__: calls.append("all_reduce")
    group, rank = dist.group.WORLD, dist.get_rank()
    whole = torch.ones(2 << 16)
    own = whole[rank << 16 : (rank + 1) << 16]
    start_reduce_scatter(own, whole, group=group).wait()
    assert own.eq(2.0).all()
    all_gather_single(whole, own.clone(), group=group)
    assert whole.eq(2.0).all()
    assert not calls


def test_who_watches_collectives_sees_one_and_not_its_steps():
    run_ranks(_steps_seen, 2, [])
