"""What dispatchers send to other ranks, counted: one row a rank against one row an expert."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.transformer.moe.routing import topk_routing
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import make_groups

EXPERTS, TOPK, TOKENS, WIDTH = 64, 8, 128, 256
SHARES = {2: 0.27, 4: 0.48, 8: 0.70}
"""Upper bound of deduplicated / plain bytes by ep, with evenly random routing."""


@contextmanager
def count_bytes(rank: int) -> Iterator[dict[str, int]]:
    """Count what this rank sends to others by all-to-all, in bytes: rows [n, WIDTH], and all."""
    original = dist.all_to_all_single
    sent = {"rows": 0, "all": 0}

    def counted(out: Tensor, x: Tensor, recv: Any = None, send: Any = None, **kwargs: Any) -> Any:
        own = len(x) // dist.get_world_size() if send is None else send[rank]
        size = (x.numel() - own * (x.numel() // max(len(x), 1))) * x.element_size()
        sent["all"] += size
        if x.dim() == 2 and x.shape[1] == WIDTH:
            sent["rows"] += size
        return original(out, x, recv, send, **kwargs)

    dist.all_to_all_single = counted
    try:
        yield sent
    finally:
        dist.all_to_all_single = original


def _pass(name: str, groups: Any, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, int], int]:
    """Dispatch and combine; return output and gradients, bytes, and rows that should be sent."""
    ep = groups.ep.size()
    rng = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(TOKENS, WIDTH, generator=rng).to(dtype).requires_grad_()
    logits = torch.randn(TOKENS, EXPERTS, generator=rng).to(dtype).requires_grad_()
    probs, routing_map = topk_routing(logits, TOPK)
    dispatcher = TOKEN_DISPATCHERS[name](EXPERTS, pg_collection=groups, topk=TOPK)
    with count_bytes(dist.get_rank()) as sent:
        there = dispatcher.token_permutation(tokens, probs, routing_map)
        scale = torch.arange(EXPERTS // ep).add(1).repeat_interleave(there.tokens_per_expert)
        rows = there.hidden_states * (there.probs * scale)[:, None].to(dtype)
        output = dispatcher.token_unpermutation(rows, there)
        output.square().sum().backward()
    assert tokens.grad is not None
    assert logits.grad is not None
    ranks = routing_map.view(TOKENS, ep, -1).any(dim=2)
    ranks[:, dist.get_rank()] = False
    return [output.detach(), tokens.grad, logits.grad], sent, int(ranks.sum())


def _compare() -> None:
    ep = dist.get_world_size()
    groups = make_groups(ep)
    _, plain_sent, _ = _pass("alltoall", groups, torch.float32)
    dedup, dedup_sent, _ = _pass("alltoall_dedup", groups, torch.float32)
    again, _, _ = _pass("alltoall_dedup", groups, torch.float32)
    totals = torch.tensor([plain_sent["all"], dedup_sent["all"]])
    dist.all_reduce(totals)
    assert dedup_sent["all"] > dedup_sent["rows"], "probs travel too"
    share = (totals[1] / totals[0]).item()
    assert share <= SHARES[ep], f"{share=:.3f} at {ep=}: {totals.tolist()} bytes"
    assert all(torch.equal(a, b) for a, b in zip(again, dedup, strict=True))
    want, _, _ = _pass("alltoall", groups, torch.float64)
    got, sent, to_ranks = _pass("alltoall_dedup", groups, torch.float64)
    for a, b in zip(got, want, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-12
    # Forward sends each token once to a rank; backward sends the gradients of the sums there.
    # The other two passes carry what came here, whose number the other ranks know.
    rows = torch.tensor([to_ranks, sent["rows"] // (WIDTH * 8)])
    dist.all_reduce(rows)
    assert rows[1] == 4 * rows[0]


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_deduplication_sends_less_for_top_8_of_64_and_gives_the_same(ep):
    run_ranks(_compare, ep)
