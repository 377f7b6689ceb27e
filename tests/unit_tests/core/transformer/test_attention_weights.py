"""Scale, window, sink, soft cap and values of another size, in every way, against plain loops."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.sequence_slices import take_own
from megatron.core.tensor_parallel.random import SampleRng, keep_scale
from megatron.core.transformer import blocked_attention, fused_attention
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import WeightDropout, blocked_causal_attention
from megatron.core.transformer.context_parallel import ring
from megatron.core.transformer.context_parallel.attention import context_parallel_attention
from megatron.core.transformer.dot_product_attention import causal_attention
from megatron.core.transformer.fused_attention import fused_causal_attention
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import TOLERANCES
from tests.reference.attention import causal_attention as plain
from tests.unit_tests.core.transformer.moe.layers import relative_error

BLOCK, HEADS, EXACT = 4, 4, TOLERANCES[torch.float64]
WAYS = {"blocks": blocked_causal_attention, "kernel": fused_causal_attention}
WINDOWS = [None, 0, 1, 3, 4, 6, 11, 12, 100]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocked_attention, fused_attention):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


def _inputs(
    s: int, groups: int, heads: int = HEADS, value_dim: int = 5, samples: int = 2
) -> list[Tensor]:
    """Query, key, value, sinks and the gradient of the output."""
    generator = torch.Generator().manual_seed(s + groups)
    shapes = [
        (samples, heads, s, 6),
        (samples, groups, s, 6),
        (samples, groups, s, value_dim),
        (heads,),
        (samples, heads, s, value_dim),
    ]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def _documents(s: int) -> Tensor:
    """Sample 0 is one document, sample 1 two, the second from position 3."""
    mask = torch.zeros(2, 1, s, s, dtype=torch.bool)
    mask[1, :, 3:, :3] = True
    return mask


def _factor(dropout: WeightDropout, s: int, window: int | None) -> Tensor:
    """Scaled masks of all blocks, laid out as one [2, HEADS, s, s] matrix."""
    factor = torch.ones(2, HEADS, s, s, dtype=torch.float64)
    for start in range(0, s, BLOCK):
        low = 0 if window is None else max(0, start - window)
        block = factor[:, :, start : start + BLOCK, low : start + BLOCK]
        kept = dropout.kept(block, total=s, row=start, column=low)
        block[:] = kept.double() * keep_scale(dropout.p)
    return factor


def _agree(got: Tensor, wanted: Tensor, inputs: list[Tensor], upstream: Tensor) -> None:
    torch.testing.assert_close(got, wanted, **EXACT)
    one = torch.autograd.grad(got, inputs, upstream.detach(), allow_unused=True)
    other = torch.autograd.grad(wanted, inputs, upstream.detach(), allow_unused=True)
    torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("sunk", [False, True], ids=["no sink", "sinks"])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_and_sinks_equal_plain_loops(
    window: int | None, sunk: bool, masked: bool, way: str
) -> None:
    s = 13
    *inputs, sinks, upstream = _inputs(s, 2)
    mask, sink = _documents(s) if masked else None, sinks if sunk else None
    got = WAYS[way](*inputs, mask, Weighting(window=window, sink=sink, scale=0.3))
    wanted = plain(*inputs, window=window, sinks=sink, mask=mask, scale=0.3)
    _agree(got, wanted, [*inputs, sinks], upstream)


@pytest.mark.parametrize("softcap", [0.3, 30.0])
@pytest.mark.parametrize("dropping", [False, True], ids=["all weights", "dropped weights"])
@pytest.mark.parametrize("window", [None, 0, 6])
def test_caps_with_all_else_equal_plain_loops(
    window: int | None, dropping: bool, softcap: float
) -> None:
    s = 10
    *inputs, sinks, upstream = _inputs(s, 2)
    mask = _documents(s)
    dropout = WeightDropout(SampleRng(1, (7, 3)), 0.3, 5, window=window) if dropping else None
    weighting = Weighting(window=window, sink=sinks, softcap=softcap, dropout=dropout)
    got = causal_attention(*inputs, mask, weighting)
    factor = None if dropout is None else _factor(dropout, s, window)
    more = {"window": window, "sinks": sinks, "mask": mask, "factor": factor}
    _agree(got, plain(*inputs, softcap=softcap, **more), [*inputs, sinks], upstream)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("s", "heads", "groups"), [(1, 1, 1), (2, 1, 1), (5, 4, 1), (9, 4, 4)])
def test_odd_sizes_equal_plain_loops(s: int, heads: int, groups: int, way: str) -> None:
    *inputs, sinks, upstream = _inputs(s, groups, heads, value_dim=9, samples=1)
    got = WAYS[way](*inputs, None, Weighting(window=1, sink=sinks))
    _agree(got, plain(*inputs, window=1, sinks=sinks), [*inputs, sinks], upstream)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("offset", "rows"), [(0, 3), (3, 7), (5, 5), (12, 1), (6, 7)])
@pytest.mark.parametrize("window", [None, 0, 2, 5, 40])
def test_some_queries_get_what_they_get_among_all(
    window: int | None, offset: int, rows: int, way: str
) -> None:
    s, own = 13, slice(offset, offset + rows)
    (query, key, value, sinks, _), mask = _inputs(s, 2), _documents(13)
    weighting = Weighting(window=window, sink=sinks)
    whole = WAYS[way](query, key, value, mask, weighting)[:, :, own]
    some = WAYS[way](query[:, :, own], key, value, mask[:, :, own], weighting, offset=offset)
    torch.testing.assert_close(some, whole, **EXACT)
    unmasked = WAYS[way](query[:, :, own], key, value, None, weighting, offset=offset)
    everywhere = plain(query, key, value, window=window, sinks=sinks)[:, :, own]
    torch.testing.assert_close(unmasked, everywhere, **EXACT)


def test_keys_before_the_window_are_not_multiplied() -> None:
    *inputs, _, _ = _inputs(32, 2)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        blocked_causal_attention(*inputs, None, Weighting(window=3))
    weights = [x for x in kept if x.dim() == 4 and x.shape[:2] == (2, HEADS)]
    assert len(weights) == 8
    assert max(x.shape[-1] for x in weights) == BLOCK + 3
    pieces = list(fused_attention._pieces(0, 32, Weighting(window=3)))
    assert max(seen.stop - seen.start for _, seen in pieces) == BLOCK + 3


def test_a_sink_of_minus_infinity_is_none_and_weights_sum_to_less_than_one() -> None:
    query, key, value, sinks, _ = _inputs(7, 2)
    ones = torch.ones_like(value)
    none = blocked_causal_attention(query, key, ones)
    far = torch.full_like(sinks, -1e3)
    torch.testing.assert_close(
        blocked_causal_attention(query, key, ones, None, Weighting(sink=far)), none, **EXACT
    )
    part = blocked_causal_attention(query, key, ones, None, Weighting(sink=sinks))
    assert (part < 1 - 1e-3).all()
    assert (part > 0).all()


def test_bf16_gradients_are_near_those_of_fp64() -> None:
    *inputs, upstream = [x.detach().bfloat16().requires_grad_() for x in _inputs(10, 2)]
    twins = [x.detach().double().requires_grad_() for x in inputs]
    out = blocked_causal_attention(*inputs[:3], None, Weighting(sink=inputs[3], window=5))
    expected = plain(*twins[:3], sinks=twins[3], window=5)
    torch.testing.assert_close(out.double(), expected, rtol=1.6e-2, atol=2e-2)
    got = torch.autograd.grad(out, inputs, upstream.detach())
    wanted = torch.autograd.grad(expected, twins, upstream.detach().double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1.6e-2, atol=5e-2)


LENGTH = 24
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "itself": {"window": 0},
    "longer than the sequence": {"window": 40},
    "sink": {"scale": 0.2},
    "cap": {"softcap": 0.5, "window": 9},
}


def _check_ranks(comm_type: str, masked: bool, dropping: bool) -> None:
    blocked_attention.BLOCK = fused_attention.BLOCK = BLOCK
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for number, options in enumerate(FEATURES.values()):
        *inputs, sinks, upstream = _inputs(LENGTH, (1, 2, 4)[number % 3])
        mask = _documents(LENGTH) if masked else None
        window = options.get("window")
        dropout = WeightDropout(SampleRng(1, (7, 3)), 0.3, 5, window=window) if dropping else None
        weighting = Weighting(**options, sink=sinks, dropout=dropout)
        whole = blocked_causal_attention(*inputs, mask, weighting)
        wanted = torch.autograd.grad(whole, [*inputs, sinks], upstream.detach())

        def own(x: Tensor) -> Tensor:
            return take_own(x.detach(), rank, ranks, dim=2)

        mine = [own(x).requires_grad_() for x in inputs]
        seen = None if mask is None else own(mask)
        way = {"group": group, "comm_type": comm_type, "core": causal_attention}
        out = context_parallel_attention(*mine, seen, weighting, **way)
        assert relative_error(out, own(whole)) <= 1e-12
        with torch.no_grad():  # the kernel of one rank is another one
            evaluated = context_parallel_attention(*mine, seen, weighting, **way)
        assert relative_error(evaluated, own(whole)) <= 1e-12
        *got, d_sinks = torch.autograd.grad(out, [*mine, sinks], own(upstream))
        for one, other in zip(got, wanted, strict=False):
            assert relative_error(one, own(other)) <= 1e-12
        dist.all_reduce(d_sinks)  # as gradients of parameters are: a plain sum over ranks
        assert relative_error(d_sinks, wanted[-1]) <= 1e-12


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a", "p2p"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_of_a_sequence_equal_one_process(comm_type: str, ranks: int) -> None:
    run_ranks(_check_ranks, ranks, comm_type, True, True)
    run_ranks(_check_ranks, ranks, comm_type, False, False)


@pytest.mark.parametrize("window", [None, 0, 2, 7, 30])
@pytest.mark.parametrize("ranks", [1, 3])
def test_round_the_ring_each_key_in_sight_is_met_once_and_few_others(
    ranks: int, window: int | None
) -> None:
    weighting, met = Weighting(window=window), torch.zeros(LENGTH, LENGTH, dtype=torch.int64)
    for rank in range(ranks):
        square = ring._Square(dist.ProcessGroup(rank, ranks), LENGTH, None, weighting)
        for source in range(ranks):
            for at in square.meetings(source):
                rows = slice(at.row, at.row + at.rows.stop - at.rows.start)
                met[rows, at.column : at.column + at.columns.stop - at.columns.start] += 1
    places = torch.arange(LENGTH)
    before = places[:, None] - places
    in_sight = (before >= 0) & (before <= (LENGTH if window is None else window))
    assert (met[in_sight] == 1).all()
    assert met.max() == 1
    reach = LENGTH if window is None else window + BLOCK
    assert (met.sum(dim=1) <= reach).all()
