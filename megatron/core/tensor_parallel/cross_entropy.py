"""Cross entropy of each token, with the softmax in fp32 (fp64 in fp64) and little memory.

Two forms of one thing: from logits that a caller already has, and from the hidden states and the
output weight, which never holds more than one matrix as large as the logits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.grad_sink import grad_sink_of
from megatron.core.tensor_parallel.linear_product import add_transposed_product
from megatron.core.tensor_parallel.region_entry import GatheredAgain, RegionEntry, landed
from megatron.core.tensor_parallel.regions import all_reduce_
from megatron.core.tensor_parallel.softmax_kernel import SoftmaxKernel, softmax_kernel
from megatron.core.tensor_parallel.wide_room import borrow, give_back
from megatron.core.weight_grad_queue import LateOperand, is_put_off, weight_gradient

_ALONE = RegionEntry()


class LogitTransform(NamedTuple):
    """What becomes of logits before their softmax: a factor, a cap, and an end of the vocabulary.

    None of them by default.
    """

    multiplier: float = 1.0
    """Above 0."""
    softcap: float | None = None
    """c: logits x become c * tanh(x / c). None for no cap. Source: Bello et al. 2016
    (arXiv:1611.09940), section 4; Gemma 2 (arXiv:2408.00118), section 2."""
    columns: int | None = None
    """How many logits of this rank are tokens'; the others, of rows that pad the vocabulary, become
    -inf. None: all are."""

    def of(self, logits: Tensor) -> Tensor:
        """Return ``logits`` [...], transformed in fp32 (fp64), in their own dtype."""
        if self == _UNCHANGED:
            return logits
        wide = logits.to(_wide(logits)) * self.multiplier
        if self.softcap is not None:
            wide = self.softcap * torch.tanh(wide / self.softcap)
        if self.columns is not None:
            padding = torch.arange(wide.shape[-1], device=wide.device) >= self.columns
            wide = wide.masked_fill(padding, -torch.inf)
        return wide.to(logits.dtype)

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform ``logits`` in place, without gradient.

        Returns:
            The slope of the cap at each, like ``logits``; None without a cap.
        """
        if self.multiplier != 1.0:
            logits.mul_(self.multiplier)
        slope = None
        if self.softcap is not None:
            shares = logits.div_(self.softcap).tanh_()  # of the cap, in [-1, 1]
            slope = 1.0 - shares * shares
            shares.mul_(self.softcap)
        if self.columns is not None:
            logits[..., self.columns :] = -torch.inf
        return slope


_UNCHANGED = LogitTransform()

