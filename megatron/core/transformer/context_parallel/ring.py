"""Attention by passing keys and values round a ring of ranks.

Each rank meets the keys of every other one once, keeps a running softmax, and computes while the
next ones travel. Backward passes keys and values round again, their gradients with them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.sequence_slices import own_ranges
from megatron.core.tensor_parallel.random import as_factor, keep_scale
from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import blocks
from megatron.core.transformer.precision import compute_dtype


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    weighting: Weighting,
    group: ProcessGroup,
) -> Tensor:
    """Attend; see ``context_parallel_attention``. Sums are taken in fp32 or wider.

    Under a window keys go all the way round as without; those that nobody here sees cost no more.
    Keeps queries, keys, values, output and one number a query; weights are made again in backward.

    Source: Liu et al. 2023 (arXiv:2310.01889); balanced slices: Brandon et al. 2023
    (arXiv:2311.09431).
    """
    out: Tensor = _RingAttention.apply(
        *(query, key, value, weighting.sink, attention_mask, weighting._replace(sink=None), group)
    )
    return out


class _Meeting(NamedTuple):
    """Some queries of this rank and the chunk of keys they may look at."""

    rows: slice
    """Of this rank's queries."""
    columns: slice
    """Of the keys that are here."""
    row: int
    """Position of the first of these queries."""
    column: int
    """Position of the first of these keys."""


class _Square(NamedTuple):
    """What stays the same all the way round."""

    group: ProcessGroup
    total: int
    attention_mask: Tensor | None
    weighting: Weighting

    def ranges(self, rank: int) -> tuple[range, ...]:
        return own_ranges(self.total, rank, self.group.size())

    def meetings(self, source: int) -> Iterator[_Meeting]:
        """Yield what the queries here and the keys of rank ``source`` have to do with each other.

        In pieces of queries that lie in one block (see ``WeightDropout``).
        """
        mine, theirs = self.ranges(self.group.rank()), self.ranges(source)
        for number, queries in enumerate(mine):
            for other, keys in enumerate(theirs):
                if keys.start > queries.start:
                    continue
                for start, end in blocks(queries.start, len(queries)):
                    seen = min(len(keys), end - keys.start)
                    passed = max(0, self.weighting.first_seen(start) - keys.start)
                    if passed >= seen:
                        continue
                    here, shift = other * len(keys), number * len(queries) - queries.start
                    columns = slice(here + passed, here + seen)
                    rows = slice(start + shift, end + shift)
                    yield _Meeting(rows, columns, start, keys.start + passed)

    def scores(self, q: Tensor, k: Tensor, at: _Meeting) -> Tensor:
        """Return the scores [b, g, r, rows, columns] of all of these queries and keys."""
        rows = q[..., at.rows, :] * self.weighting.scale_of(q)
        return self.weighting.cap_(rows @ k[:, :, None, at.columns].mT)

    def hide_(self, scores: Tensor, at: _Meeting) -> Tensor:
        """Put -inf where a query may not look, in place."""
        shape = scores.shape[-2:]
        if at.column + shape[1] > at.row:
            later = torch.ones(shape, dtype=torch.bool, device=scores.device).triu_(
                at.row - at.column + 1
            )
            scores.masked_fill_(later, float("-inf"))
        self.weighting.hide_passed_(scores, at.row, at.column)
        if self.attention_mask is not None:
            seen = slice(at.column, at.column + shape[1])
            scores.masked_fill_(self.attention_mask[:, :, None, at.rows, seen], float("-inf"))
        return scores

    def kept(self, weights: Tensor, at: _Meeting) -> Tensor | None:
        """Return zeros and scaled ones to multiply ``weights`` by, or None."""
        dropout = self.weighting.dropout
        if dropout is None:
            return None
        flat = weights.flatten(1, 2)  # [b, n, rows, columns]
        kept = dropout.kept(flat, total=self.total, row=at.row, column=at.column)
        return as_factor(kept, weights.dtype).mul_(keep_scale(dropout.p)).view_as(weights)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        attention_mask: Tensor | None,
        weighting: Weighting,
        group: ProcessGroup,
    ) -> Tensor:
        square = _Square(group, query.shape[2] * group.size(), attention_mask, weighting)
        wide = compute_dtype(query.dtype)
        q = query.unflatten(1, (key.shape[1], -1)).to(wide)  # [b, g, r, s, d]
        out = q.new_zeros(*q.shape[:-1], value.shape[-1])
        top = q.new_full((*q.shape[:-1], 1), float("-inf"))
        total = torch.zeros_like(top)
        if sink is not None:  # it has been met before all keys, with weight exp(sink - top) = 1
            top.copy_(_by_head(sink, top))
            total.fill_(1.0)
        for source, (here,) in _round(group, [_flat(key, value)]):
            k, v = _apart(here.to(wide), key, value)
            for at in square.meetings(source):
                _meet(square, at, q, k, v, out, top, total)
        out.div_(total)
        result = out.flatten(1, 2).to(query.dtype)
        ctx.square = square
        ctx.save_for_backward(query, key, value, sink, result, top.add_(total.log_()))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sink, result, lse = ctx.saved_tensors
        square: _Square = ctx.square
        q, d_out, out = (
            x.unflatten(1, (key.shape[1], -1)).to(lse.dtype) for x in (query, grad, result)
        )
        d_q = torch.zeros_like(q)
        drift = torch.linalg.vecdot(d_out, out).unsqueeze(-1)  # sum of weight * d weight
        gradients = torch.zeros_like(_flat(key, value), dtype=lse.dtype)
        for source, (here, d_here) in _round(square.group, [_flat(key, value), gradients]):
            k, v = _apart(here.to(lse.dtype), key, value)
            d_k, d_v = _apart(d_here, key, value)
            for at in square.meetings(source):
                scores = square.scores(q, k, at)
                slope = square.weighting.slope(scores)
                weights = (square.hide_(scores, at) - lse[..., at.rows, :]).exp_()
                factor = square.kept(weights, at)
                d_rows = d_out[..., at.rows, :]
                dropped = weights if factor is None else weights * factor
                d_v[:, :, at.columns] += (dropped.mT @ d_rows).sum(dim=2)
                d_weights = d_rows @ v[:, :, None, at.columns].mT
                if factor is not None:
                    d_weights.mul_(factor)
                d_scores = d_weights.sub_(drift[..., at.rows, :]).mul_(weights)
                d_scores.mul_(square.weighting.scale_of(q))
                if slope is not None:
                    d_scores.mul_(slope)
                d_q[..., at.rows, :] += d_scores @ k[:, :, None, at.columns]
                d_k[:, :, at.columns] += (d_scores.mT @ q[..., at.rows, :]).sum(dim=2)
            gradients = d_here
        (gradients,) = _passed(square.group, [gradients]).wait()
        d_k, d_v = _apart(gradients.to(key.dtype), key, value)
        d_sink = None
        if sink is not None:
            spared = (_by_head(sink, lse) - lse).exp_()  # the sink's share of each query
            d_sink = spared.mul_(drift).sum(dim=(0, 3, 4)).flatten().neg_().to(sink.dtype)
        return d_q.flatten(1, 2).to(query.dtype), d_k, d_v, d_sink, None, None, None


