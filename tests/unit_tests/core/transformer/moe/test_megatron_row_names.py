"""Megatron's permute, unpermute and their kin against plain loops, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    get_capacity,
    pad_routing_map,
    permute,
    sort_chunks_by_idxs,
    topk_routing_with_score_function,
    unpermute,
)
from tests.reference import megatron_functions as plain

maps = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=7).map(
    lambda rows: torch.tensor(rows, dtype=torch.bool).view(-1, 4)
)
PROPERTY = settings(max_examples=40, deadline=None)


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).double().requires_grad_()


@given(maps, st.booleans())
@PROPERTY
def test_rows_and_their_sums_equal_a_loop_with_gradients(routing_map, weighted):
    num_tokens = len(routing_map)
    tokens, probs = _random(num_tokens, 3), _random(num_tokens, 4, seed=2)
    found = permute(tokens, routing_map, probs, fused=True)
    places = plain.rows_of(routing_map)
    assert found.sorted_indices.tolist() == [token for token, _ in places]
    assert found.tokens_per_expert.tolist() == routing_map.sum(dim=0).tolist()
    assert found.pad_offsets is None
    assert torch.equal(found.permuted, tokens[found.sorted_indices])
    assert torch.equal(
        found.permuted_probs,
        torch.stack([probs[p] for p in places] or [probs.sum()])[: len(places)],
    )
    scales = torch.arange(1.0, len(places) + 1).double().unsqueeze(1)
    out = unpermute(
        found.permuted * scales,
        found.sorted_indices,
        tokens.shape,
        probs if weighted else None,
        routing_map,
    )
    rows = [tokens[t] for t, _ in places]
    rows = (torch.stack(rows) if rows else tokens.new_zeros(0, 3)) * scales
    want = plain.unpermute(rows, places, num_tokens, probs if weighted else None)
    torch.testing.assert_close(out, want)
    if places:
        inputs = (tokens, probs) if weighted else (tokens,)
        slope = torch.linspace(-1, 2, 3, dtype=torch.float64)
        got = torch.autograd.grad((out * slope).sum(), inputs)
        torch.testing.assert_close(got, torch.autograd.grad((want * slope).sum(), inputs))


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize(("num_tokens", "factor"), [(20, 0.5), (20, 1.0), (6, 100.0), (0, 1.0)])
def test_each_expert_takes_its_capacity_also_one_above_all_tokens(num_tokens, factor, policy):
    logits, tokens = _random(num_tokens, 4), _random(num_tokens, 3, seed=2)
    probs, routing_map = topk_routing_with_score_function(logits, 2)
    probs, routing_map = apply_router_token_dropping(probs, routing_map, 2, factor, policy, True)
    capacity = get_capacity(num_tokens * 2, 4, factor)
    kept = routing_map & (probs > 0)
    found = permute(tokens, kept, probs, num_out_tokens=capacity * 4, drop_and_pad=True)
    places = plain.rows_of(kept, min(capacity, num_tokens))
    assert found.sorted_indices.tolist() == [token for token, _ in places]
    assert found.tokens_per_expert.tolist() == [min(capacity, num_tokens)] * 4
    out = unpermute(found.permuted, found.sorted_indices, tokens.shape, probs, drop_and_pad=True)
    torch.testing.assert_close(out, tokens * probs.sum(dim=1, keepdim=True))
    if num_tokens:
        got = torch.autograd.grad(out.square().sum(), (tokens, logits), retain_graph=True)
        want = (tokens * probs.sum(dim=1, keepdim=True)).square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(want, (tokens, logits)))


def test_gradients_are_right_by_finite_differences():
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    probs = _random(3, 3, seed=2)
    indices = permute(_random(3, 2), routing_map).sorted_indices
    assert torch.autograd.gradcheck(lambda x: permute(x, routing_map)[0], _random(3, 2))
    assert torch.autograd.gradcheck(
        lambda x, p: unpermute(x, indices, (3, 2), p, routing_map), (_random(5, 2), probs)
    )


def test_a_narrow_sum_is_rounded_once_and_keeps_its_dtype():
    rows = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().unsqueeze(1)  # 256 + 1 rounds to 256
    out = unpermute(rows, torch.zeros(4, dtype=torch.int64), (1, 1))
    assert out.dtype == torch.bfloat16
    assert out.item() == torch.tensor(259.0).bfloat16().item()
    weighted = unpermute(
        rows, torch.zeros(4, dtype=torch.int64), (1, 1), torch.ones(1, 4), torch.ones(1, 4)
    )
    assert weighted.dtype == torch.bfloat16


def test_what_is_not_there_is_refused():
    tokens, routing_map = _random(3, 2), torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="align_size 16 is not offered"):
        permute(tokens, routing_map, align_size=16)
    with pytest.raises(ConfigError, match="num_out_tokens 5: there are 6"):
        permute(tokens, routing_map, num_out_tokens=5)
    with pytest.raises(ConfigError, match="drop_and_pad needs num_out_tokens"):
        permute(tokens, routing_map, drop_and_pad=True)
    found = permute(tokens, routing_map)
    with pytest.raises(ConfigError, match="pad_offsets is not offered"):
        unpermute(found[0], found[2], (3, 2), pad_offsets=torch.zeros(2))
    with pytest.raises(ConfigError, match="needs routing_map"):
        unpermute(found[0], found[2], (3, 2), torch.ones(3, 2))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.randoms(use_true_random=False))
@PROPERTY
def test_chunks_are_sorted_with_their_probs(sizes, random):
    order = list(range(len(sizes)))
    random.shuffle(order)
    rows, probs = _random(sum(sizes), 2), _random(sum(sizes), seed=3)
    for wrap in (list, torch.tensor):
        got, got_probs = sort_chunks_by_idxs(rows, wrap(sizes), wrap(order), probs, fused=True)
        want = torch.cat([rows.split(sizes)[i] for i in order])
        want_probs = torch.cat([probs.split(sizes)[i] for i in order])
        assert torch.equal(got, want)
        assert torch.equal(got_probs, want_probs)
    weight = torch.arange(float(sum(sizes))).double()
    got_gradients = torch.autograd.grad(
        (got.sum(dim=1) * weight).sum() + (got_probs * weight).sum(), (rows, probs)
    )
    gradients = torch.autograd.grad(
        (want.sum(dim=1) * weight).sum() + (want_probs * weight).sum(), (rows, probs)
    )
    torch.testing.assert_close(got_gradients, gradients)
    assert sort_chunks_by_idxs(rows, sizes, order)[1] is None


@pytest.mark.parametrize("multiple", [1, 2, 5])
def test_a_map_is_padded_by_the_first_spare_tokens(multiple):
    rng = torch.Generator().manual_seed(4)
    routing_map = torch.rand(20, 6, generator=rng) < 0.3
    routing_map[:, 0] = False
    got = pad_routing_map(routing_map, multiple)
    assert torch.equal(got, plain.padded_map(routing_map, multiple))
    assert (got.sum(dim=0) % multiple == 0).all()
    assert not got[:, 0].any(), "no token, no padding"
    assert pad_routing_map(routing_map.int(), multiple).dtype == torch.int32


def test_a_map_that_cannot_be_padded_is_refused():
    with pytest.raises(ConfigError, match="7 tokens cannot fill every expert"):
        pad_routing_map(torch.ones(7, 2, dtype=torch.bool), 4)
