"""Causal attention in blocks of queries, with the weights in hand: for dropout, and for CPUs.

Half of a causal score matrix is never looked at. A block of queries multiplies only the keys up
to its own end, so most of that half is never computed; nor is what lies before its window. Weights
are kept for backward: memory grows with the square of the sequence, or with its product with the
window, which is why long sequences go elsewhere.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.tensor_parallel.random import SampleRng, as_factor, keep_scale
from megatron.core.transformer.attention_weights import PLAIN, Weighting
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
    window: int | None = None
    """Positions that a query sees before its own, as in ``Weighting``: no others are drawn."""

    def kept(self, weights: Tensor, *, total: int, row: int, column: int = 0) -> Tensor:
        """Draw the mask of ``weights`` [b, heads, rows, columns], a piece of each head's square.

        Args:
            weights: Its rows lie in one block of ``BLOCK`` positions.
            total: Positions of the whole sequence.
            row: Position of its first query.
            column: Position of its first key, none that no query of the block sees.
        """
        batch, heads, rows, columns = weights.shape
        start = row // BLOCK * BLOCK
        end = min(start + BLOCK, total)
        assert row + rows <= end, f"rows {row} to {row + rows} reach behind the block's {end}"
        low = 0 if self.window is None else max(0, start - self.window)
        mask = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
        block = torch.Size((batch, end - start, end - low))
        for head in range(heads):
            site = f"attention_weights/{start}/{self.first_head + head}"
            drawn = self.rng.kept(
                block, self.p, layer=self.layer, site=site, batch_dim=0, device=weights.device
            )
            mask[:, head] = drawn[:, row - start :, column - low :][:, :rows, :columns]
        return mask


def blocked_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    weighting: Weighting = PLAIN,
    *,
    offset: int = 0,
) -> Tensor:
    """Attend: weights(q k) v over each position's past, or the window of it.

    Scores and weights have the dtype of ``query``; the softmax between them is computed in fp32
    if that is narrower. A soft cap costs one more product of queries and keys in backward.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, positions, d]; the heads of a group follow each other.
        value: [b, groups, positions, dv].
        attention_mask: bool [b, 1, s, positions], True where a query may *not* look, on top of
            causality. Each query must be allowed some.
        weighting: How scores become weights.
        offset: Position of the first query; ``positions`` is at least ``offset + s``.

    Returns:
        [b, heads, s, dv].
    """
    sink, rest = weighting.sink, weighting._replace(sink=None)
    task = _Task(attention_mask, rest, offset, torch.is_grad_enabled())
    out: Tensor = _BlockedAttention.apply(query, key, value, sink, task)
    return out


class _Block(NamedTuple):
    """Some queries, and the keys that any of them sees."""

    start: int
    """Position of the first query."""
    end: int
    """Position behind the last query and the last key."""
    low: int
    """Position of the first key."""
    rows: slice
    """Of the queries that are here."""


class _Task(NamedTuple):
    """What is to be done, but for the tensors that have a gradient."""

    attention_mask: Tensor | None
    weighting: Weighting
    """Without its sink."""
    offset: int
    keeps_weights: bool

    def blocks(self, s: int) -> Iterator[_Block]:
        """Cut ``s`` queries."""
        for start, end in blocks(self.offset, s):
            rows = slice(start - self.offset, end - self.offset)
            yield _Block(start, end, self.weighting.first_seen(start), rows)

    def hidden(self, block: _Block) -> Tensor | None:
        """Return the attention mask of a block, [b, 1, block, seen]."""
        if self.attention_mask is None:
            return None
        return self.attention_mask[:, :, block.rows, block.low : block.end]


class _BlockedAttention(torch.autograd.Function):
    """Each group of a sample is one matrix of the batched products; its r heads are more rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        task: _Task,
    ) -> Tensor:
        weighting = task.weighting
        batch, groups, total, d = key.shape
        s, scale, dropout = query.shape[2], weighting.scale_of(query), weighting.dropout
        q = query.reshape(batch * groups, -1, s, d)
        k, v = key.flatten(0, 1), value.flatten(0, 1)  # [b * groups, positions, d]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # [b * groups, r, s, dv]
        saved: list[Tensor] = []
        for block in task.blocks(s):
            seen = slice(block.low, block.end)
            scores = _product(_rows(q, block), k[:, seen].mT, scale)
            # [b, heads, block, seen]
            scores = scores.view(batch, -1, block.end - block.start, block.end - block.low)
            _hide(weighting.cap_(scores), block, weighting, task.hidden(block))
            probs, spared = _softmax(scores, sink)
            masks = []
            if dropout is not None:
                masks = [dropout.kept(probs, total=total, row=block.start, column=block.low)]
            weights = probs * as_factor(masks[0], probs.dtype) if masks else probs
            got = _product(weights.view(len(k), -1, scores.shape[-1]), v[:, seen], _scale(dropout))
            out[:, :, block.rows] = got.view(len(k), -1, scores.shape[2], v.shape[-1])
            if task.keeps_weights:
                saved += [probs, *masks, *spared]
        ctx.save_for_backward(q, k, v, *saved)
        ctx.task = task  # type: ignore[attr-defined]
        ctx.sink_dtype = None if sink is None else sink.dtype  # type: ignore[attr-defined]
        return out.view(*query.shape[:-1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors  # type: ignore[attr-defined]
        task: _Task = ctx.task  # type: ignore[attr-defined]
        sink_dtype: torch.dtype | None = ctx.sink_dtype  # type: ignore[attr-defined]
        weighting, dropout = task.weighting, task.weighting.dropout
        (n, r, s, d), batch = q.shape, len(d_out)
        d_out, dq = d_out.reshape(n, r, s, -1), torch.empty_like(q)
        wide = compute_dtype(q.dtype)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        d_sink = None if sink_dtype is None else q.new_zeros(n // batch * r, dtype=wide)
        for block in task.blocks(s):
            seen, columns = slice(block.low, block.end), block.end - block.low
            probs = saved.pop(0)  # [b, heads, block, seen]
            factor = None if dropout is None else as_factor(saved.pop(0), probs.dtype)
            d_rows = _rows(d_out, block)  # [n, r * block, dv]
            weights = probs if factor is None else probs * factor
            _accumulate(dv[:, seen], weights.view(n, -1, columns).mT, d_rows, _scale(dropout))
            d_probs = _product(d_rows, v[:, seen].mT, _scale(dropout)).view(probs.shape)
            if factor is not None:
                d_probs.mul_(factor)
            if d_sink is not None:
                d_sink -= _sink_gradient(saved.pop(0), probs, d_probs)
            d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            d_scores = d_scores.view(n, -1, columns)
            rows, scale = _rows(q, block), weighting.scale_of(q)
            if weighting.softcap is not None:
                d_scores.mul_(weighting.slope(weighting.cap_(_product(rows, k[:, seen].mT, scale))))
            _accumulate(dk[:, seen], d_scores.mT, rows, scale)
            dq[:, :, block.rows] = _product(d_scores, k[:, seen], scale).view(n, r, -1, d)
        dk, dv = (x.to(q.dtype).unflatten(0, (batch, -1)) for x in (dk, dv))
        d_sink = None if d_sink is None else d_sink.to(sink_dtype)
        return dq.view(batch, -1, s, d), dk, dv, d_sink, None


def blocks(offset: int, s: int) -> Iterator[tuple[int, int]]:
    """Cut positions ``offset`` to ``offset + s`` at the multiples of ``BLOCK``: (start, end)."""
    start = offset
    while start < offset + s:
        end = min((start // BLOCK + 1) * BLOCK, offset + s)
        yield start, end
        start = end


def _rows(x: Tensor, block: _Block) -> Tensor:
    """Take some queries of all heads of a group: [n, r, s, d] -> [n, r * block, d]."""
    return x[:, :, block.rows].flatten(1, 2)


def _scale(dropout: WeightDropout | None) -> float:
    return 1.0 if dropout is None else keep_scale(dropout.p)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the weights, and what the sink got of each query, [b, heads, block, 1], if any."""
    probs = scores.softmax(dim=-1)
    if sink is None:
        return probs, []
    wide = compute_dtype(scores.dtype)
    above = scores.to(wide).logsumexp(dim=-1, keepdim=True).sub_(sink.to(wide)[:, None, None])
    probs.mul_(above.sigmoid().to(probs.dtype))
    return probs, [above.neg_().sigmoid_()]


def _sink_gradient(spared: Tensor, probs: Tensor, d_probs: Tensor) -> Tensor:
    """Return minus the gradient of each head's sink, [heads]: spared * sum(probs * d_probs)."""
    drift = (probs.to(spared.dtype) * d_probs).sum(dim=-1, keepdim=True)
    return drift.mul_(spared).sum(dim=(0, 2, 3))


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


def _hide(scores: Tensor, block: _Block, weighting: Weighting, hidden: Tensor | None) -> None:
    """Put -inf where a query may not look, in place: [b, heads, block, seen]."""
    size = scores.shape[2]
    later = scores.new_full((size, size), float("-inf")).triu_(1)
    scores[..., block.start - block.low :] += later
    weighting.hide_passed_(scores, block.start, block.low)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
