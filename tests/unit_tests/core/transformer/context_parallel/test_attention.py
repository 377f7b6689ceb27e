"""Attention over spread positions equals attention of one process, dropped weights included."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.sequence_slices import chunks_of, own_ranges, take_own
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer import blocked_attention
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import WeightDropout, blocked_causal_attention
from megatron.core.transformer.context_parallel.attention import context_parallel_attention
from megatron.core.transformer.context_parallel.slices import (
    by_owner,
    in_order,
)
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import relative_error

LENGTH = 24
HEADS = 4


def _inputs(groups: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(groups)
    shapes = [(2, HEADS, LENGTH, 6), *[(2, groups, LENGTH, 6)] * 2, (2, HEADS, LENGTH, 6)]
    drawn = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def _documents() -> Tensor:
    """Sample 0 is one document, sample 1 three."""
    mask = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    for start in (5, 14):
        mask[1, :, start:, :start] = True
    return mask


def _check(comm_type: str, dtype: torch.dtype, tolerance: float) -> None:
    blocked_attention.BLOCK = 4
    group = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for groups, masked, dropping in product((1, 2, 4), (False, True), (False, True)):
        *inputs, upstream = _inputs(groups, dtype)
        mask = _documents() if masked else None
        dropout = WeightDropout(SampleRng(1, (7, 3)), 0.3, 5) if dropping else None
        weighting = Weighting(dropout=dropout)
        whole = blocked_causal_attention(*inputs, mask, weighting)
        wanted = torch.autograd.grad(whole, inputs, upstream.detach())

        mine = [take_own(x.detach(), rank, ranks, dim=2).requires_grad_() for x in inputs]
        out = context_parallel_attention(
            *mine,
            None if mask is None else take_own(mask, rank, ranks, dim=2),
            weighting,
            group=group,
            comm_type=comm_type,
            core=blocked_causal_attention,
        )
        assert out.dtype == dtype
        assert relative_error(out, take_own(whole, rank, ranks, dim=2)) <= tolerance
        got = torch.autograd.grad(out, mine, take_own(upstream.detach(), rank, ranks, dim=2))
        for one, other in zip(got, wanted, strict=True):
            assert relative_error(one, take_own(other, rank, ranks, dim=2)) <= tolerance


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a", "p2p"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_output_and_gradients_equal_one_process(comm_type, ranks):
    run_ranks(_check, ranks, comm_type, torch.float64, 1e-12)


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a", "p2p"])
def test_fp32_and_bf16_are_near(comm_type):
    run_ranks(_check, 2, comm_type, torch.float32, 2e-6)
    run_ranks(_check, 2, comm_type, torch.bfloat16, 5e-2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_slices_cover_a_sequence_once_and_evenly(ranks):
    length = 6 * ranks
    held = [[p for r in own_ranges(length, rank, ranks) for p in r] for rank in range(ranks)]
    assert sorted(p for positions in held for p in positions) == list(range(length))
    causal_work = {sum(p + 1 for p in positions) for positions in held}
    assert len(causal_work) == 1
    assert {sum(chunks_of(rank, ranks)) for rank in range(ranks)} == {2 * ranks - 1}
    x = torch.arange(length)
    slices = torch.stack([take_own(x, rank, ranks, dim=0) for rank in range(ranks)])
    assert slices.tolist() == held
    assert torch.equal(in_order(slices), x)
    assert torch.equal(by_owner(x, ranks), slices)
