"""The implementations that always exist, from torch alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.core.extensions import triton_ops
from megatron.core.extensions.fused_adamw import FusedAdamW
from megatron.core.extensions.registry import register
from megatron.core.grad_sink import grad_sink_of
from megatron.core.weight_grad_queue import weight_gradient


@register("adam", "torch_native", why="torch's fused AdamW kernel")
def adam(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> FusedAdamW:
    """Make an AdamW whose moments are called ``exp_avg`` and ``exp_avg_sq``.

    Args:
        groups: torch parameter groups, each with its ``weight_decay``.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.

    Source: Loshchilov and Hutter 2017 (arXiv:1711.05101).
    """
    return FusedAdamW(groups, lr=lr, betas=betas, eps=eps)


@register(
    "grouped_mm", "torch_native", why="torch.nn.functional.grouped_mm; loop over experts in fp64"
)
def grouped_mm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each group of rows by the matrix of its expert: ``rows @ weight[e].T``.

    Gradients always exist: zeros for an expert without rows.

    Args:
        rows: [num_rows, in], grouped by expert.
        weight: [num_experts, out, in], each slice as in ``nn.Linear``.
        tokens_per_expert: [num_experts], int64, on the device of ``rows``; sums to num_rows.

    Returns:
        [num_rows, out].
    """
    out: Tensor = _GroupedMM.apply(rows, weight, tokens_per_expert)
    return out


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, tokens_per_expert)
        ctx.sink = grad_sink_of(weight)
        return grouped_product(rows, weight.transpose(1, 2), tokens_per_expert)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, tokens_per_expert = ctx.saved_tensors
        grad = grad.contiguous()
        need_rows, need_weight, _ = ctx.needs_input_grad
        grad_rows = grouped_product(grad, weight, tokens_per_expert) if need_rows else None
        if not need_weight:
            return grad_rows, None, None
        operands = grad, rows, tokens_per_expert
        return grad_rows, weight_gradient(ctx.sink, grouped_weight_grad, *operands), None


def grouped_product(rows: Tensor, matrices: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Return rows of group e @ matrices[e], where matrices is [num_experts, in, out].

    Without autograd.
    """
    if _fits_grouped_mm(rows, matrices.shape[1], matrices.shape[2]):
        return nn.functional.grouped_mm(rows, matrices, offs=_ends(tokens_per_expert))
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    sizes = tokens_per_expert.tolist()
    for part, matrix, result in zip(rows.split(sizes), matrices, out.split(sizes), strict=True):
        torch.mm(part, matrix, out=result)
    return out


def grouped_weight_grad(grad: Tensor, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Return grad.T @ rows for each group: [num_experts, out, in]; zeros for an empty one.

    Without autograd.
    """
    if _fits_grouped_mm(rows, grad.shape[1], rows.shape[1]):
        result = nn.functional.grouped_mm(grad.t(), rows, offs=_ends(tokens_per_expert))
        # on CUDA its kernels may leave the block of an empty group unwritten
        return _zero_empty_(result, tokens_per_expert) if rows.is_cuda else result
    sizes = tokens_per_expert.tolist()
    result = rows.new_empty(len(sizes), grad.shape[1], rows.shape[1])
    for left, right, block in zip(grad.split(sizes), rows.split(sizes), result, strict=True):
        torch.mm(left.t(), right, out=block)
    return result


def _fits_grouped_mm(rows: Tensor, *widths: int) -> bool:
    """Whether ``F.grouped_mm`` takes it: no fp64, some rows, widths of whole 16 bytes."""
    typed = rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    return typed and aligned and rows.shape[0] > 0


def _zero_empty_(blocks: Tensor, counts: Tensor) -> Tensor:
    """Set the blocks without rows to zeros; torch alone reads and writes all others, too."""
    if triton_ops.unusable() is None:
        return triton_ops.zero_empty_(blocks, counts)
    return blocks.masked_fill_((counts == 0).view(-1, 1, 1), 0.0)


def _ends(tokens_per_expert: Tensor) -> Tensor:
    return tokens_per_expert.cumsum(0, dtype=torch.int32)