def _meet(
    square: _Square,
    at: _Meeting,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    total: Tensor,
) -> None:
    """Add what these queries see of these keys to the running softmax ``out``, ``top``, ``total``.

    Source: Milakov and Gimelshein 2018 (arXiv:1805.02867).
    """
    scores = square.hide_(square.scores(q, k, at), at)
    rows = (..., at.rows, slice(None))
    highest = torch.maximum(top[rows], scores.amax(dim=-1, keepdim=True))
    finite = highest.masked_fill(highest == float("-inf"), 0.0)  # nothing seen so far
    old, weights = (top[rows] - finite).exp_(), scores.sub_(finite).exp_()
    total[rows] = total[rows] * old + weights.sum(dim=-1, keepdim=True)
    factor = square.kept(weights, at)
    dropped = weights if factor is None else weights * factor
    out[rows] = out[rows] * old + dropped @ v[:, :, None, at.columns]
    top[rows] = highest


def _by_head(sink: Tensor, like: Tensor) -> Tensor:
    """Bring ``sink`` [n] to the shape of a number a query: [g, r, 1, 1], in the dtype of it."""
    return sink.to(like.dtype).view(*like.shape[1:3], 1, 1)


def _flat(key: Tensor, value: Tensor) -> Tensor:
    """Put keys and values, whose heads may differ in size, into one message."""
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _apart(flat: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of ``flat`` in the shapes of ``key`` and ``value``."""
    first, second = flat.split([key.numel(), value.numel()])
    return first.view(key.shape), second.view(value.shape)


class _Passing(NamedTuple):
    """Tensors on their way to the next rank."""

    arriving: list[Tensor]
    works: Sequence[Any]
    leaving: list[Tensor]
    """Kept alive until they are sent."""

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.arriving


def _passed(group: ProcessGroup, tensors: list[Tensor]) -> _Passing:
    """Start to send ``tensors`` to the next rank of the ring and to receive as many."""
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return _Passing(tensors, (), [])
    leaving = [x.contiguous() for x in tensors]
    arriving = [torch.empty_like(x) for x in leaving]
    works = []
    for sent, got in zip(leaving, arriving, strict=True):
        works += dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % ranks),
                dist.P2POp(dist.irecv, got, group=group, group_peer=(rank - 1) % ranks),
            ]
        )
    return _Passing(arriving, works, leaving)


def _round(group: ProcessGroup, tensors: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield, rank by rank, whose tensors are here and those.

    The first travels while it is worked on; further ones are changed by the work, and go on after
    it. At the end they are one step short of home.
    """
    ranks, rank = group.size(), group.rank()
    fixed, changing = tensors[:1], tensors[1:]
    for step in range(ranks):
        last = step == ranks - 1
        ahead = None if last else _passed(group, fixed)
        yield (rank - step) % ranks, fixed + changing
        if ahead is not None:
            fixed = ahead.wait()
            changing = _passed(group, changing).wait() if changing else changing