_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25, "kept": 1 << 24}
"""Logits worked on at a time: on the CPU what stays in its cache. Those that are kept anyway and
that one pass makes a softmax of may leave it: larger products are faster."""
_TOP = 16.0
"""Largest element of a row in fp16: its product with weights of up to 2000 is finite, and elements
of a 200,000th of it have all digits."""
_LEAST_TOP = 1e-18
"""Of a row that is smaller, whose gradient nobody would see, the factor stays finite."""
_MIN_ROWS = 256
"""Fewer rows at a time would slow the product down."""


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] of each token.

    Args:
        logits: [..., v].
        target: [...], int64 in [0, v).

    Returns:
        [...], fp32, or fp64 for fp64 logits.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    loss: Tensor = _CrossEntropy.apply(rows, target.reshape(-1))
    return loss.view(target.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    entry: RegionEntry = _ALONE,
    *,
    transform: LogitTransform = _UNCHANGED,
) -> Tensor:
    """Return the cross entropy of each token under the logits ``hidden @ weight.T``.

    Args:
        hidden: [..., h], whole or as ``entry`` says.
        weight: [v, h]; of the ranks of ``entry`` each has an equal slice of its rows, in order.
        target: [...], int64 in [0, v) of the whole vocabulary and sequence.
        entry: Ranks that the vocabulary is split over, if it is.
        transform: Of the logits.

    Returns:
        [...] like ``target``, fp32, or fp64 for fp64 input; the same on all ranks.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = _LinearCrossEntropy.apply(
        rows, weight, target.reshape(-1), torch.is_grad_enabled(), entry, transform
    )
    return loss.view(target.shape)


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits and one number a row."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, target: Tensor) -> Tensor:
        log_norm = logits.new_empty(len(logits), dtype=_wide(logits))
        for rows in _chunks(len(logits), logits.shape[1], logits.device.type):
            log_norm[rows] = logits[rows].to(log_norm.dtype).logsumexp(dim=-1)
        ctx.save_for_backward(logits, target, log_norm)
        return log_norm - logits.gather(1, target.unsqueeze(1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        logits, target, log_norm = ctx.saved_tensors  # type: ignore[attr-defined]
        d_logits = torch.empty_like(logits)
        for rows in _chunks(len(logits), logits.shape[1], logits.device.type):
            probs = (logits[rows].to(log_norm.dtype) - log_norm[rows, None]).exp_()
            _subtract_at(probs, target[rows], torch.ones_like(grad[rows]))
            d_logits[rows] = probs.mul_(grad[rows, None])
        return d_logits, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves exp(logits - max) less its sum at the target: the gradient of a row but for a factor.

    Backward puts the factor, grad / sum, on the narrow side of both products, so that it reads
    the wide matrix only to multiply it, and never changes what was saved. The factor of the logits
    goes there too; the slope of their cap, which each element has its own, into what is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        keep: bool,
        entry: RegionEntry,
        transform: LogitTransform,
    ) -> Tensor:
        own, hidden = hidden, entry.whole(hidden)
        n, vocab = len(hidden), len(weight)
        kernel = softmax_kernel(hidden) if transform.softcap is None else None
        shares = entry.group if entry.ranks > 1 else None
        saved = borrow(n if keep else 0, vocab, hidden)
        loss = hidden.new_empty(n, dtype=_wide(hidden))
        sums = torch.empty_like(loss)
        for rows in _chunks(n, vocab, "kept" if keep and kernel else hidden.device.type):
            room = saved[rows] if keep else hidden.new_empty(len(loss[rows]), vocab)
            logits = torch.mm(hidden[rows], weight.T, out=room)
            label = _label(target[rows], vocab, shares)
            if kernel is None:
                loss[rows], sums[rows] = _softmax(logits, label, transform, shares)
            else:
                made = _compiled_softmax(kernel, logits, label, transform, shares)
                loss[rows], sums[rows] = made
        ctx.save_for_backward(own, weight, saved, sums)
        ctx.sink, ctx.entry = grad_sink_of(weight), entry
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, saved, sums = ctx.saved_tensors
        factor = (grad / sums).unsqueeze(1)
        operand = ctx.entry.operand(hidden)
        if isinstance(operand, LateOperand) and not is_put_off(ctx.sink):
            operand.launch()
        on_its_way = ctx.entry.start_sum((saved @ weight).mul_(factor))
        try:
            operands = saved, factor, operand
            d_weight = weight_gradient(ctx.sink, _weight_grad, *operands, add=_add_weight_grad)
        finally:  # nobody may write to freed memory if a product fails
            d_hidden = on_its_way.land()
        if not is_put_off(ctx.sink):
            give_back(saved)
        return d_hidden, d_weight, None, None, None, None


class _Label(NamedTuple):
    """Where the labels of rows stand in the vocabulary of this rank."""

    column: Tensor
    """[n, 1]; 0 where the label is another rank's."""
    elsewhere: Tensor | None
    """[n] bool: it is another rank's. None without other ranks."""

    def here(self, values: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
        """Return ``values`` [n] where labels are this rank's."""
        if self.elsewhere is None:
            return values
        return torch.where(self.elsewhere, otherwise, values)


def _label(target: Tensor, vocab: int, shares: dist.ProcessGroup | None) -> _Label:
    if shares is None:
        return _Label(target.unsqueeze(1), None)
    label = target - shares.rank() * vocab
    elsewhere = (label < 0) | (label >= vocab)
    return _Label(label.masked_fill(elsewhere, 0).unsqueeze(1), elsewhere)


def _softmax(
    logits: Tensor, label: _Label, transform: LogitTransform, shares: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Make ``logits`` [n, v] what is saved; return the losses and what it is to be divided by."""
    exps = logits.to(_wide(logits))  # itself, unless it is narrower
    slope = transform.apply_(exps)
    top = exps.amax(dim=-1, keepdim=True)
    if shares is not None:
        all_reduce_(shares, top, dist.ReduceOp.MAX)
    chosen = (exps.gather(1, label.column) - top).squeeze(1)
    total, chosen = _over_ranks(shares, exps.sub_(top).exp_().sum(dim=-1), label.here(chosen))
    exps.scatter_add_(1, label.column, -label.here(total).unsqueeze(1))
    if slope is not None:
        exps.mul_(slope)
    sums = total / transform.multiplier
    if logits.dtype == torch.float16:
        sums *= _level(exps)
    if exps is not logits:
        logits.copy_(exps)
    return total.log() - chosen, sums


def _compiled_softmax(
    kernel: SoftmaxKernel,
    logits: Tensor,
    label: _Label,
    transform: LogitTransform,
    shares: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """See ``_softmax``; without a cap. Rounds what stands at the label once, like all else."""
    columns = logits.shape[1] if transform.columns is None else transform.columns
    factor, tops = transform.multiplier, None
    chosen = logits.gather(1, label.column).squeeze(1).float().mul_(factor)
    if shares is not None:
        tops = all_reduce_(
            shares, kernel.max(logits, columns, factor).unsqueeze(1), dist.ReduceOp.MAX
        ).squeeze(1)
    tops, total = kernel.exp_(logits, columns, factor, tops)
    total, chosen = _over_ranks(shares, total, label.here(chosen - tops))
    flat, places = logits.view(-1), label.column.squeeze(1)
    places = torch.arange(len(places), device=places.device) * logits.shape[1] + places
    at_label = label.here((chosen.exp() - total).to(logits.dtype), flat[places])
    flat.index_copy_(0, places, at_label)  # scatter_ takes 40 ms for 2048 rows in bf16
    return total.log() - chosen, total / factor


def _over_ranks(
    shares: dist.ProcessGroup | None, total: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums of both [n] over the ranks."""
    if shares is None:
        return total, chosen
    total, chosen = all_reduce_(shares, torch.stack([total, chosen]))
    return total, chosen


def _weight_grad(saved: Tensor, factor: Tensor, operand: Tensor | GatheredAgain) -> Tensor:
    return saved.T @ _scaled(operand, factor)


def _add_weight_grad(
    total: Tensor, saved: Tensor, factor: Tensor, operand: Tensor | GatheredAgain
) -> None:
    add_transposed_product(total, saved, _scaled(operand, factor))


def _scaled(operand: Tensor | GatheredAgain, factor: Tensor) -> Tensor:
    hidden = landed(operand)
    return (hidden * factor).to(hidden.dtype)


def _level(exps: Tensor) -> Tensor:
    """Multiply each row, in place, so that fp16 holds it; return the factors [n].

    At the target stands minus the sum of a row's other elements: 0.001 where a model is sure of it,
    and 100,000 where it knows nothing of so large a vocabulary. fp16 ends at 65,504 and gets coarse
    below 0.00006.
    """
    low, high = exps.aminmax(dim=-1)
    factor = _TOP / torch.maximum(-low, high).clamp_(min=_LEAST_TOP)
    exps.mul_(factor.unsqueeze(1))
    return factor


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of the softmax of ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocab: int, kind: str) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of ``vocab`` logits; see ``_CHUNK_ELEMENTS``."""
    step = max(_MIN_ROWS, _CHUNK_ELEMENTS.get(kind, 1 << 24) // vocab)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _subtract_at(x: Tensor, column: Tensor, value: Tensor) -> None:
    """Subtract ``value`` [n] from one element of each row of ``x`` [n, v], in place."""
    x.scatter_add_(1, column.unsqueeze(1), -value.unsqueeze(1))
