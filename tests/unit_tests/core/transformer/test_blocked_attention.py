"""Blocked attention against one explicit product, with groups, masks and dropped weights."""

import pytest
import torch
from torch import Tensor

from megatron.core.tensor_parallel.random import SampleRng, keep_scale
from megatron.core.transformer import blocked_attention
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import WeightDropout, blocked_causal_attention
from tests.helpers.tolerances import TOLERANCES

BLOCK = 4
DROPOUT = WeightDropout(SampleRng(1, (10, 11)), 0.3, 5)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK", BLOCK)


def _inputs(s: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(s)
    shapes = [(2, 4, s, 8), (2, groups, s, 8), (2, groups, s, 8), (2, 4, s, 8)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: Tensor | None
) -> Tensor:
    s, repeats = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    if mask is not None:
        hidden = hidden | mask
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1)
    return (weights if factor is None else weights * factor) @ value


def _dropout_factor(s: int) -> Tensor:
    """Scaled masks of all blocks, laid out as one [2, 4, s, s] matrix."""
    factor = torch.zeros(2, 4, s, s, dtype=torch.float64)
    for start in range(0, s, BLOCK):
        end = min(start + BLOCK, s)
        block = factor[:, :, start:end, :end]
        block[:] = DROPOUT.kept(block, total=s, row=start).double() * keep_scale(DROPOUT.p)
    return factor


def _document_mask(s: int) -> Tensor:
    """Sample 0 is one document, sample 1 two, the second from position 3."""
    mask = torch.zeros(2, 1, s, s, dtype=torch.bool)
    mask[1, :, 3:, :3] = True
    return mask


@pytest.mark.parametrize("dropping", [False, True], ids=["all weights", "dropped weights"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("s", [1, 4, 10])
def test_output_and_gradients_equal_one_explicit_product(
    s: int, groups: int, masked: bool, dropping: bool
) -> None:
    *inputs, upstream = _inputs(s, groups)
    mask = _document_mask(s) if masked else None
    out = blocked_causal_attention(*inputs, mask, Weighting(dropout=DROPOUT if dropping else None))
    expected = _explicit(*inputs, mask, _dropout_factor(s) if dropping else None)
    exact = TOLERANCES[torch.float64]
    torch.testing.assert_close(out, expected, **exact)
    got = torch.autograd.grad(out, inputs, upstream.detach())
    wanted = torch.autograd.grad(expected, inputs, upstream.detach())
    torch.testing.assert_close(got, wanted, **exact)


@pytest.mark.parametrize("dropping", [False, True], ids=["all weights", "dropped weights"])
@pytest.mark.parametrize(("offset", "rows"), [(0, 3), (3, 4), (5, 5), (8, 2), (9, 1)])
def test_some_queries_get_what_they_get_among_all(offset: int, rows: int, dropping: bool) -> None:
    s, own = 10, slice(offset, offset + rows)
    *inputs, upstream = _inputs(s, 2)
    mask, weighting = _document_mask(s), Weighting(dropout=DROPOUT if dropping else None)
    whole = blocked_causal_attention(*inputs, mask, weighting)[:, :, own]
    query, key, value = inputs
    part = blocked_causal_attention(
        query[:, :, own], key, value, mask[:, :, own], weighting, offset=offset
    )
    exact = TOLERANCES[torch.float64]
    torch.testing.assert_close(part, whole, **exact)
    some = upstream.detach()[:, :, own]
    got = torch.autograd.grad(part, inputs, some)
    wanted = torch.autograd.grad(whole, inputs, some)
    torch.testing.assert_close(got, wanted, **exact)


def test_a_head_is_dropped_alike_on_whichever_rank_it_is() -> None:
    weights = torch.zeros(2, 4, 3, 7)
    whole = DROPOUT.kept(weights, total=10, row=4)
    mine = DROPOUT._replace(first_head=2).kept(weights[:, 2:], total=10, row=4)
    assert torch.equal(mine, whole[:, 2:])
    assert torch.equal(DROPOUT.kept(weights[..., :2], total=10, row=4, column=5), whole[..., 5:])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_bf16_gradients_are_near_those_of_fp64() -> None:
    *inputs, upstream = _inputs(10, 2, torch.bfloat16)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    out = blocked_causal_attention(*inputs)
    expected = _explicit(*twins, None, None)
    torch.testing.assert_close(out.double(), expected, rtol=1.6e-2, atol=2e-2)
    got = torch.autograd.grad(out, inputs, upstream.detach())
    wanted = torch.autograd.grad(expected, twins, upstream.detach().double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1.6e-2, atol=5e-2)


def test_nothing_is_kept_in_evaluation() -> None:
    *inputs, _ = _inputs(10, 4)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.no_grad():
            blocked_causal_attention(*inputs)
        assert not kept
        blocked_causal_attention(*inputs)
    assert any(x.shape[-2:] == (4, 4) for x in kept)
