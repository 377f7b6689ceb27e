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
from megatron.core.transformer.blocked_attention import WeightDropout, blocks
from megatron.core.transformer.precision import compute_dtype


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: WeightDropout | None,
    group: ProcessGroup,
) -> Tensor:
    """Attend; see ``context_parallel_attention``. Sums are taken in fp32 or wider.

    Keeps queries, keys, values, output and one number a query; weights are made again in backward.

    Source: Liu et al. 2023 (arXiv:2310.01889); balanced slices: Brandon et al. 2023
    (arXiv:2311.09431).
    """
    out: Tensor = _RingAttention.apply(query, key, value, attention_mask, dropout, group)
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
    dropout: WeightDropout | None

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
                    columns = slice(other * len(keys), other * len(keys) + seen)
                    shift = number * len(queries) - queries.start
                    yield _Meeting(slice(start + shift, end + shift), columns, start, keys.start)

    def scores(self, q: Tensor, k: Tensor, at: _Meeting) -> Tensor:
        """Return the scores [b, g, r, rows, columns], -inf where a query may not look."""
        rows = q[..., at.rows, :]
        scores = (rows * q.shape[-1] ** -0.5) @ k[:, :, None, at.columns].mT
        shape = scores.shape[-2:]
        if at.column + shape[1] > at.row:
            later = torch.ones(shape, dtype=torch.bool, device=q.device).triu_(
                at.row - at.column + 1
            )
            scores.masked_fill_(later, float("-inf"))
        if self.attention_mask is not None:
            seen = slice(at.column, at.column + shape[1])
            scores.masked_fill_(self.attention_mask[:, :, None, at.rows, seen], float("-inf"))
        return scores

    def kept(self, weights: Tensor, at: _Meeting) -> Tensor | None:
        """Return zeros and scaled ones to multiply ``weights`` by, or None."""
        if self.dropout is None:
            return None
        flat = weights.flatten(1, 2)  # [b, n, rows, columns]
        kept = self.dropout.kept(flat, total=self.total, row=at.row, column=at.column)
        return as_factor(kept, weights.dtype).mul_(keep_scale(self.dropout.p)).view_as(weights)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: WeightDropout | None,
        group: ProcessGroup,
    ) -> Tensor:
        square = _Square(group, query.shape[2] * group.size(), attention_mask, dropout)
        wide = compute_dtype(query.dtype)
        q = query.unflatten(1, (key.shape[1], -1)).to(wide)  # [b, g, r, s, d]
        out = torch.zeros_like(q)
        top = q.new_full((*q.shape[:-1], 1), float("-inf"))
        total = torch.zeros_like(top)
        for source, (here,) in _round(group, [torch.stack([key, value])]):
            k, v = here.to(wide).unbind()
            for at in square.meetings(source):
                _meet(square, at, q, k, v, out, top, total)
        out.div_(total)
        result = out.flatten(1, 2).to(query.dtype)
        ctx.square = square
        ctx.save_for_backward(query, key, value, result, top.add_(total.log_()))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, lse = ctx.saved_tensors
        square: _Square = ctx.square
        q, d_out, out = (
            x.unflatten(1, (key.shape[1], -1)).to(lse.dtype) for x in (query, grad, result)
        )
        d_q = torch.zeros_like(q)
        drift = torch.linalg.vecdot(d_out, out).unsqueeze(-1)  # sum of weight * d weight
        gradients = torch.zeros(2, *key.shape, dtype=lse.dtype, device=key.device)
        for source, (here, d_here) in _round(square.group, [torch.stack([key, value]), gradients]):
            k, v = here.to(lse.dtype).unbind()
            for at in square.meetings(source):
                weights = (square.scores(q, k, at) - lse[..., at.rows, :]).exp_()
                factor = square.kept(weights, at)
                d_rows = d_out[..., at.rows, :]
                dropped = weights if factor is None else weights * factor
                d_here[1][:, :, at.columns] += (dropped.mT @ d_rows).sum(dim=2)
                d_weights = d_rows @ v[:, :, None, at.columns].mT
                if factor is not None:
                    d_weights.mul_(factor)
                d_scores = d_weights.sub_(drift[..., at.rows, :]).mul_(weights)
                d_scores.mul_(q.shape[-1] ** -0.5)
                d_q[..., at.rows, :] += d_scores @ k[:, :, None, at.columns]
                d_here[0][:, :, at.columns] += (d_scores.mT @ q[..., at.rows, :]).sum(dim=2)
            gradients = d_here
        (gradients,) = _passed(square.group, [gradients]).wait()
        d_k, d_v = gradients.to(key.dtype).unbind()
        return d_q.flatten(1, 2).to(query.dtype), d_k, d_v, None, None, None


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
    scores = square.scores(q, k, at)
    rows = (..., at.rows, slice(None))
    highest = torch.maximum(top[rows], scores.amax(dim=-1, keepdim=True))
    finite = highest.masked_fill(highest == float("-inf"), 0.0)  # nothing seen so far
    old, weights = (top[rows] - finite).exp_(), scores.sub_(finite).exp_()
    total[rows] = total[rows] * old + weights.sum(dim=-1, keepdim=True)
    factor = square.kept(weights, at)
    dropped = weights if factor is None else weights * factor
    out[rows] = out[rows] * old + dropped @ v[:, :, None, at.columns]
    top[rows] = highest


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
