"""Triton kernels of the MoE layer. Imports triton: only ``triton_ops`` imports this file, late.

Sums are taken in fp32 and in a fixed order, without atomics, so that results repeat bit for bit.
Nothing here waits for the device. Rows may be longer than 2^31 elements apart: offsets are int64.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEST = 2048
"""Columns that a program has at a time: at 8 warps 8 elements a thread."""


def gather_rows(source: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``triton_ops.gather_rows``."""
    out = source.new_empty(len(index), source.shape[1], dtype=dtype)
    if out.numel():
        block = _block(source.shape[1])
        grid = (len(index), triton.cdiv(source.shape[1], block))
        _gather_rows[grid](
            *(source.contiguous(), index, out, source.shape[0], source.shape[1]),
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def sum_rows(rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``triton_ops.sum_rows``."""
    most, num_tokens = slots.shape
    out = rows.new_empty(num_tokens, rows.shape[1], dtype=dtype)
    if out.numel():
        block = _block(rows.shape[1])
        grid = (num_tokens, triton.cdiv(rows.shape[1], block))
        _sum_rows[grid](
            *(rows.contiguous(), slots.contiguous(), out),
            *(rows.shape[0], num_tokens, rows.shape[1], most),
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def swiglu(inner: Tensor, probs: Tensor) -> Tensor:
    """See ``triton_ops.swiglu``."""
    num_rows, width = inner.shape[0], inner.shape[1] // 2
    out = inner.new_empty(num_rows, width)
    if out.numel():
        block = _block(width)
        grid = (num_rows, triton.cdiv(width, block))
        _swiglu[grid](
            *(inner.contiguous(), probs.contiguous(), out, width),
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def swiglu_gradient(inner: Tensor, probs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``triton_ops.swiglu_gradient``."""
    num_rows, width = grad.shape
    inner, probs, grad = inner.contiguous(), probs.contiguous(), grad.contiguous()
    results = torch.empty_like(inner), torch.zeros_like(probs), torch.empty_like(grad)
    if grad.numel():
        block = min(1024, _block(width))
        _swiglu_gradient[(num_rows,)](
            *(inner, probs, grad, *results, width), BLOCK=block, num_warps=_warps(block)
        )
    return results


def zero_empty_(blocks: Tensor, counts: Tensor) -> Tensor:
    """See ``triton_ops.zero_empty_``."""
    assert blocks.is_contiguous(), f"{blocks.stride()=}"
    if blocks.numel():
        size = blocks[0].numel()
        block = min(_LONGEST, triton.next_power_of_2(size))
        grid = (len(blocks), triton.cdiv(size, block))
        _zero_empty[grid](blocks, counts.contiguous(), size, BLOCK=block, num_warps=8)
    return blocks


_LONGEST = 16384
"""Elements that a program sets to zero."""


def _block(columns: int) -> int:
    return min(_WIDEST, triton.next_power_of_2(columns))


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


@triton.jit
def _gather_rows(source, index, out, num_source, columns, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    origin = tl.load(index + row).to(tl.int64)
    end = tl.where((origin >= 0) & (origin < num_source), columns, 0)
    value = tl.load(source + origin * columns + column, mask=column < end, other=0.0)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(rows, slots, out, num_rows, num_tokens, columns, most, BLOCK: tl.constexpr):  # noqa: N803
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(most):
        row = tl.load(slots + turn * num_tokens + token).to(tl.int64)
        end = tl.where((row >= 0) & (row < num_rows), columns, 0)
        value = tl.load(rows + row * columns + column, mask=column < end, other=0.0)
        total += value.to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _zero_empty(blocks, counts, size, BLOCK: tl.constexpr):  # noqa: N803
    number = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # of a block that is kept nothing is touched
    end = tl.where(tl.load(counts + number) == 0, size, 0)
    zeros = tl.zeros((BLOCK,), dtype=blocks.dtype.element_ty)
    tl.store(blocks + number * size + place, zeros, mask=place < end)


@triton.jit
def _swiglu(inner, probs, out, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(inner + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(inner + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    active = gate * tl.sigmoid(gate) * up * tl.load(probs + row)
    tl.store(out + row * width + column, active.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(
    inner,
    probs,
    grad,
    grad_inner,
    grad_probs,
    activated,
    width,
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row)
    gates, ups = row * 2 * width, (row * 2 + 1) * width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(inner + gates + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(inner + ups + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        active = silu * up
        total += active * dy
        weighted = dy * prob
        grad_gate = weighted * up * (sigmoid + silu * (1.0 - sigmoid))
        kind = activated.dtype.element_ty
        tl.store(activated + row * width + column, (active * prob).to(kind), mask=inside)
        tl.store(grad_inner + gates + column, grad_gate.to(kind), mask=inside)
        tl.store(grad_inner + ups + column, (weighted * silu).to(kind), mask=inside)
    tl.store(grad_probs + row, tl.sum(total, axis=0))
