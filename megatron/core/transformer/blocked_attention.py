"""Causal attention in blocks of queries, with the weights in hand: for dropout, and for CPUs.

Half of a causal score matrix is never looked at. A block of queries multiplies only the keys up
to its own end, so most of that half is never computed. Weights are kept for backward: memory
grows with the square of the sequence, which is why long sequences go elsewhere.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.tensor_parallel.random import SampleRng, as_factor, keep_scale
from megatron.core.transformer.precision import compute_dtype

BLOCK = 128
"""Queries of a block. Dropout masks are drawn by block, so another size gives other masks."""


class WeightDropout(NamedTuple):
    """How attention weights are dropped: the same way whichever rank has a head or a position."""

    rng: SampleRng
    p: float
    layer: int
    first_head: int = 0
    """Number of the first head of this rank among those of all ranks."""

    def kept(self, weights: Tensor, *, total: int, row: int, column: int = 0) -> Tensor:
        """Draw the mask of ``weights`` [b, heads, rows, columns], a piece of each head's square.

        Args:
            weights: Its rows lie in one block of ``BLOCK`` positions.
            total: Positions of the whole sequence.
            row: Position of its first query.
            column: Position of its first key.
        """
        batch, heads, rows, columns = weights.shape
        start = row // BLOCK * BLOCK
        end = min(start + BLOCK, total)
        assert row + rows <= end, f"rows {row} to {row + rows} reach behind the block's {end}"
        mask = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
        block = torch.Size((batch, end - start, end))
        for head in range(heads):
            site = f"attention_weights/{start}/{self.first_head + head}"
            drawn = self.rng.kept(
                block, self.p, layer=self.layer, site=site, batch_dim=0, device=weights.device
            )
            mask[:, head] = drawn[:, row - start :, column:][:, :rows, :columns]
        return mask


def blocked_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: WeightDropout | None = None,
    *,
    offset: int = 0,
) -> Tensor:
    """Attend: softmax(q k / sqrt(d)) v over each position's past.

    Scores and weights have the dtype of ``query``; the softmax between them is computed in fp32
    if that is narrower.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, positions, d]; the heads of a group follow each other.
        value: Like ``key``.
        attention_mask: bool [b, 1, s, positions], True where a query may *not* look, on top of
            causality. Each query must be allowed some.
        dropout: Of weights; None drops nothing.
        offset: Position of the first query; ``positions`` is at least ``offset + s``.

    Returns:
        [b, heads, s, d].
    """
    out: Tensor = _BlockedAttention.apply(
        query, key, value, attention_mask, dropout, offset, torch.is_grad_enabled()
    )
    return out


class _BlockedAttention(torch.autograd.Function):
    """Each group of a sample is one matrix of the batched products; its r heads are more rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: WeightDropout | None,
        offset: int,
        keep: bool,
    ) -> Tensor:
        batch, groups, total, d = key.shape
        s = query.shape[2]
        q = query.reshape(batch * groups, -1, s, d)
        k, v = key.flatten(0, 1), value.flatten(0, 1)  # [b * groups, positions, d]
        out = torch.empty_like(q)  # [b * groups, r, s, d]
        saved: list[Tensor] = []
        for start, end in blocks(offset, s):
            first, last = start - offset, end - offset
            scores = _product(_rows(q, first, last), k[:, :end].mT, d**-0.5)
            scores = scores.view(batch, -1, end - start, end)  # [b, heads, block, end]
            hidden = None if attention_mask is None else attention_mask[:, :, first:last, :end]
            probs = _hide(scores, start, hidden).softmax(dim=-1)
            masks = [] if dropout is None else [dropout.kept(probs, total=total, row=start)]
            weights = probs * as_factor(masks[0], probs.dtype) if masks else probs
            got = _product(weights.view(len(k), -1, end), v[:, :end], _scale(dropout))
            out[:, :, first:last] = got.view(len(k), -1, end - start, d)
            if keep:
                saved += [probs, *masks]
        ctx.save_for_backward(q, k, v, *saved)
        ctx.dropout, ctx.offset = dropout, offset  # type: ignore[attr-defined]
        return out.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        q, k, v, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        dropout: WeightDropout | None = ctx.dropout  # type: ignore[attr-defined]
        offset: int = ctx.offset  # type: ignore[attr-defined]
        scale = _scale(dropout)
        (n, _, s, d), shape = q.shape, d_out.shape
        d_out, dq = d_out.reshape(q.shape), torch.empty_like(q)
        wide = compute_dtype(q.dtype)
        dk, dv = (torch.zeros_like(k, dtype=wide) for _ in range(2))
        for start, end in blocks(offset, s):
            probs = saved.pop(0)
            factor = None if dropout is None else as_factor(saved.pop(0), probs.dtype)
            d_rows = _rows(d_out, start - offset, end - offset)  # [n, r * block, d]
            weights = probs if factor is None else probs * factor
            _accumulate(dv[:, :end], weights.view(n, -1, end).mT, d_rows, scale)
            d_probs = _product(d_rows, v[:, :end].mT, scale).view(probs.shape)
            if factor is not None:
                d_probs.mul_(factor)
            d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            d_scores = d_scores.view(n, -1, end)
            rows = _rows(q, start - offset, end - offset)
            _accumulate(dk[:, :end], d_scores.mT, rows, d**-0.5)
            got = _product(d_scores, k[:, :end], d**-0.5)
            dq[:, :, start - offset : end - offset] = got.view(n, -1, end - start, d)
        dk, dv = (x.to(q.dtype).view(shape[0], -1, k.shape[1], d) for x in (dk, dv))
        return dq.view(shape), dk, dv, None, None, None, None


def blocks(offset: int, s: int) -> Iterator[tuple[int, int]]:
    """Cut positions ``offset`` to ``offset + s`` at the multiples of ``BLOCK``: (start, end)."""
    start = offset
    while start < offset + s:
        end = min((start // BLOCK + 1) * BLOCK, offset + s)
        yield start, end
        start = end


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Take some queries of all heads of a group: [n, r, s, d] -> [n, r * block, d]."""
    return x[:, :, start:end].flatten(1, 2)


def _scale(dropout: WeightDropout | None) -> float:
    return 1.0 if dropout is None else keep_scale(dropout.p)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * a @ b of [n, i, j] and [n, j, k]."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add scale * a @ b to ``total``, which may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)


def _hide(scores: Tensor, start: int, hidden: Tensor | None) -> Tensor:
    """Put -inf where a query may not look, in place: [b, heads, block, end]."""
    block = scores.shape[2]
    scores[..., start:] += scores.new_full((block, block), float("-inf")).triu_(1)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    return scores
